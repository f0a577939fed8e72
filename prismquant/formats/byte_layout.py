"""A byte for each code: int8 and E4M3 with float scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.formats.packed import (
    FLOAT_QUANTIZED,
    INT_QUANTIZED,
    NAIVE_QUANTIZED,
    BitLayout,
    check_shape,
)
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.numerics.kinds import Granularity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prismquant.formats.spec import Kind, NumberSpec
    from prismquant.numerics.kinds import ScaleKind


@dataclass(frozen=True)
class PlainBytes(BitLayout):
    """``weight`` ``[N, K]`` in a dtype of 8 bits, and ``weight_scale``.

    Attributes:
        kind: Of the numbers.
        dtype: Of the weight on disk.
        blocks: Whether scales may be of blocks.
    """

    kind: Kind
    dtype: torch.dtype
    blocks: bool

    @property
    def scale(self) -> ScaleKind:
        """Float."""
        return "float"

    def akin(self, spec: NumberSpec) -> bool:
        """Numbers of the kind, whatever their width."""
        return spec.kind == self.kind and spec.scale == "float"

    def refusal(self, spec: NumberSpec) -> tuple[str, str] | None:
        """There is no place for zero points."""
        if not spec.symmetric:
            return (
                f"{self.name} weights are symmetric, {spec.describe()} is not",
                "use a symmetric format or the pack-quantized layout",
            )
        if spec.granularity == Granularity.BLOCK and not self.blocks:
            return (
                f"{self.name} weights cannot have block granularity",
                "use tensor, channel or group granularity",
            )
        return None

    def pack(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """Codes are the bytes."""
        weight = q.codes.contiguous().view(self.dtype)
        return {"weight": weight, "weight_scale": q.scale.contiguous()}

    def suffixes(self, spec: NumberSpec) -> tuple[frozenset[str], frozenset[str]]:
        """Bytes and scales."""
        return frozenset(["weight", "weight_scale"]), frozenset()

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: NumberSpec, shape: Sequence[int] | None
    ) -> QuantizedTensor:
        """Bytes are the codes."""
        self.check_names(tensors, spec)
        stored = tensors["weight"]
        if stored.dtype != self.dtype:
            raise FormatError(f"{self.name} weights are {self.dtype}, not {stored.dtype}")
        scale = tensors["weight_scale"]
        if stored.ndim == 2:
            check_shape((stored.shape[0], stored.shape[1]), shape)
            # Some tools write the scale of a tensor, or of rows, with an axis less or more.
            wanted = spec.scale_shape(stored.shape[0], stored.shape[1])
            unit = spec.granularity in (Granularity.TENSOR, Granularity.CHANNEL)
            if unit and scale.numel() == math.prod(wanted):
                scale = scale.reshape(wanted)
        return QuantizedTensor(stored.view(torch.int8), scale, None, spec)

    def stored_bytes(
        self, rows: int, columns: int, spec: NumberSpec, scale_dtype: torch.dtype
    ) -> int:
        """Codes and scales."""
        return rows * columns + math.prod(spec.scale_shape(rows, columns)) * scale_dtype.itemsize


HELD = (
    PlainBytes(INT_QUANTIZED, "int", torch.int8, blocks=False),
    PlainBytes(FLOAT_QUANTIZED, "e4m3", torch.float8_e4m3fn, blocks=True),
    PlainBytes(NAIVE_QUANTIZED, "e4m3", torch.float8_e4m3fn, blocks=True),
)
