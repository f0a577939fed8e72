"""A quantized layer: its weight, the static scales of its input and output, what stays in float.

Solvers' results become these values; writers store them, readers give them back, and the runtime
puts them in a layer's place. They know a layer by its name: what a plan says of it is looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.numerics.affine import dequantize
from prismquant.numerics.grids import FloatGrid
from prismquant.numerics.kinds import Granularity
from prismquant.numerics.scales import ScaleFormat, check_global_scale

if TYPE_CHECKING:
    from prismquant.formats.spec import NumberSpec


# Rows are worked on in pieces of about so many codes: they stay in cache, temporaries stay small.
_PIECE = 1 << 20
# Of a number of 8 bits, all but its sign.
_MAGNITUDE = 0x7F


class StoredWeight(Protocol):
    """A weight as the checkpoint holds it."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values that it stands for, [out, in]."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in codes.

    Attributes:
        codes: int8 ``[out, in]``: whole numbers, or the bit patterns of a floating-point format.
        scale: ``[1]``, ``[out, 1]``, ``[out, G]`` or ``[R, G]`` by granularity: what multiplies the
            points. Float scales as stored; E8M0 as ``torch.float8_e8m0fnu``; for E4M3 the float32
            quotient of block scale and global scale.
        zero_point: int8, shaped like the scale; ``None`` exactly when the format is symmetric.
        spec: The format.
        global_scale: float32 ``[1]``, a divisor; ``None`` exactly when scales are not E4M3.
        group_index: int64 ``[in]``, the group of each input feature; ``None`` where neighbours
            share one.

    Raises:
        FormatError: The parts do not fit one another.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: NumberSpec
    global_scale: Tensor | None = None
    group_index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8 or self.codes.ndim != 2:
            raise FormatError(
                f"codes must be int8 [out, in], not {self.codes.dtype} {list(self.codes.shape)}"
            )
        expected = self.spec.scale_shape(*self.shape)
        if tuple(self.scale.shape) != expected or not self._fits(self.scale.dtype):
            raise FormatError(
                f"the scale of {list(self.shape)} codes in {self.spec.describe()} must be "
                f"{self._wanted} {list(expected)}, not {self.scale.dtype} {list(self.scale.shape)}"
            )
        if (self.zero_point is None) != self.spec.symmetric:
            have = "no zero point" if self.zero_point is None else "a zero point"
            raise FormatError(f"{self.spec.describe()} cannot have {have}")
        if self.zero_point is not None and (
            self.zero_point.dtype != torch.int8 or tuple(self.zero_point.shape) != expected
        ):
            raise FormatError(
                f"the zero point must be int8 {list(expected)}, "
                f"not {self.zero_point.dtype} {list(self.zero_point.shape)}"
            )
        if (self.global_scale is None) == (self.spec.scale == "e4m3"):
            have = "no global scale" if self.global_scale is None else "a global scale"
            raise FormatError(f"{self.spec.describe()} cannot have {have}")
        if self.global_scale is not None:
            check_global_scale(self.global_scale)
            if self.global_scale.dtype != torch.float32 or self.global_scale.ndim != 1:
                raise FormatError(
                    "the global scale must be float32 [1], "
                    f"not {self.global_scale.dtype} {list(self.global_scale.shape)}"
                )
        if self.group_index is not None:
            self._check_index(self.group_index)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight."""
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def scale_format(self) -> ScaleFormat:
        """The form in which scales are stored."""
        return ScaleFormat(self.scale.dtype, self.spec.scale, self.global_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that these codes stand for.

        Args:
            dtype: Dtype of the result; the product is computed in float32 and rounded once.

        Returns:
            ``[out, in]``.
        """
        # Columns of one group side by side.
        order = None if self.group_index is None else self.group_index.argsort(stable=True)
        values = dequantize(
            self.codes if order is None else self.codes[:, order],
            self.scale,
            self.zero_point,
            self.spec.granularity,
            self.spec.group_size,
            dtype,
            self.spec.grid,
        )
        return values if order is None else torch.empty_like(values).index_copy_(1, order, values)

    def _check_index(self, index: Tensor) -> None:
        """Refuse groups that are not as many, and as large, as the format's."""
        columns, size = self.shape[1], self.spec.group_size
        groups = self.scale.shape[-1]
        fits = tuple(index.shape) == (columns,) and index.dtype == torch.int64
        if self.spec.granularity != Granularity.GROUP or not fits:
            raise FormatError(
                f"a group of each of {columns} columns is int64 [{columns}], of a format in "
                f"groups, not {index.dtype} {list(index.shape)} of {self.spec.describe()}"
            )
        inside = bool(((index >= 0) & (index < groups)).all())
        counts = index.clamp(0, max(0, groups - 1)).bincount(minlength=groups)
        if not inside or bool(counts.ne(size or columns).any()):
            raise FormatError(
                f"the index of groups does not give each of {groups} groups {size} columns"
            )

    @property
    def _wanted(self) -> str:
        kinds = {"float": "floating-point", "e4m3": "float32"}
        return kinds.get(self.spec.scale, "float8_e8m0fnu")

    def _fits(self, dtype: torch.dtype) -> bool:
        if self.spec.scale == "e4m3":
            return dtype == torch.float32
        e8m0 = dtype == torch.float8_e8m0fnu
        return dtype.is_floating_point and e8m0 == (self.spec.scale != "float")


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A weight that is stored as the values it stands for.

    Attributes:
        values: [out, in] in the checkpoint's dtype.
    """

    values: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values in ``dtype``."""
        return self.values.to(dtype)


@dataclass(frozen=True, eq=False)
class StaticScale:
    """A scale that calibration found for an input or an output.

    Attributes:
        scale: [1] in the stored dtype; of two-level scales the global one, float32.
        zero_point: int8 [1], or None.
        low, high: The range that was chosen.
    """

    scale: Tensor
    zero_point: Tensor | None
    low: float = 0.0
    high: float = 0.0


def scale_and_zero_point(static: StaticScale | None) -> tuple[Tensor | None, Tensor | None]:
    """Both tensors of a static scale, as quantizers take them; None and None without one."""
    return (None, None) if static is None else (static.scale, static.zero_point)


@dataclass(frozen=True, eq=False)
class OutlierColumns:
    """Columns of a weight, and of its input, that stay in floating point.

    Attributes:
        index: int64 [k].
        weight: [out, k], in the stored dtype.
    """

    index: Tensor
    weight: Tensor

    @staticmethod
    def stored_bytes(columns: int, out_features: int, itemsize: int) -> int:
        """Bytes of so many columns and their int32 indices, in a dtype of ``itemsize`` bytes."""
        return columns * (4 + out_features * itemsize)

    def put_into(self, weight: Tensor) -> Tensor:
        """A copy of a weight [out, in] with these columns in their places."""
        return weight.index_copy(1, self.index, self.weight.to(weight))

    def cut_from(self, weight: Tensor) -> Tensor:
        """A copy of a weight [out, in] with zeros in their places."""
        return weight.index_fill(1, self.index, 0.0)


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer's numbers.

    Attributes:
        name: Its module path.
        weight: Codes and scales, or the dequantized values of a layer that is stored dense.
        input: The static scale of its input, or None.
        output: The static scale of its output, or None.
        outlier_columns: What stays in floating point, or None.
    """

    name: str
    weight: StoredWeight
    input: StaticScale | None = None
    output: StaticScale | None = None
    outlier_columns: OutlierColumns | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight that the layer multiplies with, [out, in]."""
        values = self.weight.dequantize(dtype)
        return values if self.outlier_columns is None else self.outlier_columns.put_into(values)


@dataclass(frozen=True, eq=False)
class KVScales:
    """The scales of one attention layer's keys and values, in the dtype in which they are stored.

    Attributes:
        key: [1], or [kv_heads, 1, 1].
        value: Alike.
    """

    key: Tensor
    value: Tensor

    def to(self, device: torch.device) -> KVScales:
        """The scales on a device."""
        return KVScales(self.key.to(device), self.value.to(device))

    def named(self, tensors: Sequence[str]) -> dict[str, Tensor]:
        """The scales by the names of their two tensors."""
        return dict(zip(tensors, (self.key, self.value), strict=True))


# ------------------------------------------------------------------------------------------ checks


def row_slices(rows: int, columns: int) -> list[slice]:
    """Slices of rows that hold a piece's worth of codes each; none where there are no codes."""
    if rows == 0 or columns == 0:
        return []
    height = max(1, _PIECE // columns)
    return [slice(start, start + height) for start in range(0, rows, height)]


def check_codes(codes: Tensor, spec: NumberSpec, what: str) -> None:
    """Refuse codes that are no points of the format's grid.

    Args:
        codes: int8, two axes.
        spec: The format.
        what: What to call one of them.

    Raises:
        FormatError: One is not.
    """
    if codes.numel() == 0:
        return
    grid = spec.grid
    if isinstance(grid, FloatGrid) and grid.dtype is not None:
        _check_numbers(codes, grid, spec, what)
        return
    low, high = (int(end) for end in codes.aminmax())
    least, most = (0, (1 << grid.bits) - 1)
    if not isinstance(grid, FloatGrid):
        least, most = grid.qmin, grid.qmax
    if low < least or high > most:
        wrong = low if low < least else high
        raise FormatError(f"{what} is {wrong}, outside [{least}, {most}] of {spec.describe()}")


def finite_fault(x: Tensor) -> str | None:
    """A few words on a tensor that holds NaN or an infinity; None: it is finite.

    Args:
        x: Any shape and dtype; what is not in 16 bits or more of floating point passes.
    """
    if not x.is_floating_point() or x.dtype.itemsize < 2 or x.numel() == 0:
        return None
    # One pass without a copy; NaN comes through.
    if all(bool(end.isfinite()) for end in x.aminmax()):
        return None
    nan, infinite = int(x.isnan().sum()), int(x.isinf().sum())
    found = [f"{nan} NaN"] * bool(nan) + [f"{infinite} infinite"] * bool(infinite)
    return f"holds {' and '.join(found)} of {x.numel()} values"


def scale_fault(scale: Tensor, *, signed: bool) -> str | None:
    """A few words on a scale that no writer means; None: it is one.

    Args:
        scale: Any shape; E8M0 in either of its dtypes.
        signed: Whether a scale may be negative, as those of symmetric integers.
    """
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    if scale.dtype.itemsize == 1:
        scale = scale.to(torch.float32)
    if fault := finite_fault(scale):
        return fault
    if scale.numel() == 0:
        return None
    zeros, below = int((scale == 0).sum()), int((scale < 0).sum())
    if zeros:
        return f"is zero in {zeros} of {scale.numel()} places"
    return f"is negative in {below} of {scale.numel()} places" if below and not signed else None


def _check_numbers(codes: Tensor, grid: FloatGrid, spec: NumberSpec, what: str) -> None:
    """Refuse bit patterns that are no finite number: all those above the largest one's."""
    most = int(torch.tensor(grid.largest).to(grid.dtype).view(torch.int8))
    for rows in row_slices(*codes.shape):
        if int((codes[rows] & _MAGNITUDE).amax()) > most:
            bad = (codes[rows] & _MAGNITUDE) > most
            wrong = int(codes[rows][bad][0]) & 0xFF
            raise FormatError(f"{what} is {wrong:#04x}, no finite number of {spec.describe()}")
