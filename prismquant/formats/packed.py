"""Bit layouts: quantized weights as the tensors of a compressed-tensors checkpoint, and back.

The layouts of the compressed-tensors format (version 0.18 and newer; ``mxfp6`` 0.20) are written,
bit for bit:

========================  ==============================  ====================================
``pack-quantized``        integers, 2 to 8 bits           a bit stream of 32-bit words
``int-quantized``         symmetric integers              int8
``float-quantized``       E4M3                            float8_e4m3fn
``naive-quantized``       E4M3, input in floating point   the same
``nvfp4-pack-quantized``  E2M1, groups of 16              two codes a byte, E4M3 scales, a
                                                          global scale
``mxfp4-pack-quantized``  E2M1, groups of 32              two codes a byte, E8M0 scales
``mxfp6-pack-quantized``  E2M3, groups of 32              four codes in three bytes, E8M0
``mxfp8-quantized``       E4M3, groups of 32              float8_e4m3fn, E8M0 scales
========================  ==============================  ====================================

E5M2 and E3M2 weights, MXINT8, and E2M1 with float scales have no layout: they are stored
dequantized. Packing loses nothing: :func:`unpack` of :func:`pack` gives the codes, scales and zero
points again.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError, suggest
from prismquant.formats.bits import pack_bits, unpack_bits
from prismquant.formats.layouts import (
    FLOAT_QUANTIZED,
    INT_QUANTIZED,
    MXFP4_PACK_QUANTIZED,
    MXFP6_PACK_QUANTIZED,
    MXFP8_QUANTIZED,
    NAIVE_QUANTIZED,
    NVFP4_PACK_QUANTIZED,
    PACK_QUANTIZED,
    TABLE,
)
from prismquant.formats.layouts.layout import check_codes, finite_fault, scale_fault
from prismquant.formats.quantized import QuantizedTensor
from prismquant.numerics.kinds import FloatKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismquant.formats.spec import Kind, NumberSpec
    from prismquant.numerics.kinds import ScaleKind

__all__ = [
    "FLOAT_QUANTIZED",
    "INT_QUANTIZED",
    "LAYOUTS",
    "MXFP4_PACK_QUANTIZED",
    "MXFP6_PACK_QUANTIZED",
    "MXFP8_QUANTIZED",
    "NAIVE_QUANTIZED",
    "NVFP4_PACK_QUANTIZED",
    "PACK_QUANTIZED",
    "QuantizedTensor",
    "check_declarable",
    "check_layout",
    "declared_kind",
    "finite_fault",
    "layout_scale",
    "layouts_for",
    "pack",
    "pack_bits",
    "scale_fault",
    "stored_bytes",
    "unpack",
    "unpack_bits",
]

LAYOUTS: tuple[str, ...] = tuple(TABLE)

# What a configuration means by a floating-point number of so many bits.
_DECLARED_FLOATS: Mapping[int, FloatKind] = MappingProxyType({8: "e4m3", 6: "e2m3", 4: "e2m1"})


def pack(q: QuantizedTensor, layout: str) -> dict[str, Tensor]:
    """Lay a quantized weight out as the tensors of a checkpoint.

    Args:
        q: The weight.
        layout: One of :data:`LAYOUTS`.

    Returns:
        Contiguous tensors by the suffix of their name on disk.

    Raises:
        FormatError: The layout is unknown, cannot hold this format, or a code, zero point or scale
            is none of the format's.
    """
    check_layout(q.spec, layout)
    check_codes(q.codes, q.spec, "a code")
    return TABLE[layout].pack(q)


def unpack(
    tensors: Mapping[str, Tensor],
    spec: NumberSpec,
    layout: str,
    shape: Sequence[int] | None = None,
) -> QuantizedTensor:
    """Read a quantized weight from the tensors of a checkpoint.

    Args:
        tensors: What :func:`pack` returned, by suffix. ``weight_shape`` may be missing when
            ``shape`` is given. E8M0 scales may have either dtype, global scales any value.
        spec: The format.
        layout: One of :data:`LAYOUTS`.
        shape: ``(out, in)``, when it is known from elsewhere.

    Returns:
        The weight.

    Raises:
        FormatError: A tensor is missing, unexpected, or not of the dtype or shape that the format
            and the layout demand; a code is none of the format's, or a scale is NaN, infinite or
            zero, or negative where the format is not of symmetric integers.
    """
    check_layout(spec, layout)
    q = TABLE[layout].unpack(tensors, spec, shape)
    check_codes(q.codes, spec, "a code")
    if fault := scale_fault(q.scale, signed=spec.kind == "int" and spec.symmetric):
        raise FormatError(
            f"the scale of a weight {fault}", remedy="quantize again, or copy the file again"
        )
    return q


def stored_bytes(
    shape: Sequence[int], spec: NumberSpec, layout: str, scale_dtype: torch.dtype
) -> int:
    """Bytes of the tensors that :func:`pack` would yield.

    Args:
        shape: ``(out, in)`` of the weight.
        spec: The format.
        layout: One of :data:`LAYOUTS`.
        scale_dtype: Dtype of a float scale; other kinds do not look at it.

    Returns:
        The size of the data, exactly; headers are not counted.

    Raises:
        FormatError: The layout cannot hold the format, or the group size does not divide.
    """
    check_layout(spec, layout)
    rows, columns = shape
    return TABLE[layout].stored_bytes(rows, columns, spec, scale_dtype)


def check_layout(spec: NumberSpec, layout: str) -> None:
    """Make sure that a layout can hold a format.

    Args:
        spec: The format of a weight.
        layout: One of :data:`LAYOUTS`.

    Raises:
        FormatError: It cannot, or there is no such layout; the error says what would.
    """
    if layout not in TABLE:
        raise FormatError(f"there is no layout {layout!r}", remedy=suggest(layout, LAYOUTS))
    if spec.dynamic:
        raise FormatError(
            f"{spec.describe()} is a format of activations and cannot be stored",
            remedy="use a static format for weights",
        )
    chosen = TABLE[layout]
    if chosen.akin(spec):
        refusal = chosen.refusal(spec)
        if refusal is not None:
            raise FormatError(refusal[0], remedy=refusal[1])
        return
    fitting = layouts_for(spec)
    if not fitting:
        raise FormatError(
            f"no layout of the compressed-tensors format holds {spec.describe()} weights",
            remedy="store them dense (dequantized), or use integers, fp8 (E4M3), nvfp4 or mxfp4",
        )
    raise FormatError(
        f"{layout} weights cannot be {spec.describe()}",
        remedy=f"use the layout {' or '.join(fitting)}",
    )


def layouts_for(spec: NumberSpec) -> tuple[str, ...]:
    """The layouts that can hold a format of weights; none means that it is stored dequantized.

    Args:
        spec: The format.

    Returns:
        Names, in the order of :data:`LAYOUTS`.
    """
    if spec.dynamic:
        return ()
    return tuple(name for name, layout in TABLE.items() if layout.holds(spec))


def layout_scale(layout: str) -> ScaleKind:
    """The kind of scale that weights of a layout have.

    Args:
        layout: One of :data:`LAYOUTS`.

    Returns:
        ``float``, ``e4m3`` or ``e8m0`` (whichever rule rounded to it).

    Raises:
        FormatError: There is no such layout.
    """
    if layout not in TABLE:
        raise FormatError(f"there is no layout {layout!r}", remedy=suggest(layout, LAYOUTS))
    return TABLE[layout].scale


def check_declarable(spec: NumberSpec) -> None:
    """Make sure that a checkpoint's configuration can say that numbers have this format.

    Args:
        spec: The format of a weight or an activation.

    Raises:
        FormatError: The compressed-tensors format has no word for it.
    """
    mx_integers = spec.kind == "int" and spec.scale != "float"
    if spec.kind in ("e5m2", "e3m2") or mx_integers:
        raise FormatError(
            f"the compressed-tensors format cannot declare {spec.describe()}",
            remedy="use integers, fp8 (E4M3), nvfp4, mxfp4, mxfp6 (E2M3) or mxfp8 (E4M3)",
        )


def declared_kind(number_type: str, bits: int | None) -> Kind:
    """The kind of number that a configuration means.

    Args:
        number_type: ``int`` or ``float``.
        bits: Width of a code, as far as it is given.

    Returns:
        The kind, as of :class:`prismquant.formats.spec.NumberSpec`.

    Raises:
        FormatError: It is neither an integer nor one of the floating-point layouts.
    """
    if number_type == "int":
        return "int"
    if number_type == "float" and bits is not None and bits in _DECLARED_FLOATS:
        return _DECLARED_FLOATS[bits]
    raise FormatError(
        f"numbers of type {number_type!r} and {bits} bits cannot be read",
        remedy="only int, and float of 8 bits (E4M3), 6 bits (E2M3) or 4 bits (E2M1), are known",
    )
