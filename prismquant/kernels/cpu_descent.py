"""Coordinate descent on a CPU, compiled by numba: what does not change costs next to nothing.

After a sweep few columns of few rows can still be improved, so a pass must not multiply by the
whole Hessian. Here the products of errors and Hessian are kept, ``g = e H``, and brought up to date
when a value changes. Rows are taken in strips of 16, whose products lie next to one another: while
columns go by, a strip stays in the cache, and a change that any of its rows makes is one run over
contiguous memory. Even when every value changes that is no slower than the product.

Only :mod:`prismquant.kernels.descent` imports this file, which needs the package ``numba``. The
kernel is compiled when it is imported, and kept in numba's cache where there is a place for it.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from prismquant.kernels.compiled import compiled
from prismquant.kernels.cpu_sweep import SUMS, rounded
from prismquant.kernels.lanes import (
    WIDTH,
    add,
    differ,
    divide,
    load,
    multiply,
    multiply_add,
    spread,
    store,
    store_bytes,
    store_patterns,
    subtract,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prismquant.kernels.rounding import Rounding

# Strips that are worth a thread.
_STRIPS_OF_A_THREAD = 16

_FLOATS = numba.types.Array(numba.float32, 2, "A")
_STRIPS = numba.types.Array(numba.float32, 3, "C")
_WIDE = numba.types.Array(numba.float64, 2, "A")
_BYTES = numba.types.Array(numba.int8, 2, "A")
_NUMBERS = numba.types.Array(numba.int64, 1, "A")


@numba.njit(error_model="numpy")
def _count(own, place, cost, squares):
    """Add squares times their cost to sums."""
    store(own, place, multiply_add(spread(cost), squares, load(own, place)))


@compiled(
    numba.void(
        _STRIPS,
        *[_FLOATS] * 4,
        _NUMBERS,
        _FLOATS,
        _BYTES,
        _FLOATS,
        _WIDE,
        *[numba.float32] * 4,
        numba.int32,
        numba.int32,
        *[numba.boolean] * 2,
        *[numba.intp] * 3,
    )
)
def descend(
    products,
    weights,
    coefficients,
    steps,
    zeros,
    lines,
    errors,
    codes,
    costs,
    sums,
    lowest,
    highest,
    shift,
    smallest,
    mantissa,
    sign,
    shifted,
    final,
    column,
    first,
    last,
):
    """Round a block of columns again, of the strips from ``first`` to before ``last``.

    Args:
        products: ``g``, float32 ``[strips, n, 16]``, brought up to date.
        weights: float32 ``[b, r]``, and so ``errors``.
        coefficients: ``[b, n]``: lines of the Hessian over their diagonal entries, which are 1.
        steps: ``[G, r]``.
        zeros: ``[G, r]``, read if ``shifted``.
        lines: int64 ``[b]``.
        errors: Brought up to date.
        codes: int8 ``[b, r]``, likewise.
        costs: ``[3, b]``; the first are the Hessian's diagonal entries.
        sums: float64 ``[3, r]``, added to.
        lowest: Of the grid, as the next five.
        highest: See :class:`prismquant.kernels.rounding.Rounding`.
        shift: Likewise.
        smallest: Likewise.
        mantissa: Likewise.
        sign: Likewise.
        shifted: Whether there are zero points.
        final: Whether only columns still to come need products.
        column: The first of the block.
        first: Strip.
        last: Strip.
    """
    count, width = coefficients.shape
    own = np.empty(SUMS * WIDTH, np.float32)
    weight_line, step_line = weights.strides[0] // 4, steps.strides[0] // 4
    zero_line, error_line = zeros.strides[0] // 4, errors.strides[0] // 4
    code_line = codes.strides[0]
    for strip in range(first, last):
        row, base = WIDTH * strip, WIDTH * width * strip
        own[:] = 0.0
        changed = False
        for k in range(count):
            weight = load(weights, k * weight_line + row)
            former = load(errors, k * error_line + row)
            step = load(steps, lines[k] * step_line + row)
            product = load(products, base + WIDTH * (column + k))
            pull = subtract(divide(product, spread(costs[0, k])), former)
            scaled = divide(add(weight, pull), step)
            if shifted:
                zero = load(zeros, lines[k] * zero_line + row)
                point = rounded(add(scaled, zero), lowest, highest, shift, smallest)
                error = subtract(weight, multiply(subtract(point, zero), step))
            else:
                point = rounded(scaled, lowest, highest, shift, smallest)
                error = subtract(weight, multiply(point, step))
            if smallest == 0:
                store_bytes(codes, k * code_line + row, point)
            else:
                store_patterns(codes, k * code_line + row, point, smallest, mantissa, sign)
            if differ(error, former):
                changed = True
                store(errors, k * error_line + row, error)
                far, near = add(pull, former), add(pull, error)
                gain = subtract(multiply(near, near), multiply(far, far))
                growth = subtract(multiply(error, error), multiply(former, former))
                _count(own, 0, costs[0, k], gain)
                _count(own, WIDTH, costs[1, k], growth)
                _count(own, 2 * WIDTH, costs[2, k], growth)
                push = multiply(subtract(error, former), spread(costs[0, k]))
                for j in range(column + k if final else 0, width):
                    place = base + WIDTH * j
                    factor = spread(coefficients[k, j])
                    store(products, place, multiply_add(factor, push, load(products, place)))
        if changed:
            for i in range(WIDTH):
                for j in range(SUMS):
                    sums[j, row + i] += own[WIDTH * j + i]


def launch(
    products: Tensor,
    parts: list[Tensor | None],
    coefficients: Tensor,
    lines: Tensor,
    costs: Tensor,
    rounding: Rounding,
    column: int,
    final: bool,
) -> None:
    """Run the kernel on whole strips, on as many threads as torch has.

    Arguments are those of :func:`prismquant.kernels.descent.round_again`.

    Args:
        products: ``[strips, n, 16]``.
        parts: Weights, steps, zero points, errors, codes and sums.
        coefficients: ``[b, n]``.
        lines: Of steps and zero points, ``[b]``.
        costs: ``[3, b]``.
        rounding: To the grid.
        column: The first of the block.
        final: Whether it is the last pass.
    """
    weights, steps, zeros, errors, codes, sums = (
        np.empty((0, 0), np.float32) if part is None else part.numpy() for part in parts
    )
    arguments = (
        products.numpy(),
        weights,
        coefficients.numpy(),
        steps,
        zeros,
        lines.numpy(),
        errors,
        codes,
        costs.numpy(),
        sums,
        *(np.float32(n) for n in (rounding.lowest, rounding.highest)),
        *(np.float32(n) for n in (rounding.shift, rounding.smallest)),
        np.int32(rounding.mantissa),
        np.int32(rounding.sign),
        zeros.size > 0,
        final,
        column,
    )
    strips = weights.shape[1] // WIDTH
    threads = min(torch.get_num_threads(), max(1, strips // _STRIPS_OF_A_THREAD))
    ends = [strips * i // threads for i in range(threads + 1)]
    if threads == 1:
        descend(*arguments, *ends)
        return
    with ThreadPoolExecutor(threads) as pool:
        work = [pool.submit(descend, *arguments, *span) for span in itertools.pairwise(ends)]
        for one in work:
            one.result()
