"""Rounding to nearest: the baseline, and all that 8-bit weights need.

Each weight takes the code nearest to it, independently of all others, so the only choice is that of
the scales. The invariant: codes are ``quantize(W)`` with the stored scales, nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from prismquant.algorithms.layer_scales import Scales, choose_scales, decode, nearest_codes
from prismquant.algorithms.problem import (
    LayerProblem,
    LayerResult,
    ProblemShape,
    SolvedWeight,
    row_losses,
)
from prismquant.diagnostics.solver_diagnostics import RTNDiagnostics
from prismquant.errors import NumericsError
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.kernels.range_search import weight_scales
from prismquant.numerics.affine import quantize_with_values
from prismquant.numerics.kinds import Granularity, block_rows
from prismquant.numerics.ranges import RangeRule, coupled_weight_scales

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prismquant.algorithms.protocols import Statistic
    from prismquant.diagnostics.solver_diagnostics import SolverDiagnostics
    from prismquant.formats.spec import NumberSpec
    from prismquant.numerics.scales import ScaleFormat

# Weights are rounded in blocks of rows of about so many values: on a CPU they stay in the
# second-level cache from the first pass to the last, and every temporary stays small.
_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 26
_SERIAL_SUM = (1 << 15) - 1


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
    def statistics(self) -> tuple[Statistic, ...]:
        """The Hessian, only when scales are weighed with it."""
        return () if self.scale_weighting == "none" else ("hessian",)

    @property
    def diagnostics(self) -> RTNDiagnostics:
        """Diagnostics of every layer, for the record."""
        return RTNDiagnostics(self.scale_weighting)

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
        if self.scale_weighting == "none" and problem.hessian is None:
            return self._without_data(problem)
        weights, losses = [], []
        for weight, scales in zip(problem.weights, self._scales(problem), strict=True):
            codes = nearest_codes(weight, scales, problem.spec)
            error = weight - decode(codes, scales, problem.spec)
            losses.append(float(row_losses(error, problem.hessian).sum()))
            weights.append(scales.quantized(codes, problem.spec))
        return LayerResult(tuple(weights), tuple(losses), tuple(losses), self.diagnostics)

    def solve_weight(
        self,
        weight: Tensor,
        spec: NumberSpec,
        rule: RangeRule,
        form: ScaleFormat,
        pulse: Callable[[], None] | None = None,
    ) -> SolvedWeight:
        """Round a weight to nearest with scales from its own values, a block of rows at a time.

        The size of the blocks does not change a bit of the result: a scale never spans two of them
        (one of the whole tensor makes a single block), and a row's loss is summed by itself.

        Args:
            weight: ``[out, in]``, any floating dtype; blocks are converted to float32.
            spec: A static format.
            rule: How scales are chosen.
            form: How scales are stored, with the global scale where there is one.
            pulse: Called before every block; what it raises ends the work.

        Returns:
            Codes, scales and the loss.

        Raises:
            NumericsError: The weight is not finite.
            RecipeError: The rule is not one for weights.
            FormatError: The group size does not divide.
        """
        rows, columns = weight.shape
        codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
        losses = torch.empty(rows, dtype=torch.float64, device=weight.device)
        unit = (spec.grid, spec.symmetric, spec.granularity, spec.group_size)
        scales: list[Tensor] = []
        zeros: list[Tensor] = []
        height = _block_height(weight, spec)
        for start in range(0, rows, height):
            if pulse is not None:
                pulse()
            block = weight[start : start + height].to(torch.float32)
            scale, zero = weight_scales(block, *unit, rule, form)
            lines = slice(start, start + len(block))
            codes[lines], values = quantize_with_values(
                block, scale, zero, spec.grid, spec.granularity, spec.group_size
            )
            error = torch.sub(block, values, out=values)
            # Sums are in float64, twice as wide: a part of the block at a time.
            parts = error.split(max(1, height // 2))
            losses[lines] = torch.cat([row_losses(part, None) for part in parts])
            scales.append(scale)
            zeros += [] if zero is None else [zero]
        zero_point = torch.cat(zeros) if zeros else None
        quantized = QuantizedTensor(codes, torch.cat(scales), zero_point, spec, form.global_scale)
        # Sums of fewer numbers are never split among threads, whose count must not matter.
        loss = sum(float(part.sum()) for part in losses.split(_SERIAL_SUM))
        return SolvedWeight(quantized, loss, self.diagnostics)

    def cost(self, shape: ProblemShape) -> float:
        """About how many multiplications a problem takes; a Hessian measures the loss."""
        return float(shape.in_features * shape.rows * (shape.in_features if shape.hessian else 1))

    def peak_bytes(self, shape: ProblemShape) -> int:
        """The weight, its codes, and what is made of both on the way; a Hessian once more."""
        own = 4 * shape.in_features**2 if shape.hessian else 0
        return 3 * 4 * shape.in_features * shape.rows + own

    def merge(self, parts: Sequence[SolverDiagnostics]) -> SolverDiagnostics:
        """Diagnostics of a whole problem; those of any part are those of the whole."""
        return parts[0]

    def _without_data(self, problem: LayerProblem) -> LayerResult:
        """Round all weights; nothing ties rows together, so each block stays in the cache."""
        form = problem.scale_format
        rounded = [
            self.solve_weight(weight, problem.spec, problem.range_rule, form)
            for weight in problem.weights
        ]
        losses = tuple(one.loss for one in rounded)
        return LayerResult(tuple(one.weight for one in rounded), losses, losses, self.diagnostics)

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


def _block_height(weight: Tensor, spec: NumberSpec) -> int:
    """Rows to a block: whole squares where scales are of squares, all of a tensor's."""
    rows, columns = weight.shape
    if spec.granularity == Granularity.TENSOR:
        return rows
    limit = _CPU_BLOCK if weight.device.type == "cpu" else _DEVICE_BLOCK
    # A reduction to a single number is split among threads, and then sums in another order.
    height = max(2, limit // columns)
    if spec.granularity == Granularity.BLOCK and spec.group_size is not None:
        return block_rows(height, spec.group_size) * spec.group_size
    return height


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
