"""Bit streams: codes of fewer than eight bits next to one another, and integers laid out in them.

Streams are little-endian: element ``i`` of a row begins at bit ``i b``, and byte ``k`` holds the
bits from ``8 k`` on, the lowest first. Integers are packed in offset binary (``code + 2^(b-1)``)
into 32-bit words (:func:`pack_bits`), bit patterns of floating-point numbers as they are into bytes
(:func:`pack_patterns`).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.formats.packed import PACK_QUANTIZED, BitLayout
from prismquant.formats.quantized_layer import QuantizedTensor, check_codes, row_slices
from prismquant.numerics.kinds import Granularity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prismquant.formats.spec import NumberSpec
    from prismquant.numerics.kinds import ScaleKind

WORD_BITS = 32
WORD_BYTES = 4


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

    def suffixes(self, spec: NumberSpec) -> tuple[frozenset[str], frozenset[str]]:
        """Words and scales, zero points of what is not symmetric."""
        zeros = [] if spec.symmetric else ["weight_zero_point"]
        required = frozenset(["weight_packed", "weight_scale", *zeros])
        return required, frozenset(["weight_shape", "weight_g_idx"])

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: NumberSpec, shape: Sequence[int] | None
    ) -> QuantizedTensor:
        """The shape comes from ``weight_shape`` or the caller, who must agree."""
        self.check_names(tensors, spec)
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


def words(columns: int, bits: int) -> int:
    """32-bit words that a row of codes fills."""
    return -(-columns * bits // WORD_BITS)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of codes into a little-endian bit stream.

    Args:
        codes: int8 ``[rows, columns]``, each in ``[-2^(bits-1), 2^(bits-1) - 1]``.
        bits: Width of a code, 2 to 8.

    Returns:
        int32 ``[rows, ceil(columns * bits / 32)]``; unused high bits are 0.
    """
    rows, columns = codes.shape
    packed = torch.zeros(rows, words(columns, bits), dtype=torch.int32, device=codes.device)
    stream = packed.view(torch.uint8) if packed.numel() else packed
    for piece in row_slices(rows, columns):
        filled = _packed(_to_offset_binary(codes[piece], bits), bits)
        # The last cycle may run over the end of the last word, with padding only.
        kept = min(filled.shape[1], stream.shape[1])
        stream[piece, :kept] = filled[:, :kept]
    if packed.numel() == 0 or _little_endian(packed):
        return packed
    return _swap_bytes(stream).view(torch.int32)


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
    _check(packed, torch.int32, bits, rows, columns, words(columns, bits))
    codes = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    for piece in row_slices(rows, columns):
        offset = _unpacked(_words_to_bytes(packed[piece]), bits, columns)
        codes[piece] = _from_offset_binary(offset, bits)
    return codes


def pattern_bytes(columns: int, bits: int) -> int:
    """Bytes that a row of bit patterns fills."""
    return -(-columns * bits // 8)


def pack_patterns(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of bit patterns into a little-endian bit stream.

    Args:
        codes: int8 ``[rows, columns]``, each in ``[0, 2^bits - 1]``.
        bits: Width of a pattern, 2 to 7.

    Returns:
        uint8 ``[rows, ceil(columns * bits / 8)]``; unused high bits are 0.
    """
    rows, columns = codes.shape
    width = pattern_bytes(columns, bits)
    packed = torch.zeros(rows, width, dtype=torch.uint8, device=codes.device)
    for piece in row_slices(rows, columns):
        packed[piece] = _packed(codes[piece].contiguous().view(torch.uint8), bits)[:, :width]
    return packed


def unpack_patterns(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Undo :func:`pack_patterns`.

    Args:
        packed: uint8 ``[rows, ceil(columns * bits / 8)]``.
        bits: Width of a pattern, 2 to 7.
        rows: Number of rows.
        columns: Number of patterns in a row.

    Returns:
        int8 ``[rows, columns]``.

    Raises:
        FormatError: ``packed`` has another dtype or shape.
    """
    _check(packed, torch.uint8, bits, rows, columns, pattern_bytes(columns, bits))
    codes = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    for piece in row_slices(rows, columns):
        codes[piece] = _unpacked(packed[piece], bits, columns).view(torch.int8)
    return codes


def _check(
    packed: Tensor, dtype: torch.dtype, bits: int, rows: int, columns: int, width: int
) -> None:
    if packed.dtype != dtype or tuple(packed.shape) != (rows, width):
        raise FormatError(
            f"{rows} x {columns} codes of {bits} bits are packed into "
            f"{str(dtype).removeprefix('torch.')} {[rows, width]}, "
            f"not {packed.dtype} {list(packed.shape)}"
        )


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``[rows, columns]`` -> whole cycles of bytes, uint8."""
    rows, columns = codes.shape
    # So many codes fill a whole number of bytes: the pattern of shifts repeats from there on.
    period = 8 // math.gcd(8, bits)
    cycles = -(-columns // period)
    if cycles * period != columns:
        codes = torch.nn.functional.pad(codes, (0, cycles * period - columns))
    if bits == 4 and _little_endian(codes):
        return _paired(codes)
    return _interleave(codes.view(rows, cycles, period), bits).view(rows, -1)


def _unpacked(stream: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 ``[rows, bytes]`` -> uint8 codes ``[rows, columns]``."""
    period = 8 // math.gcd(8, bits)
    cycles = -(-columns // period)
    width = cycles * (period * bits // 8)
    if width > stream.shape[1]:
        stream = torch.nn.functional.pad(stream, (0, width - stream.shape[1]))
    stream = stream[:, :width].reshape(-1, cycles, width // max(cycles, 1))
    return _separate(stream, bits).view(-1, cycles * period)[:, :columns]


def _paired(offset: Tensor) -> Tensor:
    """Codes of 4 bits as uint8, an even number of columns -> bytes, uint8.

    Two codes lie in a number of 16 bits; moved together, they are its lower byte. What
    :func:`_interleave` does with strides is done on whole registers here.
    """
    # Flat: a tensor of one row may have any stride between rows.
    pairs = offset.reshape(-1).view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8).view(len(offset), -1)


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
    return stream.reshape(len(stream), -1, WORD_BYTES).flip(-1).flatten(-2)


HELD = (PackedIntegers(PACK_QUANTIZED),)
