"""Scales of weights: chosen by the range rule of a problem, and rounding to nearest with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.kernels.range_search import weight_scales
from prismquant.numerics.affine import dequantize, quantize
from prismquant.numerics.kinds import Granularity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismquant.algorithms.problem import LayerProblem
    from prismquant.formats.spec import NumberSpec


@dataclass(frozen=True, eq=False)
class Scales:
    """The stored scale, and zero point, of one layer.

    Attributes:
        scale: As kept in memory: ``[1]``, ``[out, 1]``, ``[out, G]`` or ``[R, G]``.
        zero_point: int8 of the same shape, or ``None``.
        global_scale: float32 ``[1]`` beside E4M3 scales, else ``None``.
    """

    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None = None

    def quantized(self, codes: Tensor, spec: NumberSpec) -> QuantizedTensor:
        """The weight that codes make with these scales."""
        return QuantizedTensor(codes, self.scale, self.zero_point, spec, self.global_scale)


def choose_scales(problem: LayerProblem, importance: Tensor | None = None) -> tuple[Scales, ...]:
    """Choose the scales of every layer by the problem's range rule.

    Args:
        problem: The layers.
        importance: ``[in]``, not negative: what an error in each column costs. Only rules that
            search use it.

    Returns:
        One for each layer.

    Raises:
        RecipeError: The rule is not one for weights.
    """
    spec, form = problem.spec, problem.scale_format
    if importance is not None:
        # Only ratios matter; as they are, the numbers could overflow when they weigh errors.
        importance = importance.to(problem.weights[0].device, torch.float32)
        importance = importance / importance.max().clamp_min(torch.finfo(importance.dtype).tiny)
    return tuple(
        Scales(
            *weight_scales(
                weight,
                spec.grid,
                spec.symmetric,
                spec.granularity,
                spec.group_size,
                problem.range_rule,
                form,
                importance,
            ),
            form.global_scale,
        )
        for weight in problem.weights
    )


def nearest_codes(weight: Tensor, scales: Scales, spec: NumberSpec) -> Tensor:
    """Round every weight to the nearest code.

    Args:
        weight: ``[out, in]``.
        scales: Its scales.
        spec: The format.

    Returns:
        int8 ``[out, in]``.
    """
    return quantize(
        weight, scales.scale, scales.zero_point, spec.grid, spec.granularity, spec.group_size
    )


def decode(codes: Tensor, scales: Scales, spec: NumberSpec) -> Tensor:
    """The values that codes stand for, float32 ``[out, in]``."""
    unit = (spec.granularity, spec.group_size)
    return dequantize(codes, scales.scale, scales.zero_point, *unit, torch.float32, spec.grid)


def scales_by_column(
    scales: Sequence[Scales], rows: Sequence[int], spec: NumberSpec
) -> tuple[Tensor, Tensor | None]:
    """Bring the scales of several layers into the form that a loop over columns reads.

    Args:
        scales: One for each layer.
        rows: Output features of each layer.
        spec: The format.

    Returns:
        Scale and zero point in float32, contiguous ``[G, sum of rows]``; ``G`` is 1 unless the
        granularity is the group or the block. Column ``j`` of a weight belongs to line
        ``j // group_size``.
    """

    def line(part: Tensor, count: int) -> Tensor:
        wide = part.to(torch.float32)
        if spec.granularity == Granularity.TENSOR:
            return wide.expand(1, count)
        if spec.granularity == Granularity.BLOCK and spec.group_size is not None:
            return wide.repeat_interleave(spec.group_size, dim=0)[:count].T
        return wide.T

    def lines(parts: Sequence[Tensor]) -> Tensor:
        wide = [line(part, count) for part, count in zip(parts, rows, strict=True)]
        return torch.cat(wide, dim=1).contiguous()

    zeros = [s.zero_point for s in scales if s.zero_point is not None]
    return lines([s.scale for s in scales]), lines(zeros) if zeros else None


def scale_lines(columns: Tensor, spec: NumberSpec) -> Tensor:
    """Line of the scales that each column uses: that of its group in the original order."""
    if not spec.granularity.grouped or spec.group_size is None:
        return torch.zeros_like(columns)
    return columns // spec.group_size
