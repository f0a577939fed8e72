"""The loops of :mod:`prismquant.kernels.transpose`, compiled by numba."""

from __future__ import annotations

import numba

from prismquant.kernels.compiled import compiled

# Rows and columns of a tile: its lines on both sides fit into the innermost cache.
_ROWS = 32
_COLUMNS = 64

_FLOATS = numba.types.Array(numba.float32, 2, "A")
_BYTES = numba.types.Array(numba.int8, 2, "A")
_NUMBERS = numba.types.Array(numba.int64, 1, "A")


@compiled(numba.void(_FLOATS, _NUMBERS, _FLOATS))
def gather(matrix, columns, lines):
    """``lines[k, r] = matrix[r, columns[k]]``."""
    count, rows = lines.shape
    for row in range(0, rows, _ROWS):
        behind = min(row + _ROWS, rows)
        for first in range(0, count, _COLUMNS):
            for k in range(first, min(first + _COLUMNS, count)):
                column = columns[k]
                for r in range(row, behind):
                    lines[k, r] = matrix[r, column]


@compiled(numba.void(_BYTES, _NUMBERS, _BYTES))
def scatter(lines, columns, matrix):
    """``matrix[r, columns[k]] = lines[k, r]``."""
    count, rows = lines.shape
    for row in range(0, rows, _ROWS):
        behind = min(row + _ROWS, rows)
        for first in range(0, count, _COLUMNS):
            for k in range(first, min(first + _COLUMNS, count)):
                column = columns[k]
                for r in range(row, behind):
                    matrix[r, column] = lines[k, r]
