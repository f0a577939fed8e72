"""In which layout a layer is stored, and how many bytes what belongs to its input takes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from prismquant.formats.packed import (
    FLOAT_QUANTIZED,
    INT_QUANTIZED,
    MXFP4_PACK_QUANTIZED,
    MXFP6_PACK_QUANTIZED,
    MXFP8_QUANTIZED,
    NAIVE_QUANTIZED,
    NVFP4_PACK_QUANTIZED,
    PACK_QUANTIZED,
)
from prismquant.formats.spec import Kind, NumberSpec
from prismquant.numerics.kinds import Granularity

DENSE = "dense"

_MX_LAYOUTS: Mapping[Kind, str] = MappingProxyType(
    {"e2m1": MXFP4_PACK_QUANTIZED, "e2m3": MXFP6_PACK_QUANTIZED, "e4m3": MXFP8_QUANTIZED}
)


def layout_of(weights: NumberSpec, activations: NumberSpec | None) -> str:
    """The layout that servers expect of a format.

    Args:
        weights: The format of the weight.
        activations: That of the input; None: floating point.

    Returns:
        One of :data:`prismquant.formats.packed.LAYOUTS`, or ``dense`` where none can hold it.
    """
    if weights.scale == "e4m3":
        return NVFP4_PACK_QUANTIZED
    if weights.scale != "float":
        return _MX_LAYOUTS.get(weights.kind, DENSE)
    if weights.kind == "e4m3":
        return NAIVE_QUANTIZED if activations is None else FLOAT_QUANTIZED
    if weights.kind != "int":
        return DENSE
    # 8-bit weights with 8-bit inputs as plain int8, all else packed.
    plain = weights.symmetric and not weights.granularity.grouped
    if weights.bits == 8 and plain and activations is not None:
        return INT_QUANTIZED
    return DENSE if weights.granularity is Granularity.BLOCK else PACK_QUANTIZED


def input_bytes(activations: NumberSpec | None, dtype: torch.dtype) -> int:
    """Bytes of the static scale, and zero point, of an input or output.

    Args:
        activations: Its format; None: floating point.
        dtype: Of stored scales, except for global ones, which are float32.
    """
    if activations is None or not activations.calibrated:
        return 0
    if activations.scale == "e4m3":
        return torch.float32.itemsize
    return dtype.itemsize + (0 if activations.symmetric else 1)
