"""AWQ: gives the columns that matter most finer steps, by how large their inputs are.

A weight that is multiplied by ``s`` before rounding and divided after it has an error about ``s``
times smaller, as long as the scale of its group does not grow. Columns with large inputs deserve
that most (Lin et al., arXiv 2306.00978, section 3.2, equation 5):

    s_j = (mean |x_j|)^a,    a searched in [0, 1] on the error of the consumers' outputs

The form with a weight term divides by ``wmean_j^(1 - a)``, where ``wmean_j`` is the mean of
``|w| / max |w| of its group`` over the column: columns that already are as large as their group
cannot be scaled up without making its steps coarser.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from prismquant.algorithms.edge_scale import best_scale, foldable_scale
from prismquant.algorithms.smooth_edge import (
    Consumer,
    EdgeProblem,
    EdgeResult,
    ScaledEdge,
    hopeless,
    scaled_edges,
)
from prismquant.diagnostics.edge_diagnostics import AWQChoice
from prismquant.errors import check_bounds
from prismquant.numerics.grouping import to_groups
from prismquant.numerics.kinds import Granularity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prismquant.algorithms.model_outline import ModelOutline, Scope


# Weights looked at in one pass: bounds the temporary memory.
_PIECE = 1 << 24


@dataclass(frozen=True)
class AWQ:
    """Searches scales that follow the mean magnitudes of the inputs.

    Attributes:
        grid: Steps of the exponent between 0 and 1.
        duo: Search with and without the weight term; otherwise without.
        vision_weight: What vision tokens count for, where text tokens count 1: in the means and in
            the error.
        rows: Output features of each consumer that the search looks at; the verdict counts all.
        max_scale: Scales stay within this factor of 1.
        power_of_two: Round scales to powers of two: folding them is then exact in floating point.

    Raises:
        RecipeError: A value is out of bounds.
    """

    name: ClassVar[str] = "awq"
    edit: ClassVar[type[ScaledEdge]] = ScaledEdge
    rough: ClassVar[dict[str, Any]] = {"grid": 5}

    grid: int = 20
    duo: bool = True
    vision_weight: float = 1.0
    rows: int = 512
    max_scale: float = 1024.0
    power_of_two: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "grid": (1 <= self.grid <= 1000, "from 1 to 1000"),
            "vision_weight": (0 <= self.vision_weight <= 1000, "a number from 0 to 1000"),
            "rows": (1 <= self.rows <= 10**6, "from 1 to 1000000"),
            "max_scale": (2 <= self.max_scale <= 1e6, "from 2 to 1e6"),
        }
        check_bounds(self, bounds)

    def plan(self, model: ModelOutline, scope: Scope) -> list[ScaledEdge]:
        """Every smooth edge that ends in a layer which is meant may have its scale moved."""
        return scaled_edges(model, scope)

    def fit(self, problem: EdgeProblem) -> EdgeResult:
        """Choose the scale of one edge.

        Args:
            problem: The edge.

        Returns:
            The scale, or ``None`` unless it lowers the error of the outputs; and an
            :class:`AWQChoice` among its diagnostics.

        Raises:
            NumericsError: Scaled weights or inputs leave float32.
        """
        nothing = hopeless(problem)
        if nothing is not None:
            return nothing
        problem = replace(problem, vision_weight=problem.vision_weight * self.vision_weight)
        inputs = problem.channel_mean(_mean_inputs(problem))
        weights = problem.channel_mean(_mean_weights(problem).to(inputs.device))
        live = (inputs > 0) & (weights > 0)

        def candidates() -> Iterator[tuple[AWQChoice, Tensor]]:
            for weight_term in range(1 + self.duo):
                # The two forms meet at exponent 1, and exponent 0 of the plain one is no scaling.
                for step in range(1, self.grid + 1 - weight_term):
                    exponent = step / self.grid
                    logs = exponent * inputs.log2()
                    if weight_term:
                        logs = logs - (1 - exponent) * weights.log2()
                    scale = foldable_scale(logs, live, self.max_scale, self.power_of_two)
                    yield AWQChoice(exponent, bool(weight_term)), scale

        return best_scale(problem, candidates(), self.rows)


def _mean_inputs(problem: EdgeProblem) -> Tensor:
    """Mean magnitude of each column over text and vision tokens, as they count; ``[in]``."""
    record = problem.record
    counts = record.counts.clone()
    counts[1] *= problem.vision_weight
    if not bool(counts.sum() > 0):
        counts = record.counts
    return ((counts / counts.sum()) @ record.absmean.to(torch.float64)).to(torch.float32)


def _mean_weights(problem: EdgeProblem) -> Tensor:
    """Mean over the rows of all consumers of ``|w| / max |w|`` of its group, float32 ``[in]``."""
    total = sum(_relative_sizes(consumer) for consumer in problem.consumers)
    rows = sum(len(consumer.weight) for consumer in problem.consumers)
    return (torch.as_tensor(total) / rows).to(torch.float32)


def _relative_sizes(consumer: Consumer) -> Tensor:
    """The sum over rows of ``|w| / max |w|`` of its group, float64 ``[in]``."""
    weight, spec = consumer.weight, consumer.spec
    grouped = spec is not None and spec.granularity == Granularity.GROUP
    granularity = Granularity.GROUP if grouped else Granularity.CHANNEL
    size = spec.group_size if spec is not None else None
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for piece in weight.split(max(1, _PIECE // weight.shape[1])):
        groups = to_groups(piece, granularity, size).abs()
        largest = groups.amax(-1, keepdim=True)
        relative = groups.div_(torch.where(largest > 0, largest, 1.0))
        total += relative.reshape(piece.shape).sum(0)
    return total
