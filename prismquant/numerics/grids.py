"""Grids: the points that a number format can express, in units of the scale, and their codes.

An integer grid holds consecutive whole numbers, and a point is its own code. Integer codes are
always signed, in ``[-2^(b-1), 2^(b-1) - 1]``; an asymmetric format shifts them by a zero point
instead of becoming unsigned, and only the bit layout on disk adds an offset.

A floating-point grid holds sign, exponent and mantissa, so its points lie closer around zero; a
code is the bit pattern. Both kinds round alike: clamp to the outermost points, then go to the
nearest one, ties to the even code. Whatever a grid rounds to, it can write as codes and read again
without loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError, suggest
from prismquant.numerics.kinds import FLOAT_BITS, FLOAT_KINDS, FloatKind, check_bits

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class IntGrid:
    """The integer codes of a signed format.

    Attributes:
        bits: Width of a code, 2 to 8.
        narrow: Leave out the lowest code, so that the grid is symmetric about zero.

    Raises:
        FormatError: ``bits`` is not an integer from 2 to 8.
    """

    bits: int
    narrow: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def qmin(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def levels(self) -> int:
        """Number of codes."""
        return self.qmax - self.qmin + 1

    @property
    def span(self) -> float:
        """Divisor of the largest magnitude for a symmetric scale: half the number of steps."""
        return (self.levels - 1) / 2

    @property
    def headroom(self) -> float:
        """The largest factor on a symmetric range that is worth a trial: there, nothing clips."""
        return self.span / self.qmax

    def round_(self, x: Tensor) -> Tensor:
        """Move values, in units of the scale, to the nearest points: in place, half to even.

        Args:
            x: Floating point, finite, any shape.

        Returns:
            ``x``.
        """
        return x.clamp_(self.qmin, self.qmax).round_()

    def rounded(self, x: Tensor, out: Tensor) -> Tensor:
        """Rounding as :meth:`round_` does, into ``out``, of the dtype and shape of ``x``."""
        return torch.clamp(x, self.qmin, self.qmax, out=out).round_()

    def write(self, points: Tensor, codes: Tensor) -> None:
        """Turn points into codes.

        Args:
            points: What :meth:`round_` returned.
            codes: int8 of the same shape, to be filled.
        """
        codes.copy_(points)

    def read(self, codes: Tensor) -> Tensor:
        """The points that int8 codes stand for, as a new float32 tensor of their shape."""
        return codes.to(torch.float32)


@dataclass(frozen=True)
class _Layout:
    """Bit layout of a floating-point format.

    Attributes:
        mantissa: Bits of the mantissa that are stored.
        lowest: Exponent of the smallest normal number; below it, points keep its spacing.
        highest: Exponent of the largest number.
        largest: The largest number. (E4M3 gives one bit pattern up for NaN, E5M2 its topmost
            exponent for NaN and infinity, the narrower ones none.)
        dtype: The dtype whose memory holds the codes, where torch has one.
    """

    mantissa: int
    lowest: int
    highest: int
    largest: float
    dtype: torch.dtype | None


_LAYOUTS: Mapping[str, _Layout] = MappingProxyType(
    {
        "e4m3": _Layout(3, -6, 8, 448.0, torch.float8_e4m3fn),
        "e5m2": _Layout(2, -14, 15, 57344.0, torch.float8_e5m2),
        "e3m2": _Layout(2, -2, 4, 28.0, None),
        "e2m3": _Layout(3, 0, 2, 7.5, None),
        "e2m1": _Layout(1, 0, 2, 6.0, None),
    }
)

# Of the dtypes that can be rounded: an integer of the same width, the bits of the exponent in it,
# and the width of the mantissa.
_ANATOMY: Mapping[torch.dtype, tuple[torch.dtype, int, int]] = MappingProxyType(
    {
        torch.float32: (torch.int32, 0x7F80_0000, 23),
        torch.float64: (torch.int64, 0x7FF0_0000_0000_0000, 52),
    }
)

_FLOAT32_BIAS = 127


def _magnitudes(layout: _Layout) -> list[float]:
    """Values of the codes without a sign, of a layout that gives none up."""
    size = 1 << layout.mantissa
    subnormal = [i * 2.0 ** (layout.lowest - layout.mantissa) for i in range(size)]
    binades = range(layout.lowest, layout.highest + 1)
    return subnormal + [(1 + i / size) * 2.0**e for e in binades for i in range(size)]


@dataclass(frozen=True)
class FloatGrid:
    """The points of a small floating-point format, symmetric about zero.

    Codes are bit patterns: for 8 bits the byte, for 6 and 4 bits a number from 0 to 63 or 15 whose
    highest bit is the sign. Zero keeps its sign, as it does in a cast.

    Attributes:
        kind: ``e4m3`` and ``e5m2`` (Micikevicius et al., arXiv 2209.05433; OCP 8-bit floating
            point), or ``e3m2``, ``e2m3`` and ``e2m1`` (OCP Microscaling formats, section 5.3).

    Raises:
        FormatError: There is no such format.
    """

    kind: FloatKind

    def __post_init__(self) -> None:
        if self.kind not in FLOAT_KINDS:
            raise FormatError(
                f"there is no floating-point grid {self.kind!r}",
                remedy=suggest(str(self.kind), FLOAT_KINDS),
            )

    @property
    def bits(self) -> int:
        """Width of a code."""
        return FLOAT_BITS[self.kind]

    @property
    def largest(self) -> float:
        """The largest point: 448, 57344, 28, 7.5 or 6."""
        return self._layout.largest

    @property
    def mantissa(self) -> int:
        """Bits of the mantissa that are stored."""
        return self._layout.mantissa

    @property
    def bias(self) -> int:
        """The number that the exponents of codes are counted from."""
        return 1 - self._layout.lowest

    @property
    def smallest_normal(self) -> float:
        """Below it, points keep the spacing that they have from it on."""
        return 2.0**self._layout.lowest

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype whose memory holds the codes; ``None`` where torch has none."""
        return self._layout.dtype

    @property
    def span(self) -> float:
        """Divisor of the largest magnitude for a symmetric scale: the largest point."""
        return self._layout.largest

    @property
    def headroom(self) -> float:
        """The largest factor on a range that is worth a trial.

        Up to there, the largest magnitude moves down through the topmost binade. One binade further
        the points repeat, but for those lost near zero.
        """
        return self._layout.largest / 2.0**self._layout.highest

    def round_(self, x: Tensor) -> Tensor:
        """Move values, in units of the scale, to the nearest points: in place, half to even.

        For 8 bits this is bit for bit what casting clamped float32 values gives.

        Args:
            x: float32 or float64, finite, any shape.

        Returns:
            ``x``.

        Raises:
            FormatError: ``x`` has another dtype.
        """
        if x.dtype not in _ANATOMY:
            raise FormatError(f"only float32 and float64 can be rounded to {self.kind}: {x.dtype}")
        integer, exponent, mantissa = _ANATOMY[x.dtype]
        layout = self._layout
        # As with integers, no gradient comes through.
        values = x.detach().clamp_(-layout.largest, layout.largest)
        # The power of two at or below each value; subnormals share that of the smallest normal.
        power = (values.view(integer) & exponent).view(x.dtype).clamp_(min=2.0**layout.lowest)
        # In the binade of this summand the spacing of x's dtype is that of the grid around x, so
        # that adding it makes the processor round; half of it more keeps x's sign from leaving it.
        power.mul_(1.5 * 2.0 ** (mantissa - layout.mantissa))
        return x.copy_(torch.copysign((values + power).sub_(power), values))

    def rounded(self, x: Tensor, out: Tensor) -> Tensor:
        """Rounding as :meth:`round_` does, into ``out``, of the dtype and shape of ``x``."""
        return self.round_(out.copy_(x))

    def write(self, points: Tensor, codes: Tensor) -> None:
        """Turn points into codes.

        Args:
            points: What :meth:`round_` returned.
            codes: int8 of the same shape, to be filled.
        """
        if self.dtype is not None:
            codes.view(self.dtype).copy_(points)
            return
        layout = self._layout
        magnitude = points.to(torch.float32).abs()
        power = (magnitude.view(torch.int32) & _ANATOMY[torch.float32][1]).view(torch.float32)
        power.clamp_(min=2.0**layout.lowest)
        # How many spacings a point is from zero or the foot of its binade, and which binade: the
        # leading one that normal numbers do not store makes up for the first exponent's zero.
        code = magnitude.div_(power).mul_(2.0**layout.mantissa).to(torch.int32)
        binade = (power.view(torch.int32) >> 23) - (_FLOAT32_BIAS + layout.lowest)
        code += binade << layout.mantissa
        code += torch.signbit(points).to(torch.int32) << (self.bits - 1)
        codes.copy_(code)

    def read(self, codes: Tensor) -> Tensor:
        """The points that int8 codes stand for, as a new float32 tensor of their shape."""
        if self.dtype is not None:
            return codes.view(self.dtype).to(torch.float32)
        points = codes.new_tensor(_magnitudes(self._layout), dtype=torch.float32)
        return torch.cat([points, -points])[codes.to(torch.int32)]

    @property
    def _layout(self) -> _Layout:
        return _LAYOUTS[self.kind]


Grid = IntGrid | FloatGrid


def integer_grid(grid: Grid) -> IntGrid:
    """The same grid, known to be of integers: only those can be shifted by a zero point.

    Args:
        grid: Any grid.

    Returns:
        ``grid``.

    Raises:
        FormatError: It is of floating-point numbers.
    """
    if isinstance(grid, IntGrid):
        return grid
    raise FormatError(
        f"{grid.kind} numbers are symmetric about zero and take no zero point",
        remedy="use a symmetric format, or integers",
    )
