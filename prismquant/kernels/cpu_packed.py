"""Few rows times a weight in codes, on a CPU, compiled by numba.

A tile of sixteen rows of the weight is unpacked into the innermost cache, some columns at a time,
then multiplied with all rows of the input. So each word is read once, and what it costs to unpack
is shared by the rows. Sums are float32, in an order that depends on nothing but the shape.

Only :mod:`prismquant.kernels.packed_numba` imports this file, which needs the package ``numba``.
"""

from __future__ import annotations

import numba
import numpy as np

from prismquant.kernels.compiled import compiled
from prismquant.kernels.lanes import (
    WIDTH,
    add,
    from_patterns,
    load,
    load_upper,
    multiply,
    multiply_add,
    spread,
    store,
    subtract,
    unpacker,
)

# Columns that are unpacked at a time; 16 KiB of the innermost cache.
CHUNK = 256
# Bytes of a line of the cache, which no load of a vector should straddle.
_LINE = 64

_WORDS = numba.types.Array(numba.int32, 1, "C")
_HALVES = numba.types.Array(numba.int16, 1, "C")
_FLOATS = numba.types.Array(numba.float32, 1, "C")
_MATRIX = numba.types.Array(numba.float32, 2, "C")
_FORM = numba.types.UniTuple(numba.intp, 7)
_SCALES = numba.types.Tuple((_HALVES, _FLOATS))
_SPAN = (numba.intp, numba.intp)


_first_1, _first_2, _first_4, _first_8 = (unpacker(width, first=True) for width in (1, 2, 4, 8))
_further_2, _further_4 = (unpacker(width, first=False) for width in (2, 4))


@numba.njit(error_model="numpy")
def _unpack(words, bits, tile, tiles, line, start, columns, least, buffer):
    """Codes, less ``least``, of some columns of a tile; ``line`` columns are stored of it."""
    # The lowest part first: what is above is multiplied by the values that its bits have.
    begin = tiles * line * bits // 2
    place, factor, fresh = begin, numba.float32(1), True
    for width in (1, 2, 4, 8):
        if not bits & width:
            continue
        place -= tiles * line * width // 2
        here = place + (tile * line + start) * width // 2
        count = 32 // width
        for column in range(0, columns, count):
            offset = column * WIDTH
            if fresh and width == 1:
                _first_1(words, here, buffer, offset, least)
            elif fresh and width == 2:
                _first_2(words, here, buffer, offset, least)
            elif fresh and width == 4:
                _first_4(words, here, buffer, offset, least)
            elif fresh:
                _first_8(words, here, buffer, offset, least)
            elif width == 2:
                _further_2(words, here, buffer, offset, factor)
            else:
                _further_4(words, here, buffer, offset, factor)
            here += WIDTH
        fresh = False
        factor *= numba.float32(1 << width)


@numba.njit(error_model="numpy")
def _one_row(x, row, column, buffer, count):
    """A row of the input times columns of a tile, four sums at a time."""
    a = b = c = d = spread(numba.float32(0))
    even = count // 4 * 4
    for i in range(0, even, 4):
        place = i * WIDTH
        a = multiply_add(spread(x[row, column + i]), load(buffer, place), a)
        b = multiply_add(spread(x[row, column + i + 1]), load(buffer, place + WIDTH), b)
        c = multiply_add(spread(x[row, column + i + 2]), load(buffer, place + 2 * WIDTH), c)
        d = multiply_add(spread(x[row, column + i + 3]), load(buffer, place + 3 * WIDTH), d)
    for i in range(even, count):
        a = multiply_add(spread(x[row, column + i]), load(buffer, i * WIDTH), a)
    return add(add(a, b), add(c, d))


@numba.njit(error_model="numpy")
def _four_rows(x, row, column, buffer, count):
    """Four rows of the input times columns of a tile."""
    a = b = c = d = spread(numba.float32(0))
    for i in range(count):
        weights = load(buffer, i * WIDTH)
        a = multiply_add(spread(x[row, column + i]), weights, a)
        b = multiply_add(spread(x[row + 1, column + i]), weights, b)
        c = multiply_add(spread(x[row + 2, column + i]), weights, c)
        d = multiply_add(spread(x[row + 3, column + i]), weights, d)
    return a, b, c, d


@numba.njit(error_model="numpy")
def _of_group(both, place):
    """Scales, or zero points, of a group of sixteen rows."""
    narrow, wide = both
    return load_upper(narrow, place) if len(narrow) else load(wide, place)


@numba.njit(error_model="numpy")
def _values(words, form, scales, zeros, tile, start, columns, buffer):
    """Values of some columns of a tile, and what is stored behind the last column."""
    bits, tiles, line, groups, group, mantissa, bias = form
    least = numba.float32(0 if mantissa else 1 << (bits - 1))
    filled = min(CHUNK, line - start)
    _unpack(words, bits, tile, tiles, line, start, filled, least, buffer)
    shifted = len(zeros[0]) + len(zeros[1]) > 0
    begin = 0
    while begin < columns:
        own = (start + begin) // group
        end = min((own + 1) * group - start, columns)
        place = (tile * groups + own) * WIDTH
        scale = _of_group(scales, place)
        if shifted:
            zero = _of_group(zeros, place)
            for i in range(begin * WIDTH, end * WIDTH, WIDTH):
                store(buffer, i, multiply(subtract(load(buffer, i), zero), scale))
        elif mantissa:
            sign, kept, base = numba.int32(bits - 1), numba.int32(mantissa), numba.int32(bias)
            for i in range(begin * WIDTH, end * WIDTH, WIDTH):
                point = from_patterns(load(buffer, i), sign, kept, base)
                store(buffer, i, multiply(point, scale))
        else:
            for i in range(begin * WIDTH, end * WIDTH, WIDTH):
                store(buffer, i, multiply(load(buffer, i), scale))
        begin = end


@numba.njit(error_model="numpy")
def _aligned():
    """Memory for a chunk of a tile, at the start of a line of the cache."""
    space = np.empty(CHUNK * WIDTH + _LINE // 4, np.float32)
    return space[-space.ctypes.data % _LINE // 4 :]


@compiled(numba.void(_WORDS, _FORM, _SCALES, _SCALES, _MATRIX, _MATRIX, *_SPAN))
def multiply_tiles(words, form, scales, zeros, x, out, first, last):
    """Multiply the input with the tiles from ``first`` to before ``last``.

    Args:
        words: Of :class:`prismquant.kernels.tiled_weight.TiledWeight`.
        form: Bits of a code; number of tiles; columns that are stored of each; groups of columns;
            columns of a group; mantissa and bias of floating-point codes, 0 for integers.
        scales: ``[T, G, 16]``, flat: as upper halves of float32 numbers, and as these; one of the
            two is empty.
        zeros: Zero points, likewise; both are empty where there are none.
        x: ``[rows, in]``.
        out: ``[rows, 16 T]``, added to.
        first: The first tile.
        last: The one after the last.
    """
    rows, features = x.shape
    width = out.shape[1]
    buffer, flat = _aligned(), out.reshape(-1)
    even = rows // 4 * 4
    for tile in range(first, last):
        for start in range(0, features, CHUNK):
            count = min(CHUNK, features - start)
            _values(words, form, scales, zeros, tile, start, count, buffer)
            for row in range(0, even, 4):
                sums = _four_rows(x, row, start, buffer, count)
                for i in range(4):
                    here = (row + i) * width + tile * WIDTH
                    store(flat, here, add(sums[i], load(flat, here)))
            for row in range(even, rows):
                here = row * width + tile * WIDTH
                store(flat, here, add(_one_row(x, row, start, buffer, count), load(flat, here)))


@compiled(numba.void(_WORDS, _FORM, _SCALES, _SCALES, _MATRIX, *_SPAN))
def dequantize_tiles(words, form, scales, zeros, out, first, last):
    """Write what the tiles from ``first`` to before ``last`` stand for.

    Args:
        words: Like the next three, as of :func:`multiply_tiles`.
        form: Likewise.
        scales: Likewise.
        zeros: Likewise.
        out: ``[in, 16 (last - first)]``, filled: rows of the weight are columns.
        first: The first tile.
        last: The one after the last.
    """
    features, width = out.shape
    buffer, flat = _aligned(), out.reshape(-1)
    for tile in range(first, last):
        for start in range(0, features, CHUNK):
            count = min(CHUNK, features - start)
            _values(words, form, scales, zeros, tile, start, count, buffer)
            for column in range(count):
                here = (start + column) * width + (tile - first) * WIDTH
                store(flat, here, load(buffer, column * WIDTH))
