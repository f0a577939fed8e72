"""Calibration samples held out of all statistics, so that methods can be compared on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from prismquant.data.samples import Sample, balanced_subset, text_of
from prismquant.errors import DataError

FEWEST = 4
"""Samples without which no loss has an error that can be trusted, nor a statistic a use."""

ENOUGH_TEXT = 8192
"""Characters of text, some 2000 tokens, with which differences of a few percent can be seen."""

_PART, _MOST = 8, 3


@dataclass(frozen=True)
class HeldOut:
    """Calibration samples in two parts, in the order of their source.

    Attributes:
        held_out: An eighth of them, four at least; up to a third where they are short.
        rest: All others.
    """

    held_out: tuple[Sample, ...]
    rest: tuple[Sample, ...]


def hold_out(samples: Sequence[Sample], seed: int) -> HeldOut:
    """Hold an eighth of the samples out, and four at least; up to a third where they are short.

    Args:
        samples: All of them.
        seed: Chooses which.

    Raises:
        DataError: There are fewer than eight.
    """
    count = len(samples)
    kinds = Counter(sample.kind for sample in samples)
    # The only sample of a kind is one that statistics need.
    open_to = [sample for sample in samples if kinds[sample.kind] > 1] or samples
    if count < 2 * FEWEST:
        raise DataError(
            f"a choice by held-out loss takes {2 * FEWEST} calibration samples, half of which no "
            f"statistic sees; there are {count}",
            remedy="give more, or choose the method yourself: `prismquant recipe list`",
        )
    least, most = max(FEWEST, count // _PART), max(FEWEST, count // _MOST)
    # Another order than that by which the set itself was drawn.
    held_out = enough_of(open_to, least, most, ENOUGH_TEXT, seed + 1)
    kept = {sample.id for sample in held_out}
    return HeldOut(held_out, tuple(one for one in samples if one.id not in kept))


def enough_of(
    samples: Sequence[Sample], least: int, most: int, text: int, seed: int
) -> tuple[Sample, ...]:
    """Find the fewest samples with enough text, with the kinds as even as they can be.

    Args:
        samples: To choose from.
        least, most: How many are taken, whatever their text.
        text: Characters that are enough.
        seed: Chooses which.
    """
    chosen = balanced_subset(samples, least, seed)
    for count in range(least + 1, min(most, len(samples)) + 1):
        if sum(len(text_of(m)) for one in chosen for m in one.messages) >= text:
            break
        chosen = balanced_subset(samples, count, seed)
    return chosen
