"""Scale of a smooth edge: made fit to be folded, found among candidates, and judged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.algorithms.output_error import Trials, output_error
from prismquant.algorithms.smooth_edge import EdgeResult
from prismquant.diagnostics.edge_diagnostics import EdgeDiagnostics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prismquant.algorithms.smooth_edge import EdgeProblem
    from prismquant.diagnostics.edge_diagnostics import Choice

_NO_GAIN = "no scale lowers the error of the outputs"


def foldable_scale(logs: Tensor, live: Tensor, max_scale: float, power_of_two: bool) -> Tensor:
    """Make scales fit to be folded: centred on 1, bounded, and 1 where nothing is known.

    A factor common to all channels changes no rounding, so it is free to choose: the smallest and
    the largest scale become reciprocals of one another (AWQ's ``sqrt(max * min)``).

    Args:
        logs: Binary logarithms of the scales, ``[size]``; anything where ``live`` is false.
        live: Which channels calibration has seen active, bool ``[size]``.
        max_scale: Scales end in ``[1 / max_scale, max_scale]``.
        power_of_two: Round to powers of two, so that folding is exact in floating point.

    Returns:
        float32 ``[size]``.
    """
    result = torch.ones(logs.shape, dtype=torch.float32, device=logs.device)
    chosen = logs[live].to(torch.float64)
    if not len(chosen):
        return result
    bound = math.floor(math.log2(max_scale)) if power_of_two else math.log2(max_scale)
    # First around the median: one stray channel must not push all others to the bound.
    chosen = (chosen - chosen.median()).clamp_(-bound, bound)
    chosen -= (chosen.max() + chosen.min()) / 2
    if power_of_two:
        chosen = chosen.round_()
    result[live] = torch.exp2(chosen).to(torch.float32)
    return result


def best_scale(
    problem: EdgeProblem,
    candidates: Iterable[tuple[Choice, Tensor]],
    rows: int,
) -> EdgeResult:
    """Try scales on some rows, judge the best on all, and keep it only if it lowers the error.

    Args:
        problem: The edge.
        candidates: Scales ``[size]``, each with how it was chosen. Those that are 1 everywhere are
            passed over: no scaling is always a candidate.
        rows: Rows of each consumer that are looked at in the search.

    Returns:
        The scale, or ``None`` where no scaling is better.

    Raises:
        NumericsError: Scaled weights or inputs leave float32.
    """
    trials = Trials(problem, rows)
    moving = [one for one in candidates if not bool((one[1] == 1).all())]
    before, *errors = trials.errors([None, *(scale for _, scale in moving)])
    least, tried = before, len(moving)
    best: tuple[Choice, Tensor] | None = None
    for candidate, error in zip(moving, errors, strict=True):
        if error < least:
            least, best = error, candidate
    if best is None:
        return EdgeResult(None, EdgeDiagnostics(skipped=_NO_GAIN, tried=tried, error_before=before))
    return judge(
        problem,
        best[1],
        best[0],
        tried=tried,
        must_gain=True,
        known=(before, least) if trials.complete else None,
    )


def judge(
    problem: EdgeProblem,
    scale: Tensor,
    choice: Choice,
    *,
    tried: int = 0,
    must_gain: bool,
    known: tuple[float, float] | None = None,
) -> EdgeResult:
    """Measure a scale on all rows, and write down what it does.

    Args:
        problem: The edge.
        scale: ``[size]``. One that is 1 everywhere is an exact no-op, and none.
        choice: How it was chosen.
        tried: Scales that a search has looked at.
        must_gain: Refuse it unless it lowers the error.
        known: The errors without and with it, where they have been measured already.

    Returns:
        The scale, or ``None`` where it is refused.

    Raises:
        NumericsError: Scaled weights or inputs leave float32.
    """
    if bool((scale == 1).all()):
        diagnostics = EdgeDiagnostics(choice, skipped="all scales are one", tried=tried)
        return EdgeResult(None, diagnostics)
    before, after = known or (output_error(problem, None), output_error(problem, scale))
    refused = must_gain and not after < before
    diagnostics = EdgeDiagnostics(
        choice=choice,
        skipped=_NO_GAIN if refused else "",
        tried=tried,
        error_before=before,
        error_after=after,
        smallest_scale=float(scale.min()),
        largest_scale=float(scale.max()),
    )
    return EdgeResult(None if refused else scale, diagnostics)
