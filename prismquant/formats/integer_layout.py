"""Integers in a dense bit stream."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.formats.bits import WORD_BYTES, pack_bits, unpack_bits, words
from prismquant.formats.packed import PACK_QUANTIZED, BitLayout
from prismquant.formats.quantized_layer import QuantizedTensor, check_codes
from prismquant.numerics.kinds import Granularity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prismquant.formats.spec import NumberSpec
    from prismquant.numerics.kinds import ScaleKind


@dataclass(frozen=True)
class PackedIntegers(BitLayout):
    """``weight_packed`` int32 ``[N, ceil(K b / 32)]``, ``weight_scale``, ``weight_shape`` int64
    ``[N, K]``, and for asymmetric formats ``weight_zero_point``, packed alike but down the rows:
    int32 ``[ceil(N b / 32), G]``. Where groups are of columns that are no neighbours,
    ``weight_g_idx`` int32 ``[K]`` says the group of each column.
    """

    @property
    def scale(self) -> ScaleKind:
        """Float."""
        return "float"

    def akin(self, spec: NumberSpec) -> bool:
        """Integers of any width."""
        return spec.kind == "int" and spec.scale == "float"

    def refusal(self, spec: NumberSpec) -> tuple[str, str] | None:
        """Scales lie by rows."""
        if spec.granularity in (Granularity.CHANNEL, Granularity.GROUP):
            return None
        return (
            f"{self.name} weights have channel or group granularity, not {spec.granularity}",
            "use channel or group granularity, or the int-quantized layout for a tensor scale",
        )

    def pack(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """Rows as bit streams."""
        tensors = {
            "weight_packed": pack_bits(q.codes, q.spec.bits),
            "weight_scale": q.scale.contiguous(),
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if q.zero_point is not None:
            check_codes(q.zero_point, q.spec, "a zero point")
            tensors["weight_zero_point"] = pack_bits(q.zero_point.T, q.spec.bits).T.contiguous()
        if q.group_index is not None:
            tensors["weight_g_idx"] = q.group_index.to(torch.int32)
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: NumberSpec, shape: Sequence[int] | None
    ) -> QuantizedTensor:
        """The shape comes from ``weight_shape`` or the caller, who must agree."""
        required = {"weight_packed", "weight_scale"}
        required |= set() if spec.symmetric else {"weight_zero_point"}
        self.check_names(tensors, required, {"weight_shape", "weight_g_idx"}, spec)
        rows, columns = _true_shape(tensors.get("weight_shape"), shape)
        codes = unpack_bits(tensors["weight_packed"], spec.bits, rows, columns)
        zero = None
        if not spec.symmetric:
            groups = spec.scale_shape(rows, columns)[-1]
            packed = tensors["weight_zero_point"]
            zero = unpack_bits(packed.T, spec.bits, groups, rows).T.contiguous()
        index = _group_index(tensors.get("weight_g_idx"), spec)
        return QuantizedTensor(codes, tensors["weight_scale"], zero, spec, group_index=index)

    def stored_bytes(
        self, rows: int, columns: int, spec: NumberSpec, scale_dtype: torch.dtype
    ) -> int:
        """Words, scales, two numbers for the shape, zero points."""
        scales = math.prod(spec.scale_shape(rows, columns))
        size = scales * scale_dtype.itemsize
        size += rows * words(columns, spec.bits) * WORD_BYTES + 2 * torch.int64.itemsize
        if not spec.symmetric:
            size += words(rows, spec.bits) * (scales // max(rows, 1)) * WORD_BYTES
        return size


def _group_index(stored: Tensor | None, spec: NumberSpec) -> Tensor | None:
    """The group of each column; None where neighbours share one, as an index of -1 means too."""
    if stored is None or (stored.numel() and bool((stored == -1).all())):
        return None
    index = stored.to(torch.int64)
    in_order = torch.arange(len(index)) // (spec.group_size or max(1, len(index)))
    return None if torch.equal(index, in_order) else index


def _true_shape(stored: Tensor | None, given: Sequence[int] | None) -> tuple[int, int]:
    """The weight's shape, from the checkpoint or the caller, who must agree."""
    if stored is None and given is None:
        raise FormatError(
            "the shape of a packed weight is unknown", remedy="give weight_shape or shape"
        )
    known = None if stored is None else tuple(int(n) for n in stored)
    wanted = known if given is None else tuple(given)
    if wanted is None or len(wanted) != 2 or known not in (None, wanted):
        raise FormatError(
            f"weight_shape is {None if known is None else list(known)}, the weight is "
            f"{None if wanted is None else list(wanted)}",
            remedy="correct weight_shape, or export the layer again",
        )
    return (wanted[0], wanted[1])


HELD = (PackedIntegers(PACK_QUANTIZED),)
