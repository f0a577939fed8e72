"""Instructions that this processor has."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

# What `torch.cpu.get_capabilities` calls the instructions that multiply bfloat16.
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16")


def multiplies_bfloat16() -> bool:
    """True if this processor has instructions for products of bfloat16."""
    capabilities: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return any(capabilities().get(name) for name in _BFLOAT16)
