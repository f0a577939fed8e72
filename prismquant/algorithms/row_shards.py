"""Row shards of a problem, which several processes solve, and the result of the whole.

Rows of a weight never interact: with the same scales and the same Hessian each part's codes are
those that the whole would have given. Only what decides scales limits where a cut may be: the unit
that shares one is never divided, and a global scale is that of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from prismquant.algorithms.problem import LayerProblem, LayerResult
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.numerics.kinds import Granularity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismquant.algorithms.protocols import Solver


@dataclass(frozen=True)
class RowSpan:
    """Some rows of one layer.

    Attributes:
        layer: Its place in the problem.
        start, stop: The rows.
    """

    layer: int
    start: int
    stop: int


def row_shards(problem: LayerProblem, count: int) -> list[list[RowSpan]]:
    """Divide the rows of all layers into so many shards, as evenly as scales allow.

    Args:
        problem: What to divide.
        count: Of shards, 1 or more.

    Returns:
        For each shard its rows, in order; a shard may have none.
    """
    units = [_unit(problem, len(weight)) for weight in problem.weights]
    total = sum(len(weight) for weight in problem.weights)
    found: list[list[RowSpan]] = [[] for _ in range(count)]
    done = 0
    for layer, (weight, unit) in enumerate(zip(problem.weights, units, strict=True)):
        start = 0
        while start < len(weight):
            shard = min(count * done // total, count - 1)
            # Up to where the next shard begins, in whole units.
            room = -(-total * (shard + 1) // count) - done
            stop = min(start + max(-(-room // unit), 1) * unit, len(weight))
            found[shard].append(RowSpan(layer, start, stop))
            done, start = done + stop - start, stop
    return found


def problem_of(problem: LayerProblem, shard: Sequence[RowSpan]) -> LayerProblem:
    """The problem of these rows alone; there must be some."""
    return replace(
        problem,
        names=tuple(problem.names[span.layer] for span in shard),
        weights=tuple(problem.weights[span.layer][span.start : span.stop] for span in shard),
        # The global scale, if there is one, is that of all the rows.
        scale_dtype=problem.scale_format,
    )


def joined(
    solver: Solver,
    problem: LayerProblem,
    shards: Sequence[Sequence[RowSpan]],
    results: Sequence[LayerResult | None],
) -> LayerResult:
    """Join the results of all shards of a problem.

    Args:
        solver: Whose results they are; it merges their diagnostics.
        problem: The whole.
        shards: From :func:`row_shards`.
        results: One for each shard; None where it is empty.

    Returns:
        The result that solving the whole would have given, but for the order of summation in
        losses.
    """
    pieces: list[list[tuple[QuantizedTensor, float, float]]] = [[] for _ in problem.names]
    solved = [result for result in results if result is not None]
    for rows, result in zip(shards, results, strict=True):
        if result is not None:
            outcomes = zip(result.weights, result.losses, result.baseline_losses, strict=True)
            for span, outcome in zip(rows, outcomes, strict=True):
                pieces[span.layer].append(outcome)
    return LayerResult(
        tuple(_stacked([weight for weight, _, _ in layer]) for layer in pieces),
        tuple(sum(loss for _, loss, _ in layer) for layer in pieces),
        tuple(sum(baseline for _, _, baseline in layer) for layer in pieces),
        solver.merge([result.diagnostics for result in solved]),
        solved[0].failure,
    )


def _unit(problem: LayerProblem, rows: int) -> int:
    """Rows that must stay together."""
    if problem.spec.granularity == Granularity.TENSOR:
        return rows
    if problem.spec.granularity == Granularity.BLOCK and problem.spec.group_size is not None:
        return problem.spec.group_size
    return 1


def _stacked(pieces: Sequence[QuantizedTensor]) -> QuantizedTensor:
    if len(pieces) == 1:
        return pieces[0]
    zeros = [piece.zero_point for piece in pieces if piece.zero_point is not None]
    return replace(
        pieces[0],
        codes=torch.cat([piece.codes for piece in pieces]),
        scale=torch.cat([piece.scale for piece in pieces]),
        zero_point=torch.cat(zeros) if zeros else None,
    )
