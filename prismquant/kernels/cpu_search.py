"""The first look of :mod:`prismquant.kernels.range_search` on a CPU, compiled by numba.

Sixteen units at a time, one to a lane of a vector: no sum runs across lanes, groups of any size do,
and all trials of a tile run over the same values in the innermost cache. In each unit the values
that clipping costs most come first. A trial is given up as soon as it has lost in all lanes, which
is mostly after these few.

Sums are of float32 numbers whose powers are polynomials, good to some 6e-6; ``slack`` has to cover
that, see there.

Only :mod:`prismquant.kernels.range_search` imports this file, which needs the package ``numba``.
The kernel is compiled when it is imported, and kept in numba's cache where there is a place for it.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from prismquant.kernels.compiled import compiled
from prismquant.kernels.lanes import (
    LANES,
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
    subtract,
)

# Values of each unit that come first, one for so many, and at most.
_VALUES_A_LEADER, _MOST_LEADERS = 16, 4
# After so many values a trial may be given up; that many are summed before sums are added up.
_STRIDE = 32
# Sums outside have lost digits to underflow, or are about to overflow.
_LEAST, _MOST = 1e-25, 1e30
# Reciprocals of scales below have lost digits.
_TINIEST = 1e-37
# The relative error beyond which a bound is not worth having, and no longer to first order.
_LOOSE = 0.1

_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_INTS = ir.VectorType(ir.IntType(32), WIDTH)
_MANTISSA = 23
_ROOT_OF_HALF = 0x3F3504F3
_FARTHEST = 126.0


def _fitted(function, low, high, degree):
    """Coefficients of a polynomial near the best one for a function, constant first."""
    places = np.polynomial.chebyshev.chebpts1(512) * (high - low) / 2 + (low + high) / 2
    fit = np.polynomial.chebyshev.Chebyshev.fit(
        places, function(places), degree, domain=[low, high]
    )
    return fit.convert(kind=np.polynomial.Polynomial).coef.astype(np.float32).tolist()


# log2(1 + x) / x around mantissas of 1, and 2^x: 4e-6 off, times the exponent, and 4e-6 relatively.
_LOG = _fitted(lambda x: np.log2(1 + x) / x, math.sqrt(0.5) - 1, math.sqrt(2) - 1, 5)
_EXP = _fitted(np.exp2, -0.5, 0.5, 4)


def _floats(value):
    return ir.Constant(_FLOATS, [float(np.float32(value))] * WIDTH)


def _ints(value):
    return ir.Constant(_INTS, [value] * WIDTH)


def _call(builder, name, *arguments):
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32")
    return builder.call(function, arguments)


def _polynomial(builder, x, coefficients):
    total = _floats(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = _call(builder, "fmuladd", total, x, _floats(coefficient))
    return total


def _any(builder, marks):
    whole = builder.bitcast(marks, ir.IntType(WIDTH))
    return builder.icmp_unsigned("!=", whole, ir.Constant(ir.IntType(WIDTH), 0))


@intrinsic
def magnitude(typingctx, value):
    """Absolute values."""

    def generate(context, builder, signature, arguments):
        return _call(builder, "fabs", *arguments)

    return LANES(LANES), generate


@intrinsic
def power(typingctx, value, exponent):
    """About ``value^exponent``, of values from 0 on and exponents from 1 on."""

    def generate(context, builder, signature, arguments):
        value, exponent = arguments
        bits = builder.bitcast(value, _INTS)
        shift = _ints(_MANTISSA)
        whole = builder.ashr(builder.sub(bits, _ints(_ROOT_OF_HALF)), shift)
        part = builder.bitcast(builder.sub(bits, builder.shl(whole, shift)), _FLOATS)
        part = builder.fsub(part, _floats(1.0))
        log = _polynomial(builder, part, _LOG)
        log = _call(builder, "fmuladd", log, part, builder.sitofp(whole, _FLOATS))
        log = builder.fmul(log, exponent)
        low, high = _floats(-_FARTHEST), _floats(_FARTHEST)
        log = builder.select(builder.fcmp_ordered("<", log, low), low, log)
        log = builder.select(builder.fcmp_ordered(">", log, high), high, log)
        nearest = _call(builder, "nearbyint", log)
        result = _polynomial(builder, builder.fsub(log, nearest), _EXP)
        binade = builder.shl(builder.fptosi(nearest, _INTS), shift)
        return builder.bitcast(builder.add(builder.bitcast(result, _INTS), binade), _FLOATS)

    return LANES(LANES, LANES), generate


@intrinsic
def where_below(typingctx, a, b, then, other):
    """``then`` where ``a < b``, else ``other``, also where one is NaN."""

    def generate(context, builder, signature, arguments):
        a, b, then, other = arguments
        return builder.select(builder.fcmp_ordered("<", a, b), then, other)

    return LANES(LANES, LANES, LANES, LANES), generate


@intrinsic
def any_above(typingctx, a, b):
    """Whether ``a > b`` in some lane."""

    def generate(context, builder, signature, arguments):
        return _any(builder, builder.fcmp_ordered(">", *arguments))

    return types.boolean(LANES, LANES), generate


@intrinsic
def any_not_above(typingctx, a, b):
    """Whether ``a > b`` fails in some lane, as it does where one is NaN."""

    def generate(context, builder, signature, arguments):
        return _any(builder, builder.fcmp_unordered("<=", *arguments))

    return types.boolean(LANES, LANES), generate


_MATRIX = numba.types.Array(numba.float32, 2, "C")
_LINE = numba.types.Array(numba.float32, 1, "C")
_MARKS = numba.types.Array(numba.uint8, 2, "C")
_FLOAT = numba.float32


@compiled(
    numba.void(
        _MATRIX, _MATRIX, _MATRIX, _MATRIX, _LINE, _FLOAT, _FLOAT, _FLOAT, _FLOAT, _FLOAT, _FLOAT,
        _FLOAT, _LINE, _MARKS, numba.int64, numba.int64,
    )
)  # fmt: skip
def look(
    values,
    costs,
    scales,
    zeros,
    unit,
    lowest,
    highest,
    shift,
    smallest,
    norm,
    slack,
    drift,
    firsts,
    left,
    begin,
    end,
):
    """Find the trials that may be the best of their unit, from one tile to another.

    ``values`` is ``[units, n]``, ``costs`` ``[G, n]``, ``unit`` ``[padded]``, ``scales`` and
    ``zeros`` ``[trials, padded]``, units padded to whole tiles; ``zeros`` may have no line.
    ``slack`` bounds the relative error of a loss but for what comes from quotients, each ``drift``
    times the largest. ``firsts``, ``[padded]``, is filled with the first that may be the best;
    where there are several, they are marked in ``left``, ``[units, trials]``.
    """
    units, count = values.shape
    trials = len(scales)
    shifted = len(zeros) > 0
    leaders = max(1, min(_MOST_LEADERS, count // _VALUES_A_LEADER))
    tile = np.empty(count * WIDTH, np.float32)
    weights = np.empty(count * WIDTH, np.float32)
    order = np.empty(WIDTH, np.float32)
    lower = np.empty(trials * WIDTH, np.float32)
    nothing, one = spread(np.float32(0.0)), spread(np.float32(1.0))
    infinite = spread(np.float32(np.inf))
    exponent, root = spread(norm), spread(np.float32(1.0) / norm)
    bottom, top = spread(lowest), spread(highest)
    shifts, least = spread(shift), spread(smallest)
    tiny = spread(np.float32(_TINIEST))
    slacks, loose = spread(slack), spread(np.float32(_LOOSE))
    for first in range(begin, end, WIDTH):
        # Values side by side, one lane to a unit; behind the last unit, it comes again.
        for lane in range(WIDTH):
            number = min(first + lane, units - 1)
            value, cost = values[number], costs[number % len(costs)]
            for k in range(count):
                tile[k * WIDTH + lane] = value[k]
                weights[k * WIDTH + lane] = cost[k]
        # The largest come first.
        for leader in range(leaders):
            greatest, place = spread(np.float32(-1.0)), nothing
            for k in range(leader, count):
                x = load(tile, k * WIDTH)
                key = multiply(multiply(x, x), load(weights, k * WIDTH))
                place = where_below(greatest, key, spread(np.float32(k)), place)
                greatest = where_below(greatest, key, key, greatest)
            store(order, 0, place)
            for lane in range(WIDTH):
                a, b = leader * WIDTH + lane, int(order[lane]) * WIDTH + lane
                tile[a], tile[b] = tile[b], tile[a]
                weights[a], weights[b] = weights[b], weights[a]
        largest, whole = nothing, nothing
        for k in range(count):
            x = magnitude(load(tile, k * WIDTH))
            largest = where_below(largest, x, x, largest)
            whole = add(whole, load(weights, k * WIDTH))
        units_of = load(unit, first)
        bar = infinite
        for trial in range(trials):
            scale = load(scales[trial], first)
            # Of equal trials, mostly neighbours or like the first, the earlier one wins.
            apart = infinite
            for earlier in (0, trial - 1):
                if 0 <= earlier < trial:
                    gap = magnitude(subtract(scale, load(scales[earlier], first)))
                    if shifted:
                        other = load(zeros[earlier], first)
                        gap = add(gap, magnitude(subtract(load(zeros[trial], first), other)))
                    apart = where_below(gap, apart, gap, apart)
            if not any_above(apart, nothing):
                store(lower, trial * WIDTH, infinite)
                continue
            inverse = divide(one, scale)
            zero = load(zeros[trial], first) if shifted else nothing
            # What multiplies losses in steps, so that trials compare.
            step = power(magnitude(divide(scale, units_of)), exponent)
            reach = multiply_add(largest, magnitude(inverse), magnitude(zero))
            reach = multiply(multiply(reach, spread(drift)), exponent)
            reach = where_below(tiny, magnitude(inverse), reach, infinite)
            # No trial above this one is worth more: the best bound, in steps of this one.
            limit = divide(bar, step)
            error = multiply_add(reach, power(divide(whole, limit), root), slacks)
            limit = multiply_add(add(error, error), limit, limit)
            limit = where_below(error, loose, limit, infinite)
            limit = where_below(spread(np.float32(_LEAST)), limit, limit, infinite)
            total = nothing
            start, stop = 0, leaders
            while start < count:
                part = nothing
                for k in range(start, stop):
                    x = multiply_add(load(tile, k * WIDTH), inverse, zero)
                    point = clamp(x, bottom, top)
                    near = shifts
                    if smallest > 0:
                        near = multiply(power_below(point, least), shifts)
                    point = subtract(add(point, near), near)
                    x = magnitude(subtract(x, point))
                    x = multiply(x, x) if norm == 2 else power(x, exponent)
                    part = multiply_add(x, load(weights, k * WIDTH), part)
                total = add(total, part)
                start, stop = stop, min(count, stop + _STRIDE)
                if not any_not_above(total, limit):
                    break
            if start < count:
                store(lower, trial * WIDTH, infinite)
                continue
            error = multiply_add(reach, power(divide(whole, total), root), slacks)
            known = where_below(error, loose, total, nothing)
            known = where_below(spread(np.float32(_LEAST)), known, known, nothing)
            known = where_below(known, spread(np.float32(_MOST)), known, nothing)
            loss = multiply(known, step)
            known = where_below(spread(np.float32(_LEAST)), loss, loss, nothing)
            known = where_below(known, spread(np.float32(_MOST)), known, nothing)
            # Of what is not known, the lower bound is 0 and the upper one infinite.
            bound = where_below(nothing, known, subtract(known, multiply(error, known)), nothing)
            store(lower, trial * WIDTH, where_below(nothing, apart, bound, infinite))
            upper = where_below(nothing, known, multiply_add(error, known, known), infinite)
            bar = where_below(upper, bar, upper, bar)
        found, number = nothing, nothing
        for trial in range(trials - 1, -1, -1):
            bound = load(lower, trial * WIDTH)
            mark = where_below(bar, bound, nothing, where_below(bound, infinite, one, nothing))
            store(lower, trial * WIDTH, mark)
            number = add(number, mark)
            found = where_below(nothing, mark, spread(np.float32(trial)), found)
        store(firsts, first, found)
        store(order, 0, number)
        for lane in range(min(WIDTH, units - first)):
            if order[lane] > 1:
                for trial in range(trials):
                    left[first + lane, trial] = lower[trial * WIDTH + lane] > 0
