"""A weight in codes, with all that is needed to read it: what solvers return and layouts store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.numerics.affine import dequantize
from prismquant.numerics.kinds import Granularity
from prismquant.numerics.scales import ScaleFormat, check_global_scale

if TYPE_CHECKING:
    from prismquant.formats.spec import NumberSpec


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
        """How the scales are stored."""
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
