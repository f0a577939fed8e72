"""Asymmetric calibration: aim at the float model's output, not at that of the quantized prefix.

A layer's input ``u`` comes from layers that are already quantized, and is itself quantized; in the
float model it would be ``f``. The error that matters is measured against ``W f``:

    ||W F - Q U||^2 = ||(Q - W*) U||^2 + const,   W* = W + W (F - U) U^T (U U^T + damping)^-1

so the weights are corrected once and any solver takes it from there: GPTQ on ``W*`` minimizes the
left side. This is QEP (Arai and Ichikawa, arXiv 2504.09629, section 4) with its strength: 0 keeps
``W``, 1 goes all the way. The correction is a regression on the calibration tokens and can overfit;
for ``W + a * P`` the error on tokens that were not used for ``P`` is a parabola in ``a``,

    g(a) = a^2 <P H', P> - 2 a <W D', P>,   D = sum (f - u) u^T,   H = sum u u^T

with the held-out moments ``D'`` and ``H'``, so the best strength of each layer for
a damping is found in closed form, and of several dampings the best is taken. No pass over the data
is needed beyond the moments'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

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

    rough: ClassVar[dict[str, Any]] = {"damping": 0.1}

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
        step = _Regression(drift, joined, (0, 1)).step(damping)
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
    fitted = _Regression(drift, joined, (0,))

    def on_held_out(damping: float) -> tuple[float, list[float]]:
        """Say what is lost there beyond what no correction loses, and the strengths."""
        step = fitted.step(damping)
        gains = (wanted * step).sum(1, dtype=torch.float64).split(list(rows))
        costs = ((step @ moment) * step).sum(1, dtype=torch.float64).split(list(rows))
        strengths, total = [], 0.0
        for gain, cost in zip(gains, costs, strict=True):
            g, c = float(gain.sum()), float(cost.sum())
            free = min(max(g / c, 0.0), 1.0) if c > 0 else 0.0
            strengths.append(free if how.strength is None else how.strength)
            total += strengths[-1] ** 2 * c - 2 * strengths[-1] * g
        return total, strengths

    if how.damping is not None or fitted.is_nothing:
        damping = _DAMPINGS[0] if how.damping is None else how.damping
        return damping, on_held_out(damping)[1]
    # Over the dampings the loss falls and rises once: what comes after a rise need not be tried.
    best = (_DAMPINGS[-1], *on_held_out(_DAMPINGS[-1]))
    for damping in reversed(_DAMPINGS[:-1]):
        total, strengths = on_held_out(damping)
        if total > best[1]:
            break
        best = (damping, total, strengths)
    return best[0], best[2]


class _Regression:
    """Regression of the drift on a layer's input, for several dampings.

    Args:
        drift: Of the input.
        weights: float32 ``[out, in]``.
        parts: Parts of the calls that it is of.
    """

    def __init__(self, drift: Drift, weights: Tensor, parts: Sequence[int]) -> None:
        self._name = drift.name
        zero = torch.zeros((), dtype=torch.float64, device=weights.device)
        seen = [drift.moments[p] for p in parts if drift.moments[p].count > 0]
        self._moment = sum((one.result().double() * one.count for one in seen), zero)
        moved = sum((drift.drifts[p].double() for p in parts), zero)
        self._image = weights.double() @ moved
        self._diagonal = self._moment.diagonal().clone()

    @property
    def is_nothing(self) -> bool:
        """Whether there is no drift at all, as before the first quantized layer."""
        return not bool(self._image.any())

    def step(self, damping: float) -> Tensor:
        """Solve ``W D (H + damping)^-1``, float32 ``[out, in]``.

        Args:
            damping: Fraction of each diagonal entry of ``H`` that is added to it.

        Raises:
            NumericsError: The damped moments cannot be factorized.
        """
        if self.is_nothing:
            return torch.zeros_like(self._image, dtype=torch.float32)
        diagonal = self._diagonal
        # Channels that calibration never excites are not corrected: their moments are all zero.
        floor = diagonal.max().clamp_min(torch.finfo(torch.float32).tiny) * 1e-9
        self._moment.diagonal().copy_(diagonal + (damping * diagonal + floor))
        factor, failed = torch.linalg.cholesky_ex(self._moment)
        if bool(failed):
            raise NumericsError(
                f"the moments of {len(diagonal)} columns cannot be factorized with damping "
                f"{damping:g}; their diagonal runs from {float(diagonal.min()):.4g} to "
                f"{float(diagonal.max()):.4g}",
                where=self._name,
                remedy="leave out `correction` for this layer, or raise its damping",
            )
        solved = torch.cholesky_solve(self._image.T, factor)
        return solved.T.to(torch.float32)
