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

from prismquant.errors import DataError, NumericsError, check_bounds
from prismquant.statistics.hessian import HessianRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Fractions of each column's own diagonal entry among which the held-out tokens choose.
_DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)
# Every so many calls one is held out.
_HELD_OUT = 4


@dataclass(frozen=True)
class Correction:
    """How far weights are corrected for what precedes them.

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


class DriftRecord:
    """Moments of an input and of how far it has drifted from the float model's.

    Calls are dealt to two parts, one of them held out, so that what one suggests can be tried on
    the other.

    Args:
        in_features: Features of the input.
        device: Where to keep the sums.
        name: What errors call the input.
    """

    def __init__(
        self, in_features: int, device: torch.device | str = "cpu", name: str | None = None
    ) -> None:
        self._moments = [HessianRecord(in_features, device, name=name) for _ in range(2)]
        self._drifts = [torch.zeros(in_features, in_features, device=device) for _ in range(2)]
        self._calls = 0
        self._name = name

    def update(self, seen: Tensor, wanted: Tensor, weights: Tensor | None = None) -> None:
        """Take in a batch of tokens.

        Args:
            seen: ``[n, in]``, the input as the layer will see it.
            wanted: ``[n, in]``, what the float model has in its place.
            weights: ``[n]``, what each token counts for; 0 leaves it out.

        Raises:
            NumericsError: A counted token is not finite.
            DataError: The shapes do not fit.
        """
        if seen.shape != wanted.shape:
            raise DataError(
                f"inputs {list(seen.shape)} and {list(wanted.shape)} are not of the same tokens",
                where=self._name,
            )
        part = int(self._calls % _HELD_OUT == _HELD_OUT - 1)
        self._calls += 1
        self._moments[part].update(seen, weights)
        if weights is not None:
            counted = weights != 0
            seen, wanted, weights = seen[counted], wanted[counted], weights[counted]
        drift = wanted.to(torch.float32) - seen.to(torch.float32)
        if weights is not None:
            drift = drift * weights.to(drift).unsqueeze(1)
        self._drifts[part].addmm_(drift.T, seen.to(torch.float32))

    def sum_over(self, add_up: Callable[[Tensor], None]) -> None:
        """Add the tokens that other processes have seen; see :class:`HessianRecord`."""
        for moments, drift in zip(self._moments, self._drifts, strict=True):
            moments.sum_over(add_up)
            add_up(drift)

    @property
    def count(self) -> float:
        """The sum of the weights of all tokens so far."""
        return sum(moments.count for moments in self._moments)

    def hessian(self) -> Tensor:
        """Mean of ``u u^T`` over all tokens, float32 ``[in, in]``; see :class:`HessianRecord`."""
        whole = HessianRecord.from_state_dict(self._moments[0].state_dict(), self._name)
        whole.merge(self._moments[1])
        return whole.mean()

    def correct(
        self, weights: Sequence[Tensor], how: Correction
    ) -> tuple[tuple[Tensor, ...], dict[str, float | int | str]]:
        """Correct the weights of all layers that read this input.

        Args:
            weights: float32 ``[out_i, in]``.
            how: Strength and damping.

        Returns:
            Corrected weights, and notes: ``correction`` (the mean strength) and
            ``correction_damping``.

        Raises:
            NumericsError: No token was counted, the damped moments cannot be factorized, or what
                comes of them is not finite.
        """
        if not any(moments.count > 0 for moments in self._moments):
            raise NumericsError(
                "no calibration token reached this layer",
                where=self._name,
                remedy="add calibration samples of the modality that passes it",
            )
        joined = torch.cat(list(weights))
        held_out = self._moments[1].count > 0
        damping, strength = how.damping, how.strength
        if (damping is None or strength is None) and held_out:
            rows = [len(weight) for weight in weights]
            damping, strengths = self._choose(joined, rows, how)
        else:
            # One call alone: nothing to test on, so the careful end of each range.
            damping = _DAMPINGS[-1] if damping is None else damping
            strengths = [0.5 if strength is None else strength] * len(weights)
        step = self._step(joined, damping, (0, 1))
        parts = step.split([len(weight) for weight in weights])
        corrected = tuple(
            weight + strength * part
            for weight, strength, part in zip(weights, strengths, parts, strict=True)
        )
        if not all(bool(torch.isfinite(weight).all()) for weight in corrected):
            raise NumericsError(
                "the corrected weights are not finite",
                where=self._name,
                remedy="leave out `correction` for this layer, or raise its damping",
            )
        mean = sum(strengths) / len(strengths)
        return corrected, {"correction": mean, "correction_damping": damping}

    def _choose(
        self, joined: Tensor, rows: Sequence[int], how: Correction
    ) -> tuple[float, list[float]]:
        """The damping, and each layer's strength, that do best on the held-out part."""
        moment = self._moments[1].mean() * self._moments[1].count
        wanted = joined @ self._drifts[1]
        best: tuple[float, float, list[float]] | None = None
        for damping in _DAMPINGS if how.damping is None else (how.damping,):
            step = self._step(joined, damping, (0,))
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
            raise NumericsError("no damping was tried", where=self._name)
        return best[1], best[2]

    def _step(self, weights: Tensor, damping: float, parts: Sequence[int]) -> Tensor:
        """``W D (H + damping)^-1`` of some of the parts, float32 ``[out, in]``."""
        moment = sum(
            (
                self._moments[p].mean().double() * self._moments[p].count
                for p in parts
                if self._moments[p].count > 0
            ),
            torch.zeros((), dtype=torch.float64, device=weights.device),
        )
        drift = sum(
            (self._drifts[p].double() for p in parts),
            torch.zeros((), dtype=torch.float64, device=weights.device),
        )
        diagonal = moment.diagonal()
        # Channels that calibration never excites are not corrected: their moments are all zero.
        floor = diagonal.max().clamp_min(torch.finfo(torch.float32).tiny) * 1e-9
        moment = moment + torch.diag(damping * diagonal + floor)
        image = weights.double() @ drift
        factor, failed = torch.linalg.cholesky_ex(moment)
        if bool(failed):
            raise NumericsError(
                f"the moments of {len(moment)} columns cannot be factorized with damping "
                f"{damping:g}; their diagonal runs from {float(diagonal.min()):.4g} to "
                f"{float(diagonal.max()):.4g}",
                where=self._name,
                remedy="leave out `correction` for this layer, or raise its damping",
            )
        solved = torch.cholesky_solve(image.T, factor)
        return solved.T.to(torch.float32)
