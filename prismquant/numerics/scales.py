"""Scales that are themselves stored in few bits, and how a wanted scale becomes a stored one.

A scale is rounded to what can be stored *before* codes are chosen, so that what is simulated is
what is stored. A :class:`ScaleFormat` says what can be stored:

``float``
    A float32, bfloat16 or float16 number.
``e8m0``, ``e8m0-floor``, ``e8m0-ceil``
    A power of two (OCP Microscaling formats, section 5.4), in memory ``torch.float8_e8m0fnu``. The
    three differ in the power that they choose for a largest magnitude ``m 2^e`` with ``m`` in
    [1, 2). *floor* takes the exponent of the magnitude, less that of the largest element (OCP,
    section 6.3): the elements saturate where ``m`` exceeds the mantissa of the largest one. *ceil*
    takes the least power with which nothing saturates, as NVIDIA's tools do. The plain one is
    floor after ``m`` has been rounded to the element's mantissa, the rule of compressed-tensors.
``e4m3``
    Two levels (NVFP4): an E4M3 number for each block over one float32 *global scale* for the
    tensor. In memory it is the float32 quotient of the two, which is what multiplies the elements.
    The global scale is a divisor. Those that are chosen here are powers of two, so that division by
    one and multiplication by its reciprocal give the same bits.

Stored scales are positive normal numbers (the first kind may be given a sign afterwards).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError, suggest
from prismquant.numerics.grids import FloatGrid
from prismquant.numerics.kinds import SCALE_KINDS, ScaleKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismquant.numerics.grids import Grid

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

E4M3_LEAST, E4M3_MOST = 2.0**-9, 448.0
# Four-over-six scales a block to its largest magnitude over 4 instead of 6, half as much again; so
# it leaves that much headroom (and E4M3 has 384 = 1.5 * 256).
E4M3_MOST_4_OVER_6 = 256.0
# Beyond these, products with block scales would leave the normal numbers of float32.
_GLOBAL_EXPONENTS = (-116, 100)
_EXPONENT_BIAS = 127
_LEAST_EXPONENT, _MOST_EXPONENT = -126, 127
_TOP_E4M3_CODE = 0x7E


@dataclass(frozen=True, eq=False)
class ScaleFormat:
    """Storage format of scales.

    Attributes:
        dtype: Dtype of a ``float`` scale; the other kinds do not look at it.
        kind: What a scale is, see the module.
        global_scale: Of an ``e4m3`` scale the second level, a divisor: float32, one element.

    Raises:
        FormatError: The parts do not fit one another.
    """

    dtype: torch.dtype
    kind: ScaleKind = "float"
    global_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCALE_KINDS:
            raise FormatError(
                f"there is no kind of scale {self.kind!r}",
                remedy=suggest(str(self.kind), SCALE_KINDS),
            )
        if self.kind == "float" and self.dtype not in SCALE_DTYPES:
            raise FormatError(
                f"a scale cannot be stored as {self.dtype}",
                remedy="use float32, bfloat16 or float16",
            )
        if (self.global_scale is None) == (self.kind == "e4m3"):
            have = "no global scale" if self.global_scale is None else "a global scale"
            raise FormatError(
                f"scales of the kind {self.kind} cannot have {have}",
                remedy="exactly e4m3 scales need one, from calibration or the largest weight",
            )
        if self.global_scale is not None:
            check_global_scale(self.global_scale)

    @property
    def memory_dtype(self) -> torch.dtype:
        """Dtype in which scales are kept in memory."""
        if self.kind == "float":
            return self.dtype
        return torch.float32 if self.kind == "e4m3" else torch.float8_e8m0fnu

    @property
    def coded(self) -> bool:
        """Whether there are so few scales that each one can be tried."""
        return self.kind != "float"

    def of_magnitude(self, magnitude: Tensor, grid: Grid) -> Tensor:
        """The stored scales that cover largest magnitudes.

        Args:
            magnitude: Not negative, finite, any shape; zero where there is nothing to cover.
            grid: The points of the elements.

        Returns:
            The scales in :attr:`memory_dtype`, shaped like ``magnitude``. One of an empty range is
            a scale like any other.
        """
        magnitude = magnitude.to(torch.float32)
        if self.kind in ("float", "e4m3"):
            return self.stored(magnitude / grid.span, grid)
        exponent = self._exponent(magnitude, grid)
        return _e8m0(torch.where(magnitude == 0, 0, exponent), grid)

    def stored(self, scale: Tensor, grid: Grid) -> Tensor:
        """Wanted scales, rounded to stored ones.

        A power of two hangs on the magnitude to the last bit, which a quotient has lost: where it
        is at hand, :meth:`of_magnitude` is the exact way.

        Args:
            scale: Largest magnitudes over the grid's span, float32, not negative, finite.
            grid: The points of the elements.

        Returns:
            The scales in :attr:`memory_dtype`, clamped to what it can express.
        """
        if self.kind == "float":
            limits = torch.finfo(self.dtype)
            scale = torch.where(scale == 0, 1.0, scale.clamp(limits.smallest_normal, limits.max))
            return scale.to(self.dtype)
        if self.kind == "e4m3":
            divisor = self._divisor(scale)
            level = torch.where(scale == 0, 1.0, (scale * divisor).clamp(E4M3_LEAST, E4M3_MOST))
            return level.to(torch.float8_e4m3fn).to(torch.float32) / divisor
        limit = torch.finfo(torch.float32).max
        return self.of_magnitude((scale * grid.span).clamp(max=limit), grid)

    def nearest(self, scale: Tensor, grid: Grid) -> Tensor:
        """The stored scales nearest to given ones: a stored scale stays as it is.

        Args:
            scale: float32, finite, not zero; a sign is kept where scales may have one.
            grid: The points of the elements.

        Returns:
            The scales as float32; :meth:`kept` brings them to :attr:`memory_dtype`.
        """
        if self.kind == "float":
            return self.stored(scale.abs(), grid).to(torch.float32).copysign(scale)
        if self.kind == "e4m3":
            return self.stored(scale.abs(), grid)
        mantissa, exponent = torch.frexp(scale.abs())
        # Halfway between two powers, on the logarithmic scale on which powers are spaced.
        exponent = exponent - (mantissa < math.sqrt(0.5)).to(exponent.dtype)
        return _e8m0(exponent, grid).to(torch.float32)

    def kept(self, scale: Tensor) -> Tensor:
        """Stored scales, given as float32, in :attr:`memory_dtype`: exact."""
        return scale.to(self.memory_dtype)

    def candidates(
        self, magnitude: Tensor, grid: Grid, top: float, bottom: float
    ) -> Sequence[Tensor]:
        """Every stored scale between two factors on the one that covers a magnitude exactly.

        Args:
            magnitude: As for :meth:`of_magnitude`.
            grid: The points of the elements.
            top: The larger factor, at least 1. What is rounded up to a stored scale counts as well.
            bottom: The smaller factor, above 0.

        Returns:
            float32 tensors shaped like ``magnitude``, largest scales first.

        Raises:
            FormatError: Scales are of the kind ``float``.
        """
        magnitude = magnitude.to(torch.float32)
        if self.kind == "float":
            raise FormatError("there are too many float scales to try each")
        if self.kind == "e4m3":
            divisor = self._divisor(magnitude)
            wanted = (magnitude / grid.span * top * divisor).clamp(E4M3_LEAST, E4M3_MOST)
            code = wanted.to(torch.float8_e4m3fn)
            below = code.to(torch.float32) < wanted
            first = code.view(torch.int8).to(torch.int32) + below
            first = first.clamp(max=_TOP_E4M3_CODE)
            # E4M3 has eight numbers for each factor of two.
            count = 8 * math.ceil(math.log2(top / bottom)) + 1
            every = torch.arange(_TOP_E4M3_CODE + 1, dtype=torch.uint8, device=magnitude.device)
            points = every.view(torch.float8_e4m3fn).to(torch.float32) / divisor
            codes = ((first - step).clamp(min=1) for step in range(count))
            return [points.index_select(0, c.flatten()).view(c.shape) for c in codes]
        # A power of two more would only take points away.
        exponent = torch.where(magnitude == 0, 0, _ceil_exponent(magnitude, grid))
        count = math.ceil(math.log2(1 / bottom)) + 1
        return [_e8m0(exponent - step, grid).to(torch.float32) for step in range(count)]

    def levels(self, scale: Tensor) -> Tensor:
        """Stored part of an ``e4m3`` scale, block by block.

        Args:
            scale: Stored scales, float32.

        Returns:
            float8_e4m3fn, shaped like ``scale``.

        Raises:
            FormatError: A scale is none over this global scale, or the kind is another.
        """
        if self.kind != "e4m3":
            raise FormatError(f"scales of the kind {self.kind} have one level")
        divisor = self._divisor(scale)
        level = (scale * divisor).to(torch.float8_e4m3fn)
        if not torch.equal(level.to(torch.float32) / divisor, scale):
            raise FormatError(
                f"there is a scale that is no E4M3 number over the global scale {float(divisor):g}",
                remedy="round scales with the global scale that is stored beside them",
            )
        return level

    def _divisor(self, like: Tensor) -> Tensor:
        if self.global_scale is None:
            raise FormatError("an e4m3 scale needs a global scale")
        return self.global_scale.to(like.device, torch.float32)

    def _exponent(self, magnitude: Tensor, grid: Grid) -> Tensor:
        if self.kind == "e8m0-ceil":
            return _ceil_exponent(magnitude, grid)
        mantissa, exponent = torch.frexp(magnitude)
        exponent = exponent - math.frexp(grid.span)[1]
        if self.kind == "e8m0-floor":
            return exponent
        # Rounding up to the next power of two begins half a step below it; frexp's mantissas lie
        # in [0.5, 1).
        threshold = 1 - 2.0 ** -(_rounding_mantissa(grid) + 2)
        return exponent + (mantissa >= threshold).to(exponent.dtype)


# A dtype stands for float scales of that dtype.
AnyScale = torch.dtype | ScaleFormat


def as_scale_format(scale: AnyScale) -> ScaleFormat:
    """A dtype as the format of float scales; a format as it is.

    Args:
        scale: Either.

    Returns:
        The format.

    Raises:
        FormatError: No scale is stored in this dtype.
    """
    return scale if isinstance(scale, ScaleFormat) else ScaleFormat(scale)


def global_scale(magnitude: Tensor, grid: Grid, most: float = E4M3_MOST) -> Tensor:
    """The divisor that brings a tensor's block scales into E4M3: ``2^floor(log2(most*span/max))``.

    Args:
        magnitude: Largest magnitude of the tensor, one element.
        grid: The points of the elements.
        most: What the largest block scale may become: 448, or 256 for four-over-six.

    Returns:
        float32 ``[1]``, a power of two; 1 for a tensor of zeros.
    """
    mantissa, exponent = torch.frexp(magnitude.detach().to(torch.float32).reshape(1))
    top_mantissa, top_exponent = math.frexp(most * grid.span)
    power = top_exponent - exponent - (mantissa > top_mantissa).to(exponent.dtype)
    power = torch.where(mantissa == 0, 0, power.clamp(*_GLOBAL_EXPONENTS))
    return _power_of_two(power)


def check_global_scale(value: Tensor) -> None:
    """Make sure that something can be a global scale.

    Args:
        value: Any tensor.

    Raises:
        FormatError: It is not one positive finite number.
    """
    if value.numel() != 1 or not value.is_floating_point():
        raise FormatError(
            f"a global scale is one floating-point number, not {value.dtype} {list(value.shape)}"
        )
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise FormatError(
            f"a global scale cannot be {number}", remedy="calibrate it: 0 means none was set"
        )


def _ceil_exponent(magnitude: Tensor, grid: Grid) -> Tensor:
    """The least exponent with which nothing saturates."""
    mantissa, exponent = torch.frexp(magnitude)
    top_mantissa, top_exponent = math.frexp(grid.span)
    return exponent - top_exponent + (mantissa > top_mantissa).to(exponent.dtype)


def _rounding_mantissa(grid: Grid) -> int:
    """To how many bits compressed-tensors rounds a magnitude: for E4M3, those of E2M1."""
    if isinstance(grid, FloatGrid):
        return 1 if grid.kind == "e4m3" else grid.mantissa
    return grid.bits - 2


def _e8m0(exponent: Tensor, grid: Grid) -> Tensor:
    """Powers of two as E8M0, such that both they and the elements times them are float32."""
    most = _MOST_EXPONENT - (math.frexp(grid.span)[1] - 1)
    code = exponent.clamp(_LEAST_EXPONENT, most) + _EXPONENT_BIAS
    return code.to(torch.uint8).view(torch.float8_e8m0fnu)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Exact powers, where pow and exp2 need not be."""
    return ((exponent.to(torch.int32) + _EXPONENT_BIAS) << 23).view(torch.float32)
