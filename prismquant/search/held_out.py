"""Calibration samples held out of all statistics, so that methods can be compared on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prismquant.data.samples import Sample, balanced_subset
from prismquant.errors import DataError

FEWEST = 4
"""Samples without which no loss has an error that can be trusted, nor a statistic a use."""

_PART = 8


@dataclass(frozen=True)
class HeldOut:
    """Calibration samples in two parts, in the order of their source.

    Attributes:
        held_out: An eighth of them, four at least, with the kinds as even as they can be.
        rest: All others.
    """

    held_out: tuple[Sample, ...]
    rest: tuple[Sample, ...]

    def part(self, count: int, seed: int) -> tuple[Sample, ...]:
        """Up to so many of the rest, with the kinds as even as they can be."""
        return balanced_subset(self.rest, count, seed)


def hold_out(samples: Sequence[Sample], seed: int) -> HeldOut:
    """Hold an eighth of the samples out, and four at least.

    Args:
        samples: All of them.
        seed: Chooses which.

    Raises:
        DataError: There are fewer than eight.
    """
    if len(samples) < 2 * FEWEST:
        raise DataError(
            f"a choice by held-out loss takes {2 * FEWEST} calibration samples, half of which no "
            f"statistic sees; there are {len(samples)}",
            remedy="give more, or choose the method yourself: `prismquant recipe list`",
        )
    count = max(FEWEST, len(samples) // _PART)
    # Another order than that by which the set itself was drawn.
    held_out = balanced_subset(samples, count, seed + 1)
    kept = {sample.id for sample in held_out}
    return HeldOut(held_out, tuple(one for one in samples if one.id not in kept))
