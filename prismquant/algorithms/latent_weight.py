"""Latent weights: numbers that a tuner descends on, in place of a layer's weight.

A latent weight is the float weight plus an offset in steps of the grid, and factors on the range
that the scale covers. What runs in the block is always the dequantized result of rounding them, bit
for bit what is stored; gradients pass the rounding straight through (Bengio et al., arXiv
1308.3432). Before the first step a latent weight rounds to exactly the values, scales and zero
points of the start.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.numerics.affine import quantize, simulate
from prismquant.numerics.grids import IntGrid
from prismquant.numerics.grouping import from_groups, to_groups

if TYPE_CHECKING:
    from prismquant.algorithms.block_problem import BlockLayer
    from prismquant.formats.spec import NumberSpec
    from prismquant.numerics.grids import Grid
    from prismquant.numerics.scales import ScaleFormat

# How far inside its cell, in steps, a latent weight begins whose code is not the nearest one.
_ENTRY_DEPTH = 0.25
# A value further from its code than half a step has been clipped; the rest is rounding noise. On a
# floating-point grid the next step may be twice as long as the one at the weight.
_HALF_STEP = 0.5 + 1e-3
# Factors on ranges stay positive, whatever the learning rate.
LEAST_FACTOR = 0.05


class Trainable(Protocol):
    """A stand-in for a layer's weight that can be descended on."""

    @property
    def name(self) -> str:
        """The layer's name."""
        ...

    def quantized(self) -> QuantizedTensor:
        """The weight that it stands for now, as it would be stored."""
        ...

    def backward(self, gradient: Tensor, quantized: QuantizedTensor) -> None:
        """Turn the gradient of the dequantized weight into one of what is trained.

        Args:
            gradient: Of the loss in the dequantized weight, ``[out, in]``.
            quantized: What :meth:`quantized` gave for it.
        """
        ...


class Latent:
    """Offsets of a layer's weights and factors of its ranges, which the first phase changes.

    The layer's weight, before it is rounded, is ``weight + offset * step``, with the step that the
    grid has at the weight: the scale, on an integer grid. The scale covers the range of the start
    with its ends multiplied by ``low`` and ``high``; a symmetric range has only ``high``.

    Args:
        layer: The layer.

    Attributes:
        layer: The layer.
        offset: In steps, float32 ``[out, in]``; zero where the start is the nearest code.
        low: Factor of the lower end of each range, float32 like the scale; ``None`` if symmetric.
        high: Factor of the upper end of each range, float32 like the scale.
    """

    def __init__(self, layer: BlockLayer) -> None:
        self.layer = layer
        self._spacing, self._half = _spacing(layer)
        self.offset = _entry_offset(layer, self._spacing)
        self.high = torch.ones_like(layer.start.scale, dtype=torch.float32)
        self.low = None if layer.start.zero_point is None else torch.ones_like(self.high)

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors of the ranges: one tensor if symmetric, else two."""
        return (self.high,) if self.low is None else (self.low, self.high)

    def quantized(self) -> QuantizedTensor:
        """Round to what would be stored."""
        spec = self.layer.start.spec
        scale, zero = self._stored()
        step = _spread(scale, self.layer.weight, spec) * self._spacing
        codes = quantize(
            self.layer.weight + self.offset * step,
            scale,
            zero,
            spec.grid,
            spec.granularity,
            spec.group_size,
        )
        return replace(self.layer.start, codes=codes, scale=scale, zero_point=zero)

    def backward(self, gradient: Tensor, quantized: QuantizedTensor) -> None:
        """Pass a gradient straight through the rounding, to ``offset`` and the factors.

        Inside the range, the value follows the offset; it follows the scale by the error of
        rounding (Esser et al., arXiv 1902.08153, section 3.1). Clipped values follow the ends of
        the range alone.

        Args:
            gradient: Of the loss in the dequantized weight, ``[out, in]``.
            quantized: What :meth:`quantized` gave for it.
        """
        spec, weight = quantized.spec, self.layer.weight
        scale = quantized.scale.to(torch.float32)
        step = _spread(scale, weight, spec) * self._spacing
        value = quantized.dequantize()
        distance = weight + self.offset * step - value
        passed = torch.where(distance.abs() <= self._half * step.abs(), gradient, 0.0)
        self.offset.grad = passed * step
        of_scale = _unit_sums(gradient * value - passed * weight, spec) / scale
        of_zero = _unit_sums(passed - gradient, spec) * scale
        factors = [factor.detach().requires_grad_() for factor in self.factors]
        with torch.enable_grad():
            stored, zero = self._ranges(None if self.low is None else factors[0], factors[-1])
            total = (stored * of_scale).sum()
            if zero is not None:
                total = total + (zero * of_zero).sum()
            slopes = torch.autograd.grad(total, factors)
        for factor, slope in zip(self.factors, slopes, strict=True):
            factor.grad = slope

    def limit(self) -> None:
        """Keep the factors positive."""
        for factor in self.factors:
            factor.clamp_(min=LEAST_FACTOR)

    def _stored(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as stored."""
        scale, zero = self._ranges(self.low, self.high)
        grid = self.layer.start.spec.grid
        if zero is not None and isinstance(grid, IntGrid):
            zero = zero.round().clamp(grid.qmin, grid.qmax).to(torch.int8)
        return self.layer.scale_format.kept(scale), zero

    def _ranges(self, low: Tensor | None, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale, rounded as stored, and zero point before rounding, float32 and differentiable."""
        start, form = self.layer.start, self.layer.scale_format
        scale = start.scale.to(torch.float32)
        grid = start.spec.grid
        # Only integer formats have zero points.
        if low is None or start.zero_point is None or not isinstance(grid, IntGrid):
            return _as_stored(scale * high, form, grid), None
        below = start.zero_point.to(torch.float32) - grid.qmin
        share = below / (grid.levels - 1)
        # Written in differences from 1, so that factors of 1 leave the scale as it is.
        wider = (high - 1) * (1 - share) + (low - 1) * share
        stored = _as_stored(scale * (1 + wider), form, grid)
        return stored, grid.qmin + low * below * (scale / stored)


class Scaled:
    """Factors of a layer's scales, which the second phase changes. Codes and zero points stay.

    Args:
        layer: The layer.
        chosen: Its weight so far.

    Attributes:
        factor: Of each scale, float32 like it.
    """

    def __init__(self, layer: BlockLayer, chosen: QuantizedTensor) -> None:
        self._layer = layer
        self._chosen = chosen
        self.factor = torch.ones_like(chosen.scale, dtype=torch.float32)

    @property
    def name(self) -> str:
        """The layer's name."""
        return self._layer.name

    def quantized(self) -> QuantizedTensor:
        """The codes with scales as they would be stored."""
        form = self._layer.scale_format
        moved = self._chosen.scale.to(torch.float32) * self.factor
        scale = form.kept(_as_stored(moved, form, self._chosen.spec.grid))
        return replace(self._chosen, scale=scale)

    def backward(self, gradient: Tensor, quantized: QuantizedTensor) -> None:
        """The exact gradient, but for the rounding of scales to their dtype.

        Args:
            gradient: Of the loss in the dequantized weight, ``[out, in]``.
            quantized: What :meth:`quantized` gave for it.
        """
        slope = _unit_sums(gradient * quantized.dequantize(), quantized.spec)
        self.factor.grad = slope / self.factor


def _spacing(layer: BlockLayer) -> tuple[Tensor | float, float]:
    """The distance of neighbouring points of the grid at each weight, in units of its scale.

    Returns:
        The spacing, ``[out, in]`` or one number; and how many spacings a value that is not clipped
        may be away from its code.
    """
    spec = layer.start.spec
    if isinstance(spec.grid, IntGrid):
        return 1.0, _HALF_STEP
    patterns = torch.arange(1 << spec.grid.bits, dtype=torch.uint8).view(torch.int8)
    points = spec.grid.read(patterns)
    points = points[points.isfinite() & (points >= 0)].unique().to(layer.weight.device)
    magnitude = layer.weight.abs() / _spread(layer.start.scale, layer.weight, spec)
    above = torch.searchsorted(points, magnitude, right=True).clamp_(1, len(points) - 1)
    return points[above] - points[above - 1], 2 * _HALF_STEP


def _entry_offset(layer: BlockLayer, spacing: Tensor | float) -> Tensor:
    """The offset, in steps, from which rounding gives the start.

    Where the start is the nearest code there is none. Elsewhere (GPTQ compensates errors, so many
    codes are not the nearest) the latent weight enters the code's cell from the side of the weight,
    deep enough that one step of descent does not undo the choice.
    """
    start, spec = layer.start, layer.start.spec
    target = start.dequantize()

    def misses(values: Tensor) -> Tensor:
        # Compared as values: a floating-point grid has two codes for zero.
        rounded = simulate(
            values, start.scale, start.zero_point, spec.grid, spec.granularity, spec.group_size
        )
        return rounded != target

    step = _spread(start.scale, layer.weight, spec) * spacing
    gap = (target - layer.weight) / step
    into = gap - gap.sign() * (0.5 - _ENTRY_DEPTH)
    offset = torch.where(misses(layer.weight), into, 0.0)
    # A cell that is narrower than a step on one side is entered to its point.
    return torch.where(misses(layer.weight + offset * step), gap, offset)


def _spread(scale: Tensor, like: Tensor, spec: NumberSpec) -> Tensor:
    """Write a scale out for every weight, float32 ``[out, in]``."""
    groups = to_groups(like, spec.granularity, spec.group_size)
    wide = scale.to(torch.float32).unsqueeze(-1).expand_as(groups)
    return from_groups(wide, like.shape, spec.granularity)


def _unit_sums(x: Tensor, spec: NumberSpec) -> Tensor:
    """Sum over all weights that share one scale: ``[out, in]`` to the scale's shape."""
    return to_groups(x, spec.granularity, spec.group_size).sum(dim=-1)


def _as_stored(scale: Tensor, form: ScaleFormat, grid: Grid) -> Tensor:
    """A float32 scale rounded to what is stored; gradients pass straight through."""
    return form.nearest(scale.detach(), grid) + (scale - scale.detach())
