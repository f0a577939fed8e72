"""Rounding to nearest: the baseline, and all that 8-bit weights need.

Each weight takes the code nearest to it, independently of all others, so the only choice is that of
the scales. The invariant: codes are ``quantize(W)`` with the stored scales, nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from prismquant.algorithms.base import (
    LayerProblem,
    LayerResult,
    Note,
    choose_scales,
    decode,
    nearest_codes,
    row_losses,
)
from prismquant.errors import NumericsError
from prismquant.formats.packed import QuantizedTensor


@dataclass(frozen=True)
class RTN:
    """Rounds to nearest.

    Attributes:
        scale_weighting: What an error in a column costs while the ``mse`` rule searches: the same
            everywhere (``none``), or the column's entry in the diagonal of the Hessian
            (``diagonal``), which is exact for rounding to nearest as far as its errors are
            uncorrelated, and needs calibration.
    """

    name: ClassVar[str] = "rtn"

    scale_weighting: Literal["none", "diagonal"] = "none"

    @property
    def needs_hessian(self) -> bool:
        """Only when scales are weighed with its diagonal."""
        return self.scale_weighting == "diagonal"

    def solve(self, problem: LayerProblem) -> LayerResult:
        """Round every layer to nearest.

        Args:
            problem: The layers. A Hessian, where there is one, measures the loss.

        Returns:
            Codes and losses; the baseline is the result itself.

        Raises:
            NumericsError: The weighting needs a Hessian and there is none.
            RecipeError: The range rule is not one for weights.
        """
        importance = None
        if self.needs_hessian:
            if problem.hessian is None:
                raise NumericsError(
                    "scales cannot be weighed without calibration data",
                    where=problem.title,
                    remedy="add calibration data that reaches it, or set scale_weighting: none",
                )
            importance = problem.hessian.diagonal()
        notes: dict[str, Note] = {"scale_weighting": self.scale_weighting}
        weights, losses = [], []
        for weight, scales in zip(problem.weights, choose_scales(problem, importance), strict=True):
            codes = nearest_codes(weight, scales, problem.spec)
            error = weight - decode(codes, scales, problem.spec)
            losses.append(float(row_losses(error, problem.hessian).sum()))
            weights.append(QuantizedTensor(codes, scales.scale, scales.zero_point, problem.spec))
        return LayerResult(tuple(weights), tuple(losses), tuple(losses), notes)
