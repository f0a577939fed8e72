"""Cutting a problem by rows, so that several processes can solve it, and joining what they found.

Rows of a weight never interact: with the same scales and the same Hessian each part's codes are
those that the whole would have given. Only what decides scales limits where a cut may be: the unit
that shares one is never divided, and a global scale is that of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from prismquant.algorithms.problem import LayerProblem, LayerResult, Note
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.numerics.kinds import Granularity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Notes that count or sum over rows; all others are the same for every part.
_SUMMED = ("swept_loss", "refined_loss", "nearest_rows")


@dataclass(frozen=True)
class Cut:
    """Some rows of one layer.

    Attributes:
        layer: Its place in the problem.
        start, stop: The rows.
    """

    layer: int
    start: int
    stop: int


def cuts(problem: LayerProblem, parts: int) -> list[list[Cut]]:
    """Divide the rows of all layers among so many parts, as evenly as scales allow.

    Args:
        problem: What to divide.
        parts: 1 or more.

    Returns:
        For each part its rows, in order; a part may have none.
    """
    units = [_unit(problem, len(weight)) for weight in problem.weights]
    total = sum(len(weight) for weight in problem.weights)
    found: list[list[Cut]] = [[] for _ in range(parts)]
    done = 0
    for layer, (weight, unit) in enumerate(zip(problem.weights, units, strict=True)):
        start = 0
        while start < len(weight):
            part = min(parts * done // total, parts - 1)
            # Up to where the next part's share begins, in whole units.
            room = -(-total * (part + 1) // parts) - done
            stop = min(start + max(-(-room // unit), 1) * unit, len(weight))
            found[part].append(Cut(layer, start, stop))
            done, start = done + stop - start, stop
    return found


def part_of(problem: LayerProblem, rows: Sequence[Cut]) -> LayerProblem:
    """The problem of these rows alone; there must be some."""
    return replace(
        problem,
        names=tuple(problem.names[cut.layer] for cut in rows),
        weights=tuple(problem.weights[cut.layer][cut.start : cut.stop] for cut in rows),
        # The global scale, if there is one, is that of all the rows.
        scale_dtype=problem.scale_format,
    )


def joined(
    problem: LayerProblem, shares: Sequence[Sequence[Cut]], results: Sequence[LayerResult | None]
) -> LayerResult:
    """Put together what the parts of a problem have become.

    Args:
        problem: The whole.
        shares: From :func:`cuts`.
        results: One for each share; None where it is empty.

    Returns:
        The result that solving the whole would have given, but for the order of summation in
        losses.
    """
    pieces: list[list[tuple[QuantizedTensor, float, float]]] = [[] for _ in problem.names]
    notes: list[Mapping[str, Note]] = []
    for rows, result in zip(shares, results, strict=True):
        if result is not None:
            notes.append(result.notes)
            outcomes = zip(result.weights, result.losses, result.baseline_losses, strict=True)
            for cut, outcome in zip(rows, outcomes, strict=True):
                pieces[cut.layer].append(outcome)
    return LayerResult(
        tuple(_stacked([weight for weight, _, _ in layer]) for layer in pieces),
        tuple(sum(loss for _, loss, _ in layer) for layer in pieces),
        tuple(sum(baseline for _, _, baseline in layer) for layer in pieces),
        _merged(notes),
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


def _merged(notes: Sequence[Mapping[str, Note]]) -> dict[str, Note]:
    merged = dict(notes[0]) if notes else {}
    for name in _SUMMED:
        values = [part[name] for part in notes if name in part]
        numbers = [value for value in values if not isinstance(value, str)]
        if numbers:
            merged[name] = sum(numbers)
    return merged
