"""Diagnostics of blocks whose codes were tuned on the output of the whole block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prismquant.arguments import EXACT


@dataclass(frozen=True)
class TuningDiagnostics:
    """Work of a tuner on the layers of one block together.

    Attributes:
        method: Name of the tuner.
        learning_rate: Its learning rate.
        iterations: Steps taken; fewer than planned when the output stops being finite.
        batch: Calls that one step looks at.
        loss_before: Loss of the block before, over all calls.
        loss: Loss of the weights that were kept.
        tuned_loss: Loss of the tuned codes, kept or not.
        kept_start_codes: Whether the codes of the start were better.
        settled_loss: Loss after the scales settled, kept or not; None: they did not.
        changed_codes: Fraction of codes that differ from the start's.
        changed_scales: Fraction of scales that differ from the start's.
    """

    __pydantic_config__ = EXACT

    method: Literal["autoround", "zeroquant"]
    learning_rate: float
    iterations: int = 0
    batch: int = 0
    loss_before: float = 0.0
    loss: float = 0.0
    tuned_loss: float = 0.0
    kept_start_codes: bool = False
    settled_loss: float | None = None
    changed_codes: float = 0.0
    changed_scales: float = 0.0
