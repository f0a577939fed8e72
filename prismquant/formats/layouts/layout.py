"""What a layout is: how the parts of a quantized weight lie in the tensors of a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.formats.bits import row_slices
from prismquant.numerics.grids import FloatGrid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prismquant.formats.quantized import QuantizedTensor
    from prismquant.formats.spec import NumberSpec
    from prismquant.numerics.kinds import ScaleKind

# Of a number of 8 bits, all but its sign.
_MAGNITUDE = 0x7F


@dataclass(frozen=True)
class Layout(ABC):
    """One way in which a weight lies on disk.

    Attributes:
        name: As configurations call it.
    """

    name: str

    @property
    @abstractmethod
    def scale(self) -> ScaleKind:
        """The kind of scale of weights in this layout (any rule of rounding to it fits)."""

    @abstractmethod
    def akin(self, spec: NumberSpec) -> bool:
        """Whether numbers and scales are of this layout's kinds, whatever their granularity."""

    @abstractmethod
    def refusal(self, spec: NumberSpec) -> tuple[str, str] | None:
        """Why a static format that is akin cannot be held, and a remedy; ``None`` if it can."""

    @abstractmethod
    def pack(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors of a weight, contiguous, by suffix."""

    @abstractmethod
    def unpack(
        self, tensors: Mapping[str, Tensor], spec: NumberSpec, shape: Sequence[int] | None
    ) -> QuantizedTensor:
        """Undo :meth:`pack`."""

    @abstractmethod
    def stored_bytes(
        self, rows: int, columns: int, spec: NumberSpec, scale_dtype: torch.dtype
    ) -> int:
        """Bytes of what :meth:`pack` yields."""

    def holds(self, spec: NumberSpec) -> bool:
        """Whether a static format can be held."""
        return self.akin(spec) and self.refusal(spec) is None

    def check_names(
        self,
        tensors: Mapping[str, Tensor],
        required: set[str],
        optional: set[str],
        spec: NumberSpec,
    ) -> None:
        """Refuse tensors that are missing or unexpected."""
        missing = sorted(required - set(tensors))
        extra = sorted(set(tensors) - required - optional)
        if missing or extra:
            told = [f"lacks {', '.join(missing)}"] * bool(missing)
            told += [f"must not hold {', '.join(extra)}"] * bool(extra)
            raise FormatError(f"a weight of {spec.describe()} in {self.name} {' and '.join(told)}")


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
    """What to say of a tensor that holds NaN or an infinity; None: it is finite.

    Args:
        x: Any shape and dtype; what is not in 16 bits or more of floating point passes.
    """
    if not x.is_floating_point() or x.dtype.itemsize < 2 or x.numel() == 0:
        return None
    # One pass without a copy; NaN comes through.
    if all(bool(end.isfinite()) for end in x.aminmax()):
        return None
    nan, infinite = int(x.isnan().sum()), int(x.isinf().sum())
    told = [f"{nan} NaN"] * bool(nan) + [f"{infinite} infinite"] * bool(infinite)
    return f"holds {' and '.join(told)} of {x.numel()} values"


def scale_fault(scale: Tensor, *, signed: bool) -> str | None:
    """What to say of a scale that no writer means; None: it is one.

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


def check_shape(shape: tuple[int, int], wanted: Sequence[int] | None) -> None:
    """Refuse a weight of another shape than is known from elsewhere."""
    if wanted is not None and tuple(wanted) != shape:
        raise FormatError(f"weight is {list(shape)}, expected {list(wanted)}")


def _check_numbers(codes: Tensor, grid: FloatGrid, spec: NumberSpec, what: str) -> None:
    """Refuse bit patterns that are no finite number: all those above the largest one's."""
    most = int(torch.tensor(grid.largest).to(grid.dtype).view(torch.int8))
    for rows in row_slices(*codes.shape):
        if int((codes[rows] & _MAGNITUDE).amax()) > most:
            bad = (codes[rows] & _MAGNITUDE) > most
            wrong = int(codes[rows][bad][0]) & 0xFF
            raise FormatError(f"{what} is {wrong:#04x}, no finite number of {spec.describe()}")
