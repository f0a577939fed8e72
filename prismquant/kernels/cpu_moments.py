"""The loop of :mod:`prismquant.kernels.moments` on a CPU, compiled by numba.

Only that module imports this file, which needs the package ``numba``. The loop is compiled when it
is imported, and kept in numba's cache where there is a place for it.
"""

from __future__ import annotations

import numba

from prismquant.kernels.compiled import compiled

_LINE = numba.types.Array(numba.float32, 1, "C")
_COUNT = numba.int64


@compiled(numba.void(_LINE, _COUNT, _LINE, _COUNT, _LINE, _COUNT, _COUNT, _COUNT))
def two_sum_lines(high, high_stride, low, low_stride, x, x_stride, rows, columns):
    """Lines of memory, a stride apart, so that the compiler knows them to run over neighbours."""
    for row in range(rows):
        sums = high[row * high_stride : row * high_stride + columns]
        rests = low[row * low_stride : row * low_stride + columns]
        terms = x[row * x_stride : row * x_stride + columns]
        for k in range(columns):
            before, term = sums[k], terms[k]
            total = before + term
            of_term = total - before
            rests[k] = (rests[k] + (term - of_term)) + (before - (total - of_term))
            sums[k] = total
