"""Readers that a checkpoint can be checked for."""

from __future__ import annotations

from enum import StrEnum


class TargetReader(StrEnum):
    """Reader that is to load the checkpoint."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    SGLANG = "sglang"
    # prismquant.load, and so eval and export
    PRISMQUANT = "prismquant"
