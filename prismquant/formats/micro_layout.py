"""Small groups with scales of 8 bits: NVFP4 and the MX formats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.formats.bit_streams import pack_patterns, pattern_bytes, unpack_patterns
from prismquant.formats.packed import (
    MXFP4_PACK_QUANTIZED,
    MXFP6_PACK_QUANTIZED,
    MXFP8_QUANTIZED,
    NVFP4_PACK_QUANTIZED,
    BitLayout,
    check_shape,
)
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.numerics.kinds import ScaleKind
from prismquant.numerics.scales import check_global_scale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prismquant.formats.spec import Kind, NumberSpec

_NAN_E8M0 = 255


@dataclass(frozen=True)
class MicroScaled(BitLayout):
    """``weight_packed`` uint8 ``[N, K b / 8]`` (numbers of 8 bits: ``weight`` ``[N, K]``) and
    ``weight_scale`` ``[N, G]``: E8M0 as uint8, or float8_e4m3fn with ``weight_global_scale``
    float32 ``[1]``, a divisor.

    Attributes:
        kind: Of the numbers.
        bits: Of a number.
        coded_scale: ``e8m0`` or ``e4m3``.
    """

    kind: Kind
    bits: int
    coded_scale: ScaleKind

    @property
    def scale(self) -> ScaleKind:
        """``e8m0`` or ``e4m3``."""
        return self.coded_scale

    def akin(self, spec: NumberSpec) -> bool:
        """The kind of number with its kind of scale, however that is rounded."""
        return spec.kind == self.kind and spec.scale.partition("-")[0] == self.coded_scale

    def refusal(self, spec: NumberSpec) -> tuple[str, str] | None:
        """All that is akin fits: the scale fixes the group."""
        return None

    def pack(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """Bit patterns, and scales of a byte each."""
        tensors = {self._weight: self._packed(q.codes)}
        if q.global_scale is None:
            scale = q.scale.contiguous()
            return tensors | {"weight_scale": scale.view(torch.uint8)}
        levels = q.scale_format.levels(q.scale).contiguous()
        # Layers that are fused share the global scale in memory; on disk each has its own.
        return tensors | {"weight_scale": levels, "weight_global_scale": q.global_scale.clone()}

    def suffixes(self, spec: NumberSpec) -> tuple[frozenset[str], frozenset[str]]:
        """Patterns and scales, and a scale of all E4M3 scales."""
        above = ["weight_global_scale"] if self.coded_scale == "e4m3" else []
        return frozenset([self._weight, "weight_scale", *above]), frozenset()

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: NumberSpec, shape: Sequence[int] | None
    ) -> QuantizedTensor:
        """Any global scale is read, not only powers of two."""
        self.check_names(tensors, spec)
        codes = self._unpacked(tensors[self._weight])
        check_shape((codes.shape[0], codes.shape[1]), shape)
        stored = tensors["weight_scale"]
        if self.coded_scale == "e4m3":
            scale, divisor = _read_e4m3(stored, tensors["weight_global_scale"])
            return QuantizedTensor(codes, scale, None, spec, divisor)
        return QuantizedTensor(codes, _read_e8m0(stored), None, spec)

    def stored_bytes(
        self, rows: int, columns: int, spec: NumberSpec, scale_dtype: torch.dtype
    ) -> int:
        """Patterns, a byte for each scale, four for a global one."""
        size = rows * pattern_bytes(columns, self.bits)
        size += math.prod(spec.scale_shape(rows, columns))
        return size + (torch.float32.itemsize if self.coded_scale == "e4m3" else 0)

    @property
    def _weight(self) -> str:
        return "weight" if self.bits == 8 else "weight_packed"

    def _packed(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes.contiguous().view(torch.float8_e4m3fn)
        return pack_patterns(codes, self.bits)

    def _unpacked(self, stored: Tensor) -> Tensor:
        if stored.ndim != 2:
            raise FormatError(f"{self.name} weights have two axes, not {list(stored.shape)}")
        if self.bits == 8:
            if stored.dtype != torch.float8_e4m3fn:
                raise FormatError(f"{self.name} weights are float8_e4m3fn, not {stored.dtype}")
            return stored.view(torch.int8)
        rows, width = stored.shape
        return unpack_patterns(stored, self.bits, rows, width * 8 // self.bits)


def _read_e8m0(stored: Tensor) -> Tensor:
    """Exponents as uint8, or as the dtype of their own."""
    if stored.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise FormatError(f"E8M0 scales are uint8 or float8_e8m0fnu, not {stored.dtype}")
    if stored.numel() and bool((stored.view(torch.uint8) == _NAN_E8M0).any()):
        raise FormatError("an E8M0 scale is 255, which is no number")
    return stored.view(torch.float8_e8m0fnu)


def _read_e4m3(stored: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers of the numbers, and the global scale as float32 ``[1]``."""
    if stored.dtype != torch.float8_e4m3fn:
        raise FormatError(f"E4M3 scales are float8_e4m3fn, not {stored.dtype}")
    check_global_scale(divisor)
    divisor = divisor.to(torch.float32).reshape(1)
    scale = stored.to(torch.float32) / divisor.to(stored.device)
    if not bool(scale.isfinite().all()):
        raise FormatError(f"an E4M3 scale over the global scale {float(divisor):g} is not finite")
    return scale, divisor


HELD = (
    MicroScaled(NVFP4_PACK_QUANTIZED, "e2m1", 4, "e4m3"),
    MicroScaled(MXFP4_PACK_QUANTIZED, "e2m1", 4, "e8m0"),
    MicroScaled(MXFP6_PACK_QUANTIZED, "e2m3", 6, "e8m0"),
    MicroScaled(MXFP8_QUANTIZED, "e4m3", 8, "e8m0"),
)
