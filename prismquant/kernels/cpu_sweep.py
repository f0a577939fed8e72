"""The kernel of :mod:`prismquant.kernels.sweep` on a CPU, compiled by numba.

Rows are taken in tiles of 64, whose sums stay in registers and whose errors in the innermost cache
while the columns of the block go by. Everything is rounded as torch rounds it, one operation after
the other in float32; only where pulls are added up is a multiplication fused with the addition.
Tiles know nothing of one another, so threads that share them change no result.

Only :mod:`prismquant.kernels.sweep` imports this file, which needs the package ``numba``. The
kernel is compiled when it is imported, and kept in numba's cache where there is a place for it.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from torch.nn.functional import pad

from prismquant.kernels.compiled import compiled
from prismquant.kernels.lanes import (
    WIDTH,
    add,
    clamp,
    divide,
    load,
    multiply,
    multiply_add,
    power_below,
    spread,
    store,
    store_bytes,
    subtract,
    with_sign,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prismquant.kernels.rounding import LossAccumulator, Rounding, ScaleLines

# Columns of a block that the buffer of a tile holds.
MOST_COLUMNS = 128
# Rows of a tile: four vectors.
TILE = 4 * WIDTH
# Sums that are kept of each row.
SUMS = 3
# Bytes of a line of the cache, which no load of a vector should straddle.
_LINE = 64
# Tiles that are worth a thread.
_TILES_OF_A_THREAD = 4

_FLOATS = numba.types.Array(numba.float32, 2, "A")
_WIDE = numba.types.Array(numba.float64, 2, "A")
_BYTES = numba.types.Array(numba.int8, 2, "A")
_NUMBERS = numba.types.Array(numba.int64, 1, "A")


@numba.njit(error_model="numpy")
def rounded(x, lowest, highest, shift, smallest):
    """The nearest points to values, as :class:`prismquant.kernels.rounding.Rounding` says."""
    inside = clamp(x, spread(lowest), spread(highest))
    if smallest == 0:
        return subtract(add(inside, spread(shift)), spread(shift))
    summand = multiply(power_below(inside, spread(smallest)), spread(shift))
    # The summand leaves no sign to a zero, but floating-point codes have one.
    return with_sign(subtract(add(inside, summand), summand), inside)


@numba.njit(error_model="numpy")
def _add_pulls(pending, coefficients, line, buffer):
    """Add what errors of the columns before do to 64 targets, in registers throughout."""
    a, b, c, d = pending
    for column in range(line):
        factor, place = spread(coefficients[line, column]), TILE * column
        a = multiply_add(factor, load(buffer, place), a)
        b = multiply_add(factor, load(buffer, place + WIDTH), b)
        c = multiply_add(factor, load(buffer, place + 2 * WIDTH), c)
        d = multiply_add(factor, load(buffer, place + 3 * WIDTH), d)
    return a, b, c, d


@numba.njit(error_model="numpy")
def _count(own, place, cost, value):
    """Add squares times their cost to sums."""
    squares = multiply(value, value)
    store(own, place, multiply_add(spread(cost), squares, load(own, place)))


@compiled(
    numba.void(
        *[_FLOATS] * 5,
        _NUMBERS,
        _FLOATS,
        _FLOATS,
        _BYTES,
        _FLOATS,
        _WIDE,
        *[numba.float32] * 4,
        *[numba.boolean] * 4,
        numba.intp,
        numba.intp,
    )
)
def round_tiles(
    targets,
    weights,
    coefficients,
    steps,
    zeros,
    lines,
    errors,
    points,
    codes,
    costs,
    sums,
    lowest,
    highest,
    shift,
    smallest,
    nearest,
    shifted,
    coded,
    counted,
    first,
    last,
):
    """Round all columns of the tiles that lie from row ``first`` to before row ``last``.

    Args:
        targets: float32 ``[b, r]``, and so the other matrices that are not described.
        weights: Theirs.
        coefficients: ``[b, b]``.
        steps: ``[G, r]``.
        zeros: ``[G, r]``, read if ``shifted``.
        lines: int64 ``[b]``.
        errors: Filled.
        points: Filled unless ``coded``.
        codes: int8 ``[b, r]``, filled if ``coded``.
        costs: ``[3, b]``, read if ``counted``.
        sums: float64 ``[3, r]``, added to if ``counted``.
        lowest: Of the grid, as the next three.
        highest: See :class:`prismquant.kernels.rounding.Rounding`.
        shift: Likewise.
        smallest: Likewise.
        nearest: Whether to round weights and not targets.
        shifted: Whether there are zero points.
        coded: Whether points are their own codes.
        counted: Whether to keep sums.
        first: A multiple of the tile.
        last: Likewise.
    """
    count = len(targets)
    space = np.empty(TILE * (MOST_COLUMNS + SUMS) + _LINE // 4, np.float32)
    begin = -space.ctypes.data % _LINE // 4
    buffer, own = space[begin:], space[begin + TILE * MOST_COLUMNS :]
    target_line, weight_line = targets.strides[0] // 4, weights.strides[0] // 4
    step_line, zero_line = steps.strides[0] // 4, zeros.strides[0] // 4
    error_line, point_line = errors.strides[0] // 4, points.strides[0] // 4
    code_line = codes.strides[0]
    for row in range(first, last, TILE):
        own[: SUMS * TILE] = 0.0
        for k in range(count):
            place = k * target_line + row
            pending = (
                load(targets, place),
                load(targets, place + WIDTH),
                load(targets, place + 2 * WIDTH),
                load(targets, place + 3 * WIDTH),
            )
            pending = _add_pulls(pending, coefficients, k, buffer)
            store(targets, place, pending[0])
            store(targets, place + WIDTH, pending[1])
            store(targets, place + 2 * WIDTH, pending[2])
            store(targets, place + 3 * WIDTH, pending[3])
            for i in range(0, TILE, WIDTH):
                target = load(targets, place + i)
                weight = load(weights, k * weight_line + row + i)
                step = load(steps, lines[k] * step_line + row + i)
                scaled = divide(weight if nearest else target, step)
                if shifted:
                    zero = load(zeros, lines[k] * zero_line + row + i)
                    point = rounded(add(scaled, zero), lowest, highest, shift, smallest)
                    error = subtract(weight, multiply(subtract(point, zero), step))
                else:
                    point = rounded(scaled, lowest, highest, shift, smallest)
                    error = subtract(weight, multiply(point, step))
                if coded:
                    store_bytes(codes, k * code_line + row + i, point)
                else:
                    store(points, k * point_line + row + i, point)
                if counted:
                    pull = subtract(target, weight)
                    _count(own, i, costs[0, k], add(pull, error))
                    _count(own, TILE + i, costs[1, k], error)
                    _count(own, 2 * TILE + i, costs[2, k], error)
                store(buffer, TILE * k + i, error)
                store(errors, k * error_line + row + i, error)
        if counted:
            for i in range(TILE):
                for j in range(SUMS):
                    sums[j, row + i] += own[TILE * j + i]


def launch(
    targets: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    scales: ScaleLines,
    rounding: Rounding,
    errors: Tensor,
    points: Tensor,
    nearest: bool,
    accumulator: LossAccumulator | None,
) -> None:
    """Run the kernel; arguments are those of :func:`prismquant.kernels.sweep.round_columns`.

    Args:
        targets: ``[b, r]``, completed in place.
        weights: ``[b, r]``.
        coefficients: ``[b, b]``.
        scales: Of the ``b`` columns.
        rounding: To the grid.
        errors: ``[b, r]``, filled.
        points: ``[b, r]``, float32, or int8 if the grid's points are whole numbers; filled.
        nearest: Whether to round weights and not targets.
        accumulator: What to keep of the squares.
    """
    rows = targets.shape[1]
    by_row = [targets, weights, scales.steps, scales.zeros, errors, points]
    by_row.append(None if accumulator is None else accumulator.sums)
    costs = None if accumulator is None else accumulator.costs
    even = rows // TILE * TILE
    if even:
        parts = [None if m is None else m[:, :even] for m in by_row]
        _run(parts, coefficients, scales.lines, costs, rounding, nearest)
    if even < rows:
        # The last rows, with as many of no meaning as fill a tile.
        parts = [
            None if m is None else pad(m[:, even:], (0, TILE - rows + even), value=1.0)
            for m in by_row
        ]
        _run(parts, coefficients, scales.lines, costs, rounding, nearest)
        for place in (0, 4, 5, 6):
            whole, part = by_row[place], parts[place]
            if whole is not None and part is not None:
                whole[:, even:] = part[:, : rows - even]


def _run(
    parts: list[Tensor | None],
    coefficients: Tensor,
    lines: Tensor,
    costs: Tensor | None,
    rounding: Rounding,
    nearest: bool,
) -> None:
    """Run the kernel on whole tiles, on as many threads as torch has."""
    nothing = np.empty((0, 0), np.float32)
    targets, weights, steps, zeros, errors, points, sums = (
        nothing if part is None else part.numpy() for part in parts
    )
    coded = points.dtype == np.int8
    arguments = (
        targets,
        weights,
        coefficients.numpy(),
        steps,
        zeros,
        lines.numpy(),
        errors,
        nothing if coded else points,
        points if coded else np.empty((0, 0), np.int8),
        nothing if costs is None else costs.numpy(),
        sums.astype(np.float64) if costs is None else sums,
        *(np.float32(n) for n in (rounding.lowest, rounding.highest)),
        *(np.float32(n) for n in (rounding.shift, rounding.smallest)),
        nearest,
        zeros.size > 0,
        coded,
        costs is not None,
    )
    tiles = targets.shape[1] // TILE
    threads = min(torch.get_num_threads(), max(1, tiles // _TILES_OF_A_THREAD))
    ends = [TILE * (tiles * i // threads) for i in range(threads + 1)]
    if threads == 1:
        round_tiles(*arguments, *ends)
        return
    with ThreadPoolExecutor(threads) as pool:
        work = [pool.submit(round_tiles, *arguments, *span) for span in itertools.pairwise(ends)]
        for one in work:
            one.result()
