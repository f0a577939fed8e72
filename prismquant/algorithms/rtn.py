"""Rounding to nearest: the baseline, and all that 8-bit weights need.

Each weight takes the code nearest to it, independently of all others, so the only choice is that of
the scales. The invariant: codes are ``quantize(W)`` with the stored scales, nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prismquant.algorithms.base import (
    LayerProblem,
    LayerResult,
    Note,
    Scales,
    choose_scales,
    decode,
    nearest_codes,
    row_losses,
)
from prismquant.errors import NumericsError
from prismquant.numerics.ranges import coupled_weight_scales


@dataclass(frozen=True)
class RTN:
    """Rounds to nearest.

    Attributes:
        scale_weighting: What range rules that search minimise. ``none``: the error of the weight,
            the same everywhere. ``diagonal``: that error times each column's entry in the diagonal
            of the Hessian. ``group``: the error of what each group (or row) puts out, by its block
            of the Hessian; this is the search for clips of AWQ (Lin et al., arXiv 2306.00978,
            section 3.2), exact as far as groups are uncorrelated. The last two need calibration.
    """

    name: ClassVar[str] = "rtn"

    scale_weighting: Literal["none", "diagonal", "group"] = "none"

    @property
    def needs_hessian(self) -> bool:
        """Only when scales are weighed with it."""
        return self.scale_weighting != "none"

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
        notes: dict[str, Note] = {"scale_weighting": self.scale_weighting}
        weights, losses = [], []
        for weight, scales in zip(problem.weights, self._scales(problem), strict=True):
            codes = nearest_codes(weight, scales, problem.spec)
            error = weight - decode(codes, scales, problem.spec)
            losses.append(float(row_losses(error, problem.hessian).sum()))
            weights.append(scales.quantized(codes, problem.spec))
        return LayerResult(tuple(weights), tuple(losses), tuple(losses), notes)

    def _scales(self, problem: LayerProblem) -> tuple[Scales, ...]:
        if self.scale_weighting == "none":
            return choose_scales(problem)
        if problem.hessian is None:
            raise NumericsError(
                "scales cannot be weighed without calibration data",
                where=problem.title,
                remedy="add calibration data that reaches it, or set scale_weighting: none",
            )
        if self.scale_weighting == "diagonal":
            return choose_scales(problem, problem.hessian.diagonal())
        return _coupled_scales(problem, problem.hessian)


def _coupled_scales(problem: LayerProblem, hessian: Tensor) -> tuple[Scales, ...]:
    """Scales that a search finds with each group's block of the Hessian."""
    spec, diagonal, form = problem.spec, hessian.diagonal(), problem.scale_format
    live = diagonal > 0
    if bool(live.any()) and not bool(live.all()):
        # Dead columns have no cost of their own but are rounded with the same scales.
        hessian = hessian + torch.diag(torch.where(live, 0.0, diagonal[live].min()))
    return tuple(
        Scales(
            *coupled_weight_scales(
                weight,
                spec.grid,
                spec.symmetric,
                spec.granularity,
                spec.group_size,
                problem.range_rule,
                form,
                hessian,
            ),
            form.global_scale,
        )
        for weight in problem.weights
    )
