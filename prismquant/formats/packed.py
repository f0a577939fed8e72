"""Bit layouts: quantized weights as the tensors of a compressed-tensors checkpoint, and back.

Three layouts of the compressed-tensors format (version 0.18 and newer) are written, bit for bit:

``pack-quantized``
    ``weight_packed`` int32 ``[N, ceil(K b / 32)]``: each row is a little-endian bit stream of codes
    in offset binary (``code + 2^(b-1)``), element ``i`` at bit ``i b``, its tail filled with zeros.
    ``weight_scale``, ``weight_shape`` int64 ``[N, K]``, and for asymmetric formats
    ``weight_zero_point``, packed alike but down the rows: int32 ``[ceil(N b / 32), G]``.
``int-quantized``
    ``weight`` int8 ``[N, K]`` and ``weight_scale``.
``float-quantized``
    ``weight`` float8_e4m3fn ``[N, K]`` and ``weight_scale``.

Packing loses nothing: :func:`unpack` of :func:`pack` gives the codes, scales and zero points again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError, suggest
from prismquant.numerics.affine import Granularity, dequantize
from prismquant.numerics.grids import FloatGrid, FloatKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismquant.formats.spec import Kind, NumberSpec

PACK_QUANTIZED = "pack-quantized"
INT_QUANTIZED = "int-quantized"
FLOAT_QUANTIZED = "float-quantized"
LAYOUTS = (PACK_QUANTIZED, INT_QUANTIZED, FLOAT_QUANTIZED)

# Layouts that store each code in a byte of its own, and as what.
_PLAIN: Mapping[str, torch.dtype] = MappingProxyType(
    {INT_QUANTIZED: torch.int8, FLOAT_QUANTIZED: torch.float8_e4m3fn}
)

_WORD_BITS = 32
_WORD_BYTES = 4
# What a configuration means by a floating-point number of so many bits.
_DECLARED_FLOATS: Mapping[int, FloatKind] = MappingProxyType({8: "e4m3", 4: "e2m1"})
# Rows are packed in pieces of about so many codes: they stay in cache, and temporaries stay small.
_PIECE = 1 << 20


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in codes, with all that is needed to read it.

    Attributes:
        codes: int8 ``[out, in]``: whole numbers, or the bit patterns of a floating-point format.
        scale: As stored: ``[1]``, ``[out, 1]`` or ``[out, G]`` by granularity.
        zero_point: int8, shaped like the scale; ``None`` exactly when the format is symmetric.
        spec: The format.

    Raises:
        FormatError: The parts do not fit one another.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: NumberSpec

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8 or self.codes.ndim != 2:
            raise FormatError(
                f"codes must be int8 [out, in], not {self.codes.dtype} {list(self.codes.shape)}"
            )
        expected = self.spec.scale_shape(*self.shape)
        if tuple(self.scale.shape) != expected or not self.scale.is_floating_point():
            raise FormatError(
                f"the scale of {list(self.shape)} codes in {self.spec.describe()} must be "
                f"floating-point {list(expected)}, not {self.scale.dtype} {list(self.scale.shape)}"
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

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight."""
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that these codes stand for.

        Args:
            dtype: Dtype of the result; the product is computed in float32 and rounded once.

        Returns:
            ``[out, in]``.
        """
        return dequantize(
            self.codes,
            self.scale,
            self.zero_point,
            self.spec.granularity,
            self.spec.group_size,
            dtype,
            self.spec.grid,
        )


def pack(q: QuantizedTensor, layout: str) -> dict[str, Tensor]:
    """Lay a quantized weight out as the tensors of a checkpoint.

    Args:
        q: The weight.
        layout: One of :data:`LAYOUTS`.

    Returns:
        Contiguous tensors by the suffix of their name on disk.

    Raises:
        FormatError: The layout is unknown, cannot hold this format, or a code or zero point is
            outside the format's grid.
    """
    check_layout(q.spec, layout)
    _check_codes(q.codes, q.spec, "a code")
    scale = q.scale.contiguous()
    if layout != PACK_QUANTIZED:
        return {"weight": q.codes.contiguous().view(_PLAIN[layout]), "weight_scale": scale}
    tensors = {
        "weight_packed": pack_bits(q.codes, q.spec.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero_point is not None:
        _check_codes(q.zero_point, q.spec, "a zero point")
        tensors["weight_zero_point"] = pack_bits(q.zero_point.T, q.spec.bits).T.contiguous()
    return tensors


def unpack(
    tensors: Mapping[str, Tensor],
    spec: NumberSpec,
    layout: str,
    shape: Sequence[int] | None = None,
) -> QuantizedTensor:
    """Read a quantized weight from the tensors of a checkpoint.

    Args:
        tensors: What :func:`pack` returned, by suffix. ``weight_shape`` may be missing when
            ``shape`` is given.
        spec: The format.
        layout: One of :data:`LAYOUTS`.
        shape: ``(out, in)``, when it is known from elsewhere.

    Returns:
        The weight.

    Raises:
        FormatError: A tensor is missing, unexpected, or not of the dtype or shape that the format
            and the layout demand.
    """
    check_layout(spec, layout)
    if layout != PACK_QUANTIZED:
        _check_names(tensors, {"weight", "weight_scale"}, set(), spec, layout)
        stored = tensors["weight"]
        if stored.dtype != _PLAIN[layout]:
            raise FormatError(f"{layout} weights are {_PLAIN[layout]}, not {stored.dtype}")
        q = QuantizedTensor(stored.view(torch.int8), tensors["weight_scale"], None, spec)
        if shape is not None and tuple(shape) != q.shape:
            raise FormatError(f"weight is {list(q.shape)}, expected {list(shape)}")
        return q
    required = {"weight_packed", "weight_scale"}
    required |= set() if spec.symmetric else {"weight_zero_point"}
    _check_names(tensors, required, {"weight_shape"}, spec, layout)
    rows, columns = _true_shape(tensors.get("weight_shape"), shape)
    scale = tensors["weight_scale"]
    codes = unpack_bits(tensors["weight_packed"], spec.bits, rows, columns)
    zero = None
    if not spec.symmetric:
        groups = spec.scale_shape(rows, columns)[-1]
        packed = tensors["weight_zero_point"]
        zero = unpack_bits(packed.T, spec.bits, groups, rows).T.contiguous()
    return QuantizedTensor(codes, scale, zero, spec)


def stored_bytes(
    shape: Sequence[int], spec: NumberSpec, layout: str, scale_dtype: torch.dtype
) -> int:
    """Bytes of the tensors that :func:`pack` would yield.

    Args:
        shape: ``(out, in)`` of the weight.
        spec: The format.
        layout: One of :data:`LAYOUTS`.
        scale_dtype: Dtype of the stored scale.

    Returns:
        The size of the data, exactly; headers are not counted.

    Raises:
        FormatError: The layout cannot hold the format, or the group size does not divide.
    """
    check_layout(spec, layout)
    rows, columns = shape
    scales = math.prod(spec.scale_shape(rows, columns))
    size = scales * scale_dtype.itemsize
    if layout != PACK_QUANTIZED:
        return size + rows * columns
    size += rows * _words(columns, spec.bits) * _WORD_BYTES + 2 * torch.int64.itemsize
    if not spec.symmetric:
        size += _words(rows, spec.bits) * (scales // max(rows, 1)) * _WORD_BYTES
    return size


def check_layout(spec: NumberSpec, layout: str) -> None:
    """Make sure that a layout can hold a format.

    Args:
        spec: The format of a weight.
        layout: One of :data:`LAYOUTS`.

    Raises:
        FormatError: It cannot, or there is no such layout; the error says what would.
    """
    if layout not in LAYOUTS:
        raise FormatError(f"there is no layout {layout!r}", remedy=suggest(layout, LAYOUTS))
    if spec.dynamic:
        raise FormatError(
            f"{spec.describe()} is a format of activations and cannot be stored",
            remedy="use a static format for weights",
        )
    if spec.kind not in ("int", "e4m3"):
        raise FormatError(
            f"no layout of the compressed-tensors format holds {spec.describe()} weights",
            remedy="store them dense (dequantized), or use fp8 (E4M3) or integers",
        )
    if (layout == FLOAT_QUANTIZED) != (spec.kind == "e4m3"):
        fitting = FLOAT_QUANTIZED if spec.kind == "e4m3" else f"{PACK_QUANTIZED} or {INT_QUANTIZED}"
        raise FormatError(
            f"{layout} weights cannot be {spec.describe()}", remedy=f"use the layout {fitting}"
        )
    if layout == INT_QUANTIZED and not spec.symmetric:
        raise FormatError(
            f"int-quantized weights are symmetric, {spec.describe()} is not",
            remedy="use a symmetric format or the pack-quantized layout",
        )
    if layout == PACK_QUANTIZED and spec.granularity == Granularity.TENSOR:
        raise FormatError(
            "pack-quantized weights have channel or group granularity, not tensor",
            remedy="use channel granularity or the int-quantized layout",
        )


def check_declarable(spec: NumberSpec) -> None:
    """Make sure that a checkpoint's configuration can say that numbers have this format.

    Args:
        spec: The format of a weight or an activation.

    Raises:
        FormatError: The compressed-tensors format has no word for it.
    """
    if spec.kind == "e5m2":
        raise FormatError(
            f"the compressed-tensors format cannot declare {spec.describe()}",
            remedy="use fp8 (E4M3) or integers",
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
        remedy="only int, and float of 8 bits (E4M3) or 4 bits (E2M1), are known",
    )


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of codes into a little-endian bit stream.

    Args:
        codes: int8 ``[rows, columns]``, each in ``[-2^(bits-1), 2^(bits-1) - 1]``.
        bits: Width of a code, 2 to 8.

    Returns:
        int32 ``[rows, ceil(columns * bits / 32)]``; unused high bits are 0.
    """
    rows, columns = codes.shape
    words = _words(columns, bits)
    # So many codes fill a whole number of bytes: the pattern of shifts repeats from there on.
    period = 8 // math.gcd(8, bits)
    cycles = -(-columns // period)
    width = cycles * (period * bits // 8)
    packed = torch.zeros(rows, words, dtype=torch.int32, device=codes.device)
    if codes.numel() == 0:
        return packed
    stream = packed.view(torch.uint8)
    for piece in _row_slices(rows, columns):
        offset = _to_offset_binary(codes[piece], bits)
        if cycles * period != columns:
            offset = torch.nn.functional.pad(offset, (0, cycles * period - columns))
        filled = _interleave(offset.view(-1, cycles, period), bits).view(-1, width)
        # The last cycle may run over the end of the last word, with padding only.
        kept = min(width, words * _WORD_BYTES)
        stream[piece, :kept] = filled[:, :kept]
    return packed if _little_endian(packed) else _swap_bytes(stream).view(torch.int32)


def unpack_bits(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Undo :func:`pack_bits`.

    Args:
        packed: int32 ``[rows, ceil(columns * bits / 32)]``.
        bits: Width of a code, 2 to 8.
        rows: Number of rows.
        columns: Number of codes in a row.

    Returns:
        int8 ``[rows, columns]``.

    Raises:
        FormatError: ``packed`` has another dtype or shape.
    """
    expected = (rows, _words(columns, bits))
    if packed.dtype != torch.int32 or tuple(packed.shape) != expected:
        raise FormatError(
            f"{rows} x {columns} codes of {bits} bits are packed into int32 {list(expected)}, "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    period = 8 // math.gcd(8, bits)
    cycles = -(-columns // period)
    width = cycles * (period * bits // 8)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    for piece in _row_slices(rows, columns):
        stream = _words_to_bytes(packed[piece])
        if width > stream.shape[1]:
            stream = torch.nn.functional.pad(stream, (0, width - stream.shape[1]))
        stream = stream[:, :width].reshape(-1, cycles, width // max(cycles, 1))
        offset = _separate(stream, bits).view(-1, cycles * period)[:, :columns]
        codes[piece] = _from_offset_binary(offset, bits)
    return codes


def _interleave(offset: Tensor, bits: int) -> Tensor:
    """Codes ``[rows, cycles, period]`` as uint8 -> bytes ``[rows, cycles, period * bits / 8]``."""
    rows, cycles, period = offset.shape
    stream = offset.new_zeros(rows, cycles, period * bits // 8)
    for element in range(period):
        first, shift = divmod(element * bits, 8)
        code = offset[..., element]
        # The shift drops the bits that belong to the next byte.
        stream[..., first] |= code << shift
        if shift + bits > 8:
            stream[..., first + 1] |= code >> (8 - shift)
    return stream


def _separate(stream: Tensor, bits: int) -> Tensor:
    """Bytes ``[rows, cycles, period * bits / 8]`` -> codes ``[rows, cycles, period]`` as uint8."""
    rows, cycles, _ = stream.shape
    period = 8 // math.gcd(8, bits)
    mask = (1 << bits) - 1
    offset = stream.new_empty(rows, cycles, period)
    for element in range(period):
        first, shift = divmod(element * bits, 8)
        code = stream[..., first] >> shift
        if shift + bits > 8:
            code |= stream[..., first + 1] << (8 - shift)
        offset[..., element] = code & mask
    return offset


def _to_offset_binary(codes: Tensor, bits: int) -> Tensor:
    """int8 codes -> uint8 ``code + 2^(bits-1)``; the sum wraps to the right value at 8 bits."""
    return codes.contiguous().view(torch.uint8) + (1 << (bits - 1))


def _from_offset_binary(offset: Tensor, bits: int) -> Tensor:
    """uint8 ``code + 2^(bits-1)`` -> int8 codes."""
    return (offset - (1 << (bits - 1))).view(torch.int8)


def _words_to_bytes(words: Tensor) -> Tensor:
    """int32 ``[rows, words]`` -> uint8 ``[rows, 4 words]``, least significant byte first."""
    stream = words.contiguous().view(torch.uint8)
    return stream if _little_endian(words) else _swap_bytes(stream)


def _little_endian(x: Tensor) -> bool:
    """Accelerators are; a CPU need not be."""
    return x.device.type != "cpu" or sys.byteorder == "little"


def _swap_bytes(stream: Tensor) -> Tensor:
    """Reverse the bytes of every word."""
    return stream.reshape(len(stream), -1, _WORD_BYTES).flip(-1).flatten(-2)


def _row_slices(rows: int, columns: int) -> list[slice]:
    if rows == 0 or columns == 0:
        return []
    height = max(1, _PIECE // columns)
    return [slice(start, start + height) for start in range(0, rows, height)]


def _words(columns: int, bits: int) -> int:
    return -(-columns * bits // _WORD_BITS)


def _check_codes(codes: Tensor, spec: NumberSpec, what: str) -> None:
    if codes.numel() == 0:
        return
    grid = spec.grid
    if isinstance(grid, FloatGrid):
        _check_numbers(codes, grid, spec, what)
        return
    low, high = (int(end) for end in torch.aminmax(codes))
    if low < grid.qmin or high > grid.qmax:
        wrong = low if low < grid.qmin else high
        raise FormatError(
            f"{what} is {wrong}, outside [{grid.qmin}, {grid.qmax}] of {spec.describe()}"
        )


def _check_numbers(codes: Tensor, grid: FloatGrid, spec: NumberSpec, what: str) -> None:
    """Refuse bit patterns that are no finite number."""
    for rows in _row_slices(*codes.shape):
        bad = ~grid.read(codes[rows]).isfinite()
        if bool(bad.any()):
            wrong = int(codes[rows][bad][0]) & 0xFF
            raise FormatError(f"{what} is {wrong:#04x}, no finite number of {spec.describe()}")


def _check_names(
    tensors: Mapping[str, Tensor],
    required: set[str],
    optional: set[str],
    spec: NumberSpec,
    layout: str,
) -> None:
    missing = sorted(required - set(tensors))
    extra = sorted(set(tensors) - required - optional)
    if missing or extra:
        told = [f"lacks {', '.join(missing)}"] * bool(missing)
        told += [f"must not hold {', '.join(extra)}"] * bool(extra)
        raise FormatError(f"a weight of {spec.describe()} in {layout} {' and '.join(told)}")


def _true_shape(stored: Tensor | None, given: Sequence[int] | None) -> tuple[int, int]:
    """The weight's shape, from the checkpoint or the caller, who must agree."""
    if stored is None and given is None:
        raise FormatError(
            "the shape of a packed weight is unknown", remedy="give weight_shape or shape"
        )
    known = None if stored is None else tuple(int(n) for n in stored)
    wanted = known if given is None else tuple(given)
    if wanted is None or len(wanted) != 2 or known not in (None, wanted):
        raise FormatError(f"weight_shape is {known}, expected {wanted} of two axes")
    return (wanted[0], wanted[1])
