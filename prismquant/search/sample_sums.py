"""Sums over every sample, for each option of a unit of choice, and the scores that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prismquant.search.analysis import Analysis
from prismquant.search.choices import UnitRows
from prismquant.search.sensitivity import Score


class SampleSums:
    """Sums of losses over the samples of this rank, for each option of a unit.

    Args:
        unit: The unit of choice.
        analysis: Tells the samples.
        losses: Number of losses.
    """

    def __init__(self, unit: UnitRows, analysis: Analysis, losses: int) -> None:
        self.unit, self._analysis, self._losses = unit, analysis, losses
        self._parts: dict[str, list[tuple[int, list[int], Tensor]]] = {}

    def add(self, option: str, sample: int, losses: Sequence[int], values: Tensor) -> None:
        """Add to an option's sums.

        Args:
            option: Its name.
            sample: Number of the sample.
            losses: Numbers of losses.
            values: One for each of these.
        """
        self._parts.setdefault(option, []).append((sample, list(losses), values))

    def by_option(self) -> dict[str, Tensor]:
        """Sums over the samples of all ranks by option, float64 ``[losses, samples]``."""
        own = {name: self._summed(name) for name in [*self.unit.rows, *self.unit.caches]}
        return gathered(own, self._analysis)

    def _summed(self, option: str) -> Tensor:
        sums = torch.zeros(self._losses, len(self._analysis.batches), dtype=torch.float64)
        for sample, losses, values in self._parts.get(option, []):
            sums[losses, sample] += values.cpu().double()
        return sums


def mean_score(values: Tensor, tokens: Tensor) -> Score:
    """The sum of values over the sum of tokens, with its standard error over the samples.

    Args:
        values: Float64, one for each sample, [samples].
        tokens: Tokens of each sample, alike.
    """
    total = float(tokens.sum())
    mean = float(values.sum()) / total
    count = int((tokens > 0).sum())
    if count < 2:
        return Score(mean)
    rest = values - mean * tokens
    return Score(mean, math.sqrt(float(rest.square().sum()) * count / (count - 1)) / total)


def gathered(own: Mapping[str, Tensor], analysis: Analysis) -> dict[str, Tensor]:
    """Tensors of all ranks side by side along their last axis, which is that of samples.

    Samples are sorted by their ids: sums over them do not depend on which rank had which.
    """
    parts = analysis.ranks.gather(own)
    told = analysis.ranks.gather_json([name for batch in analysis.batches for name in batch.ids])
    ids = [name for part in told for name in part]
    order = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__), dtype=torch.int64)
    return {name: torch.cat([part[name] for part in parts], dim=-1)[..., order] for name in own}
