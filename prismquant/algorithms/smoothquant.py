"""SmoothQuant: shares the outliers of the input between the input and the weights.

A few channels of an input are many times larger than the rest, and set the scale that all share.
Dividing them costs nothing in the input's float function, but makes the weights' columns larger;
the strength ``alpha`` says how much of the difference moves (Xiao et al., arXiv 2211.10438,
section 4, equation 4):

    s_j = max |X_j|^alpha / max |W_j|^(1 - alpha)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from prismquant.algorithms.edge_scale import best_scale, foldable_scale, judge
from prismquant.algorithms.smooth_edge import (
    EdgeProblem,
    EdgeResult,
    ScaledEdge,
    hopeless,
    scaled_edges,
)
from prismquant.diagnostics.edge_diagnostics import SmoothQuantChoice
from prismquant.errors import RecipeError, check_bounds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prismquant.algorithms.model_outline import ModelOutline, Scope
    from prismquant.statistics.channel_sizes import ChannelSizes

_TEXT, _VISION = 0, 1


@dataclass(frozen=True)
class SmoothQuant:
    """Balances the largest magnitudes of inputs and weights.

    Attributes:
        alpha: The strength, from 0 (weights become even) to 1 (inputs become even), taken
            unconditionally; ``None`` searches it, or takes one half where ``search`` is false.
        search: Try strengths from 0 to 1 on the error of the consumers' outputs and keep the best;
            the edge stays as it is unless that lowers the error. ``None`` searches where no
            ``alpha`` is given.
        grid: Steps of the search between 0 and 1.
        percentile: Which magnitude of a channel stands for its largest, in (0.5, 1]. Below 1 it is
            taken from the sample of tokens.
        modality: Whose inputs count: the larger of text and vision, channel by channel (``max``),
            or one of them alone. Where the one has no tokens, the other counts.
        vision_weight: What an error at a vision token costs in the search, where one at a text
            token costs 1.
        rows: Output features of each consumer that the search looks at; the verdict counts all.
        max_scale: Scales stay within this factor of 1.
        power_of_two: Round scales to powers of two: folding them is then exact in floating point.

    Raises:
        RecipeError: A value is out of bounds, or ``alpha`` is given and is to be searched as well.
    """

    name: ClassVar[str] = "smoothquant"
    edit: ClassVar[type[ScaledEdge]] = ScaledEdge
    rough: ClassVar[dict[str, Any]] = {"grid": 5}

    alpha: float | None = None
    search: bool | None = None
    grid: int = 20
    percentile: float = 1.0
    modality: Literal["max", "text", "vision"] = "max"
    vision_weight: float = 1.0
    rows: int = 512
    max_scale: float = 1024.0
    power_of_two: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "alpha": (self.alpha is None or 0 <= self.alpha <= 1, "from 0 to 1"),
            "grid": (1 <= self.grid <= 1000, "from 1 to 1000"),
            "percentile": (0.5 < self.percentile <= 1, "above 0.5, at most 1"),
            "modality": (self.modality in ("max", "text", "vision"), "max, text or vision"),
            "vision_weight": (0 <= self.vision_weight <= 1000, "a number from 0 to 1000"),
            "rows": (1 <= self.rows <= 10**6, "from 1 to 1000000"),
            "max_scale": (2 <= self.max_scale <= 1e6, "from 2 to 1e6"),
        }
        check_bounds(self, bounds)
        if self.search and self.alpha is not None:
            raise RecipeError(
                f"alpha {self.alpha} is given, but search: true chooses it",
                where="alpha",
                remedy="leave out one of the two",
            )

    @property
    def searches(self) -> bool:
        """Whether the strength is searched."""
        return self.alpha is None if self.search is None else self.search

    @property
    def idle(self) -> dict[str, str]:
        """Options that change nothing as the others stand, and why."""
        searched = ("grid", "rows", "vision_weight")
        return {} if self.searches else dict.fromkeys(searched, "no strength is searched")

    def plan(self, model: ModelOutline, scope: Scope) -> list[ScaledEdge]:
        """Every smooth edge that ends in a layer which is meant may have its scale moved."""
        return scaled_edges(model, scope)

    def fit(self, problem: EdgeProblem) -> EdgeResult:
        """Choose the scale of one edge.

        Args:
            problem: The edge.

        Returns:
            The scale, and a :class:`SmoothQuantChoice` among its diagnostics.

        Raises:
            NumericsError: Scaled weights or inputs leave float32.
        """
        nothing = hopeless(problem)
        if nothing is not None:
            return nothing
        problem = replace(problem, vision_weight=problem.vision_weight * self.vision_weight)
        source = self._source(problem.record)
        inputs = problem.channel_max(self._largest(problem.record, source))
        weights = problem.channel_max(largest_weights(problem).to(inputs.device))
        live = (inputs > 0) & (weights > 0)

        def scale(alpha: float) -> Tensor:
            logs = alpha * inputs.log2() - (1 - alpha) * weights.log2()
            return foldable_scale(logs, live, self.max_scale, self.power_of_two)

        def candidates() -> Iterator[tuple[SmoothQuantChoice, Tensor]]:
            for step in range(self.grid + 1):
                alpha = step / self.grid
                yield SmoothQuantChoice(alpha, source), scale(alpha)

        if self.searches:
            return best_scale(problem, candidates(), self.rows)
        alpha = 0.5 if self.alpha is None else self.alpha
        choice = SmoothQuantChoice(alpha, source)
        return judge(problem, scale(alpha), choice, must_gain=False)

    def _source(self, record: ChannelSizes) -> str:
        text, vision = (bool(count > 0) for count in record.counts)
        if not vision:
            return "text"
        return self.modality if text else "vision"

    def _largest(self, record: ChannelSizes, source: str) -> Tensor:
        """The magnitude that stands for each column's largest, float32 ``[in]``."""
        both = torch.stack([self._of_modality(record, m) for m in (_TEXT, _VISION)])
        return both.amax(0) if source == "max" else both[_VISION if source == "vision" else _TEXT]

    def _of_modality(self, record: ChannelSizes, modality: int) -> Tensor:
        rows = record.inputs[record.vision == bool(modality)]
        # A modality that is rare enough may be missing in the sample.
        if self.percentile == 1 or not len(rows):
            return record.absmax[modality]
        rank = max(1, math.ceil(self.percentile * len(rows)))
        return rows.abs().kthvalue(rank, dim=0).values


def largest_weights(problem: EdgeProblem) -> Tensor:
    """The largest magnitude of each column over all consumers, float32 ``[in]``."""
    low = torch.stack([consumer.weight.amin(0) for consumer in problem.consumers]).amin(0)
    high = torch.stack([consumer.weight.amax(0) for consumer in problem.consumers]).amax(0)
    return torch.maximum(-low, high)
