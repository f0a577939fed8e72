"""The loops of :mod:`prismquant.kernels.pivots`, compiled by numba.

A column must be brought up to date by all lines found before it, and these do not fit into the
inner caches. So the columns that will probably go next are brought up to date together, in pieces
that stay there while the lines go by once. A column that comes up unexpectedly starts a new set;
how large sets are follows from how many of the last one were used.

Every column is computed by the same operations in the same order, in a set or alone.

What moves inside a triangle is moved line by line, so that a page of memory is visited once.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from prismquant.kernels.compiled import compiled

# Numbers of each column that are brought up to date together.
_PIECE = 2048
# Lines whose factors are held at once, and which are read together.
_TOGETHER = 8
# Columns in a set, at most.
_AHEAD = 16

_NUMBERS = numba.types.Array(numba.int64, 1, "C")


def _of_pick(real):
    """The signature of :func:`pick` for a type of numbers."""
    matrix, lines = numba.types.Array(real, 2, "A"), numba.types.Array(real, 2, "C")
    left = numba.types.Array(real, 1, "C")
    return numba.int64(matrix, lines, left, _NUMBERS)


def _of_move(real):
    """The signature of :func:`move_columns` for a type of numbers."""
    matrix, moved = numba.types.Array(real, 2, "A"), numba.types.Array(real, 2, "C")
    return numba.void(matrix, moved, _NUMBERS, numba.int64, numba.int64)


@numba.njit(error_model="numpy")
def _smallest(left):
    """The first place of the smallest number; of one that is NaN if there is any."""
    place, least = 0, left[0]
    for j in range(len(left)):
        if left[j] != left[j]:
            return j
        if left[j] < least:
            place, least = j, left[j]
    return place


@numba.njit(error_model="numpy")
def _choose(left, columns, many):
    """Put the places of the smallest numbers that are finite first in ``columns``, in order."""
    found = 0
    for j in range(len(left)):
        if not left[j] < math.inf or (found == many and not left[j] < left[columns[many - 1]]):
            continue
        at = min(found, many - 1)
        while at and left[j] < left[columns[at - 1]]:
            columns[at] = columns[at - 1]
            at -= 1
        columns[at] = j
        found = min(found + 1, many)
    return found


@numba.njit(error_model="numpy")
def _gather(matrix, column, line):
    """The two halves of a column, of which only the lower triangle is up to date."""
    for j in range(column):
        line[j] = matrix[column, j]
    for j in range(column, len(line)):
        line[j] = matrix[j, column]


# Products and differences may be rounded together, which halves the instructions; nothing may be
# reordered, so a column is the same however its lines are put together.
@numba.njit(error_model="numpy", fastmath={"contract"})
def _pull(lines, begin, end, column, piece, first):
    """Bring a piece of a column, from ``first`` on, up to date by some of the lines."""
    last = first + len(piece)
    even = begin + (end - begin) // _TOGETHER * _TOGETHER
    for p in range(begin, even, _TOGETHER):
        a, b = lines[p, column], lines[p + 1, column]
        c, d = lines[p + 2, column], lines[p + 3, column]
        e, f = lines[p + 4, column], lines[p + 5, column]
        g, h = lines[p + 6, column], lines[p + 7, column]
        one, two = lines[p, first:last], lines[p + 1, first:last]
        three, four = lines[p + 2, first:last], lines[p + 3, first:last]
        five, six = lines[p + 4, first:last], lines[p + 5, first:last]
        seven, eight = lines[p + 6, first:last], lines[p + 7, first:last]
        for j in range(len(piece)):
            half = piece[j] - a * one[j] - b * two[j] - c * three[j] - d * four[j]
            piece[j] = half - e * five[j] - f * six[j] - g * seven[j] - h * eight[j]
    for p in range(even, end):
        a, one = lines[p, column], lines[p, first:last]
        for j in range(len(piece)):
            piece[j] -= a * one[j]


@numba.njit(error_model="numpy")
def _prepare(matrix, lines, begin, columns, ahead):
    """Gather a set of columns and bring them up to date by the lines before ``begin``."""
    width = lines.shape[1]
    for slot in range(len(columns)):
        _gather(matrix, columns[slot], ahead[slot])
    for first in range(0, width, _PIECE):
        last = min(first + _PIECE, width)
        for p in range(0, begin, _TOGETHER):
            for slot in range(len(columns)):
                _pull(lines, p, p + _TOGETHER, columns[slot], ahead[slot, first:last], first)


@numba.njit(error_model="numpy")
def _finish(lines, begin, k, column, root, line, left):
    """Bring a column up to date by the lines from ``begin`` on, and make it line ``k``."""
    width = lines.shape[1]
    for first in range(0, width, _PIECE):
        last = min(first + _PIECE, width)
        piece, own, rest = line[first:last], lines[k, first:last], left[first:last]
        _pull(lines, begin, k, column, piece, first)
        for j in range(len(piece)):
            factor = piece[j] / root
            own[j] = factor
            rest[j] -= factor * factor
    lines[k, column] = root
    left[column] = math.inf


@compiled(_of_pick(numba.float32), _of_pick(numba.float64))
def pick(matrix, lines, left, picked):
    """See :func:`prismquant.kernels.pivots.pick_smallest`; ``left`` is the diagonal, spoilt."""
    count, width = lines.shape
    ahead = np.empty((min(_AHEAD, count), width), matrix.dtype)
    columns = np.empty(len(ahead), np.int64)
    many, held, used, begin = 1, 0, 0, 0
    for k in range(count):
        place = _smallest(left)
        pivot = left[place]
        if not 0 < pivot < math.inf:
            return k
        slot = 0
        while slot < held and columns[slot] != place:
            slot += 1
        if slot == held:
            if 2 * used >= held:
                many = min(2 * many, len(ahead))
            elif 4 * used < held:
                many = max(many // 2, 1)
            held, used, slot = _choose(left, columns, many), 0, 0
            begin = k // _TOGETHER * _TOGETHER
            _prepare(matrix, lines, begin, columns[:held], ahead)
        used += 1
        _finish(lines, begin, k, place, math.sqrt(pivot), ahead[slot], left)
        picked[k] = place
    return count


@compiled(_of_move(numba.float32), _of_move(numba.float64))
def move_columns(matrix, moved, free, start, stop):
    """See :func:`prismquant.kernels.pivots.move_columns`."""
    before = 0
    for row in range(start, stop):
        while before < len(free) and free[before] < row:
            before += 1
        if before < len(free) and free[before] == row:
            for j in range(row + 1):
                matrix[row, j] = moved[before, j]
        else:
            for i in range(before):
                matrix[row, free[i]] = moved[i, row]
