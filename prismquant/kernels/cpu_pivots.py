"""The loop of :mod:`prismquant.kernels.pivots`, compiled by numba.

A column is built in pieces that stay in the innermost cache while lines found before go by, so that
these are read once for each column and nothing else leaves the cache.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from prismquant.kernels.compiled import compiled

# Numbers of a column that are brought up to date together.
_PIECE = 1024
# Lines whose factors are held at once.
_TOGETHER = 4

_NUMBERS = numba.types.Array(numba.int64, 1, "A")


def _of(real):
    """The signature for a type of numbers."""
    matrix, vector = (numba.types.Array(real, n, "A") for n in (2, 1))
    return numba.int64(matrix, matrix, vector, _NUMBERS)


@compiled(_of(numba.float32), _of(numba.float64))
def pick(matrix, lines, left, picked):
    """See :func:`prismquant.kernels.pivots.pick_smallest`; ``left`` is the diagonal, spoilt."""
    count, width = lines.shape
    line = np.empty(width, matrix.dtype)
    for k in range(count):
        place, pivot = 0, left[0]
        for j in range(width):
            if left[j] != left[j]:
                return k
            if left[j] < pivot:
                place, pivot = j, left[j]
        if not 0 < pivot < math.inf:
            return k
        # The two halves of the column, of which only the lower triangle is up to date.
        for j in range(place):
            line[j] = matrix[place, j]
        for j in range(place, width):
            line[j] = matrix[j, place]
        root = math.sqrt(pivot)
        for first in range(0, width, _PIECE):
            last = min(first + _PIECE, width)
            even = k // _TOGETHER * _TOGETHER
            for p in range(0, even, _TOGETHER):
                a, b = lines[p, place], lines[p + 1, place]
                c, d = lines[p + 2, place], lines[p + 3, place]
                for j in range(first, last):
                    pulls = (a * lines[p, j] + b * lines[p + 1, j]) + (
                        c * lines[p + 2, j] + d * lines[p + 3, j]
                    )
                    line[j] -= pulls
            for p in range(even, k):
                a = lines[p, place]
                for j in range(first, last):
                    line[j] -= a * lines[p, j]
            for j in range(first, last):
                line[j] /= root
                left[j] -= line[j] * line[j]
        line[place] = root
        left[place] = math.inf
        lines[k] = line
        picked[k] = place
    return count
