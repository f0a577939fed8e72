"""Values of weights that other tools have quantized: what their codes and scales stand for.

Products are computed in float32 and rounded once to the dtype that is asked for, some rows at a
time, so that nothing of the size of the weight is in memory beside what is stored and the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.formats.bit_streams import unpack_bits, unpack_patterns
from prismquant.formats.quantized_layer import row_slices
from prismquant.numerics.grids import FloatGrid

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_WORD_BITS = 32
_E8M0_BIAS = 127.0


def scale_values(stored: Tensor) -> Tensor:
    """Scales as float32: numbers of any float dtype, or exponents of two as E8M0 or uint8.

    Args:
        stored: Any shape.

    Returns:
        The same shape.

    Raises:
        FormatError: One is NaN or infinite.
    """
    if stored.dtype == torch.uint8:
        stored = stored.view(torch.float8_e8m0fnu)
    scale = stored.to(torch.float32)
    if not bool(scale.isfinite().all()):
        raise FormatError("a scale is no number")
    return scale


def scaled_values(
    points: Callable[[slice], Tensor],
    shape: tuple[int, int],
    scale: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    *,
    vanishing: bool = False,
) -> Tensor:
    """Points times the scales of their blocks.

    Args:
        points: Gives rows of the weight as numbers, ``[n, in]`` of any dtype.
        shape: ``(out, in)``.
        scale: float32 ``[ceil(out / rows), ceil(in / columns)]``.
        block: Rows and columns that share a scale; the last blocks may be cut off.
        dtype: Of the result.
        vanishing: Whether some scales may be zero where points are not, as those that underflow.

    Returns:
        ``[out, in]``.

    Raises:
        FormatError: A scale is zero where points are not.
    """
    values = torch.empty(shape, dtype=dtype)
    suspect = _is_suspect(scale, vanishing=vanishing)
    rows = torch.arange(shape[0]) // block[0]
    columns = torch.arange(shape[1]) // block[1]
    for piece in row_slices(*shape):
        factors = scale[rows[piece]]
        factors = factors if factors.shape[1] == 1 else factors[:, columns]
        numbers = points(piece).to(torch.float32)
        if suspect:
            _refuse_lost(numbers, factors)
        values[piece] = numbers * factors
    return values


def _refuse_lost(steps: Tensor, scale: Tensor) -> None:
    """Refuse codes whose scale is zero, which would all become zero.

    Raises:
        FormatError: There are such.
    """
    lost = int(((scale == 0) & (steps != 0)).sum())
    if lost:
        raise FormatError(f"a scale is zero over {lost} codes that are not")


def fp4_rows(packed: Tensor) -> Callable[[slice], Tensor]:
    """Rows of E2M1 numbers, of which two lie in a byte, the low nibble first.

    Args:
        packed: uint8 ``[out, in / 2]``.
    """
    grid, columns = FloatGrid("e2m1"), 2 * packed.shape[1]

    def rows(piece: slice) -> Tensor:
        part = packed[piece]
        return grid.read(unpack_patterns(part, 4, len(part), columns))

    return rows


def paired_int4_rows(packed: Tensor) -> Callable[[slice], Tensor]:
    """Rows of signed integers of 4 bits, of which two of neighbouring outputs lie in a byte.

    Args:
        packed: uint8 ``[out / 2, in]``, the first output in the low nibble, as ModelOpt packs.
    """
    codes = torch.stack([packed & 0xF, packed >> 4], dim=1).flatten(0, 1).to(torch.int8)
    codes = torch.where(codes > 7, codes - 16, codes)
    return lambda piece: codes[piece]


def gptq_values(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    groups: Tensor,
    *,
    less_one: bool,
    dtype: torch.dtype,
    vanishing: bool = False,
) -> Tensor:
    """Values of a weight in the GPTQ layout: ``(code - zero point) * scale``.

    Args:
        qweight: int32 ``[in bits / 32, out]``, a stream of unsigned codes down each column.
        qzeros: int32 ``[G, out bits / 32]``, a stream along each row.
        scales: ``[G, out]``.
        groups: int64 ``[in]``, the group of each input feature.
        less_one: Whether zero points are stored less one, as version 1 does.
        dtype: Of the result.
        vanishing: As of :func:`scaled_values`.

    Returns:
        ``[out, in]``.

    Raises:
        FormatError: The shapes do not belong together, a zero point that is stored less one was
            0, which readers take for different numbers, or a scale is zero where codes are not.
    """
    columns, rows = len(groups), qweight.shape[1]
    bits, rest = divmod(_WORD_BITS * qweight.shape[0], max(1, columns))
    if rest or bits not in (2, 3, 4, 8):
        raise FormatError(f"{list(qweight.shape)} words do not hold {columns} codes a column")
    half = 1 << (bits - 1)
    zero = unpack_bits(qzeros, bits, scales.shape[0], rows).to(torch.int16) + half
    if less_one:
        if bool((zero == 2 * half - 1).any()):
            raise FormatError(
                "a zero point of 0 is stored less one, and readers disagree about what that is",
                remedy="convert the checkpoint to checkpoint_format gptq_v2 with what wrote it",
            )
        zero = zero + 1
    checked = _suspected(scales, groups, vanishing=vanishing)
    return _integer_values(qweight.T, bits, zero.T, checked, dtype)


def awq_values(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    *,
    vanishing: bool = False,
) -> Tensor:
    """Values of a weight in the GEMM version of the AWQ layout.

    Args:
        qweight: int32 ``[in, out / 8]``, eight outputs in a word, in an order of their own.
        qzeros: int32 ``[G, out / 8]``, alike.
        scales: ``[G, out]``.
        dtype: Of the result.
        vanishing: As of :func:`scaled_values`.

    Returns:
        ``[out, in]``.

    Raises:
        FormatError: A scale is zero where codes are not.
    """
    columns, rows = qweight.shape[0], scales.shape[1]
    groups = torch.arange(columns) // (columns // scales.shape[0])
    zero = _awq_codes(qzeros, rows).T
    codes = _awq_codes(qweight, rows).T
    scale = _suspected(scales, groups, vanishing=vanishing)
    values = torch.empty(rows, columns, dtype=dtype)
    for piece in row_slices(rows, columns):
        steps = codes[piece].to(torch.float32) - zero[piece].to(torch.float32)[:, groups]
        values[piece] = scale.times(steps, piece)
    return values


def _awq_codes(packed: Tensor, rows: int) -> Tensor:
    """int32 ``[n, out / 8]`` -> int8 ``[n, out]``, less 8 each."""
    codes = unpack_bits(packed, 4, len(packed), rows)
    # Nibble t of a word is of output ORDER[t]: back from there.
    back = torch.tensor(AWQ_ORDER).argsort()
    return codes.reshape(len(packed), -1, len(AWQ_ORDER))[..., back].reshape(len(packed), rows)


@dataclass(frozen=True, eq=False)
class _Scales:
    """Scales ``[out, G]`` in float32, the group of each column, and whether one may be wrong."""

    scale: Tensor
    groups: Tensor
    suspect: bool

    def times(self, steps: Tensor, piece: slice) -> Tensor:
        """Steps of some rows times their scales."""
        factors = self.scale[piece][:, self.groups]
        if self.suspect:
            _refuse_lost(steps, factors)
        return steps * factors


def _is_suspect(scale: Tensor, *, vanishing: bool) -> bool:
    """Whether codes must be looked at, as some scale is zero: where it may be, all of them are."""
    zero = scale == 0
    return bool(zero.all() if vanishing else zero.any())


def _suspected(scales: Tensor, groups: Tensor, *, vanishing: bool) -> _Scales:
    """Scales ``[G, out]`` as they are multiplied."""
    scale = scales.T.to(torch.float32)
    return _Scales(scale, groups, _is_suspect(scale, vanishing=vanishing))


def _integer_values(
    packed: Tensor, bits: int, zero: Tensor, scale: _Scales, dtype: torch.dtype
) -> Tensor:
    """Unsigned codes ``[out, words]`` less their zero points ``[out, G]``, times their scales."""
    rows, columns, half = len(packed), len(scale.groups), 1 << (bits - 1)
    values = torch.empty(rows, columns, dtype=dtype)
    for piece in row_slices(rows, columns):
        part = packed[piece].contiguous()
        codes = unpack_bits(part, bits, len(part), columns).to(torch.float32) + half
        steps = codes - zero[piece].to(torch.float32)[:, scale.groups]
        values[piece] = scale.times(steps, piece)
    return values
