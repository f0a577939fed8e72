"""Asymmetric calibration: aim at the float model's output, not at that of the quantized prefix.

A layer's input ``u`` comes from layers that are already quantized, and is itself quantized; in the
float model it would be ``f``. The error that matters is measured against ``W f``:

    ||W F - Q U||^2 = ||(Q - W*) U||^2 + const,   W* = W + W (F - U) U^T (U U^T + damping)^-1

so the weights are corrected once and any solver takes it from there: GPTQ on ``W*`` minimizes the
left side. This is QEP (Arai and Ichikawa, arXiv 2504.09629, section 4) with its strength: 0 keeps
``W``, 1 goes all the way. The correction is a regression on the calibration tokens and can overfit;
for ``W + a * P`` the error on tokens that were not used for ``P`` is a parabola in ``a``,

    g(a) = a^2 <P H', P> - 2 a <W D', P>,   D = sum (f - u) u^T,   H = sum u u^T

with the held-out moments ``D'`` and ``H'``, so the best strength of each layer, and the best of
several dampings, are found in closed form. No pass over the data is needed beyond the moments'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.diagnostics.solver_diagnostics import CorrectionDiagnostics
from prismquant.errors import NumericsError, check_bounds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismquant.statistics.drift import Drift

# Fractions of each column's own diagonal entry among which the held-out tokens choose.
_DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Correction:
    """Strength of the correction of weights for what precedes them.

    Attributes:
        strength: From 0 (not at all) to 1 (wholly); ``None`` chooses it for each layer on held-out
            tokens.
        damping: Added to each diagonal entry of the second moments, as a fraction of it; ``None``
            chooses it on held-out tokens.

    Raises:
        RecipeError: A value is out of bounds.
    """

    strength: float | None = None
    damping: float | None = None

    def __post_init__(self) -> None:
        strength, damping = self.strength, self.damping
        bounds = {
            "strength": (strength is None or 0 <= strength <= 1, "from 0 to 1, or left out"),
            "damping": (damping is None or 0 < damping <= 10, "above 0, at most 10, or left out"),
        }
        check_bounds(self, bounds)

    @property
    def idle(self) -> dict[str, str]:
        """Options that change nothing as the others stand, and why."""
        return {"damping": "strength is 0"} if self.strength == 0 else {}

    def correct(
        self, drift: Drift, weights: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], CorrectionDiagnostics]:
        """Correct the weights of all layers that read this input.

        Args:
            drift: Of their input.
            weights: float32 ``[out_i, in]``.

        Returns:
            Corrected weights, and how far they were corrected.

        Raises:
            NumericsError: No token was counted, the damped moments cannot be factorized, or what
                comes of them is not finite.
        """
        if not any(moments.count > 0 for moments in drift.moments):
            raise NumericsError(
                "no calibration token reached this layer",
                where=drift.name,
                remedy="add calibration samples of the modality that passes it",
            )
        joined = torch.cat(list(weights))
        held_out = drift.moments[1].count > 0
        damping, strength = self.damping, self.strength
        if (damping is None or strength is None) and held_out:
            rows = [len(weight) for weight in weights]
            damping, strengths = _choose(drift, joined, rows, self)
        else:
            # One call alone: nothing to test on, so the careful end of each range.
            damping = _DAMPINGS[-1] if damping is None else damping
            strengths = [0.5 if strength is None else strength] * len(weights)
        step = _step(drift, joined, damping, (0, 1))
        parts = step.split([len(weight) for weight in weights])
        corrected = tuple(
            weight + strength * part
            for weight, strength, part in zip(weights, strengths, parts, strict=True)
        )
        if not all(bool(torch.isfinite(weight).all()) for weight in corrected):
            raise NumericsError(
                "the corrected weights are not finite",
                where=drift.name,
                remedy="leave out `correction` for this layer, or raise its damping",
            )
        mean = sum(strengths) / len(strengths)
        return corrected, CorrectionDiagnostics(mean, damping)


def _choose(
    drift: Drift, joined: Tensor, rows: Sequence[int], how: Correction
) -> tuple[float, list[float]]:
    """The damping, and each layer's strength, that do best on the held-out part."""
    moment = drift.moments[1].result() * drift.moments[1].count
    wanted = joined @ drift.drifts[1]
    best: tuple[float, float, list[float]] | None = None
    for damping in _DAMPINGS if how.damping is None else (how.damping,):
        step = _step(drift, joined, damping, (0,))
        gains = (wanted * step).sum(1, dtype=torch.float64).split(list(rows))
        costs = ((step @ moment) * step).sum(1, dtype=torch.float64).split(list(rows))
        strengths, total = [], 0.0
        for gain, cost in zip(gains, costs, strict=True):
            g, c = float(gain.sum()), float(cost.sum())
            free = min(max(g / c, 0.0), 1.0) if c > 0 else 0.0
            strengths.append(free if how.strength is None else how.strength)
            total += strengths[-1] ** 2 * c - 2 * strengths[-1] * g
        if best is None or total < best[0]:
            best = (total, damping, strengths)
    if best is None:  # the tuple of dampings is never empty
        raise NumericsError("no damping was tried", where=drift.name)
    return best[1], best[2]


def _step(drift: Drift, weights: Tensor, damping: float, parts: Sequence[int]) -> Tensor:
    """``W D (H + damping)^-1`` of some of the parts, float32 ``[out, in]``."""
    moment = sum(
        (
            drift.moments[p].result().double() * drift.moments[p].count
            for p in parts
            if drift.moments[p].count > 0
        ),
        torch.zeros((), dtype=torch.float64, device=weights.device),
    )
    moved = sum(
        (drift.drifts[p].double() for p in parts),
        torch.zeros((), dtype=torch.float64, device=weights.device),
    )
    diagonal = moment.diagonal()
    # Channels that calibration never excites are not corrected: their moments are all zero.
    floor = diagonal.max().clamp_min(torch.finfo(torch.float32).tiny) * 1e-9
    moment = moment + torch.diag(damping * diagonal + floor)
    image = weights.double() @ moved
    factor, failed = torch.linalg.cholesky_ex(moment)
    if bool(failed):
        raise NumericsError(
            f"the moments of {len(moment)} columns cannot be factorized with damping "
            f"{damping:g}; their diagonal runs from {float(diagonal.min()):.4g} to "
            f"{float(diagonal.max()):.4g}",
            where=drift.name,
            remedy="leave out `correction` for this layer, or raise its damping",
        )
    solved = torch.cholesky_solve(image.T, factor)
    return solved.T.to(torch.float32)
