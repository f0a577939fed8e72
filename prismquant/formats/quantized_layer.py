"""A quantized layer: its weight, the static scales of its input and output, what stays in float.

Solvers' results become these values; writers store them, readers give them back, and the runtime
puts them in a layer's place. They know a layer by its name: what a plan says of it is looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StoredWeight(Protocol):
    """A weight as the checkpoint holds it."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values that it stands for, [out, in]."""


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
