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

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError, suggest
from prismquant.formats.quantized_layer import QuantizedTensor, check_codes, scale_fault
from prismquant.numerics.kinds import FloatKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prismquant.formats.spec import Kind, NumberSpec
    from prismquant.numerics.kinds import ScaleKind

PACK_QUANTIZED = "pack-quantized"
INT_QUANTIZED = "int-quantized"
FLOAT_QUANTIZED = "float-quantized"
NAIVE_QUANTIZED = "naive-quantized"
NVFP4_PACK_QUANTIZED = "nvfp4-pack-quantized"
MXFP4_PACK_QUANTIZED = "mxfp4-pack-quantized"
MXFP6_PACK_QUANTIZED = "mxfp6-pack-quantized"
MXFP8_QUANTIZED = "mxfp8-quantized"

_MODULES: Mapping[str, str] = MappingProxyType(
    {
        PACK_QUANTIZED: "bit_streams",
        INT_QUANTIZED: "byte_layout",
        FLOAT_QUANTIZED: "byte_layout",
        NAIVE_QUANTIZED: "byte_layout",
        NVFP4_PACK_QUANTIZED: "micro_layout",
        MXFP4_PACK_QUANTIZED: "micro_layout",
        MXFP6_PACK_QUANTIZED: "micro_layout",
        MXFP8_QUANTIZED: "micro_layout",
    }
)
LAYOUTS: tuple[str, ...] = tuple(_MODULES)

# What a configuration means by a floating-point number of so many bits.
_DECLARED_FLOATS: Mapping[int, FloatKind] = MappingProxyType({8: "e4m3", 6: "e2m3", 4: "e2m1"})


@dataclass(frozen=True)
class BitLayout(ABC):
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
        """True if numbers and scales are of this layout's kinds, whatever their granularity."""

    @abstractmethod
    def refusal(self, spec: NumberSpec) -> tuple[str, str] | None:
        """The reason why a format that is akin cannot be held, and a remedy; ``None`` if it can."""

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
        """True if a static format can be held."""
        return self.akin(spec) and self.refusal(spec) is None

    @abstractmethod
    def suffixes(self, spec: NumberSpec) -> tuple[frozenset[str], frozenset[str]]:
        """Suffixes of the tensors that a weight must have in this layout, and those it may have."""

    def check_names(self, tensors: Iterable[str], spec: NumberSpec) -> None:
        """Refuse tensors that are missing or unexpected.

        Args:
            tensors: Their suffixes.
            spec: The format of the weight.

        Raises:
            FormatError: There are such.
        """
        required, optional = self.suffixes(spec)
        missing = sorted(required - set(tensors))
        extra = sorted(set(tensors) - required - optional)
        if missing or extra:
            faults = [f"lacks {', '.join(missing)}"] * bool(missing)
            faults += [f"must not hold {', '.join(extra)}"] * bool(extra)
            what = f"a weight of {spec.describe()} in {self.name}"
            raise FormatError(f"{what} {' and '.join(faults)}")


@functools.cache
def bit_layout(name: str) -> BitLayout:
    """The layout of that name.

    Raises:
        FormatError: There is no such layout.
    """
    if name not in _MODULES:
        raise FormatError(f"there is no layout {name!r}", remedy=suggest(name, LAYOUTS))
    home = importlib.import_module(f"prismquant.formats.{_MODULES[name]}")
    found: dict[str, BitLayout] = {layout.name: layout for layout in home.HELD}
    return found[name]


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
    return bit_layout(layout).pack(q)


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
    q = bit_layout(layout).unpack(tensors, spec, shape)
    check_codes(q.codes, spec, "a code")
    if fault := scale_fault(q.scale, signed=spec.kind == "int" and spec.symmetric):
        raise FormatError(
            f"the scale of a weight {fault}", remedy="quantize again, or copy the file again"
        )
    return q


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight as it lies in a checkpoint.

    Attributes:
        tensors: Its tensors, by the suffix of their names on disk.
        spec: The format.
        layout: One of :data:`~prismquant.formats.packed.LAYOUTS`.
        shape: ``(out, in)``.
    """

    tensors: Mapping[str, Tensor]
    spec: NumberSpec
    layout: str
    shape: tuple[int, int]

    def unpack(self) -> QuantizedTensor:
        """Its codes and scales.

        Raises:
            FormatError: As of :func:`unpack`.
        """
        return unpack(self.tensors, self.spec, self.layout, self.shape)


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
    return bit_layout(layout).stored_bytes(rows, columns, spec, scale_dtype)


def check_layout(spec: NumberSpec, layout: str) -> None:
    """Make sure that a layout can hold a format.

    Args:
        spec: The format of a weight.
        layout: One of :data:`LAYOUTS`.

    Raises:
        FormatError: It cannot, or there is no such layout; the error says what would.
    """
    chosen = bit_layout(layout)
    if spec.dynamic:
        raise FormatError(
            f"{spec.describe()} is a format of activations and cannot be stored",
            remedy="use a static format for weights",
        )
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
    return tuple(name for name in LAYOUTS if bit_layout(name).holds(spec))


def layout_scale(layout: str) -> ScaleKind:
    """The kind of scale that weights of a layout have.

    Args:
        layout: One of :data:`LAYOUTS`.

    Returns:
        ``float``, ``e4m3`` or ``e8m0`` (whichever rule rounded to it).

    Raises:
        FormatError: There is no such layout.
    """
    return bit_layout(layout).scale


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


def is_declarable(spec: NumberSpec) -> bool:
    """True if a checkpoint's configuration can say that an input or output has this format."""
    try:
        check_declarable(spec)
    except FormatError:
        return False
    return True


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


def check_shape(shape: tuple[int, int], wanted: Sequence[int] | None) -> None:
    """Refuse a weight of another shape than is known from elsewhere."""
    if wanted is not None and tuple(wanted) != shape:
        raise FormatError(f"weight is {list(shape)}, expected {list(wanted)}")
