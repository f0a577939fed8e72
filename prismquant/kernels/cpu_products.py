"""Products of bfloat16 numbers on x86 processors that multiply such numbers (``avx512_bf16``).

``vdpbf16ps`` multiplies two pairs in each of 16 lanes and adds to float32 sums: twice the work of a
float32 instruction. It rounds to the nearest always, and takes numbers below 2^-126 as zero.

Tokens are packed first: two consecutive ones into one word of 32 bits, 16 neighbouring features
into one line of the cache, such lines one pair of tokens after the other. This one layout serves
both factors: a vector of columns is a line, and what a row is multiplied by one word of a line,
spread over all lanes. A tile of 8 rows and 48 columns has its sums in registers over 256 tokens;
then they are added to running sums (:mod:`prismquant.kernels.moments`), which stay in the innermost
cache until all tokens are through. The grid of tiles is fixed, and tiles know nothing of one
another, so threads change no result.

Only :mod:`prismquant.kernels.products` imports this file, which needs the package ``numba``. The
loops are compiled when it is imported, and kept in numba's cache where there is a place for it.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from prismquant.kernels.compiled import compiled
from prismquant.kernels.lanes import WIDTH, add, load, store, subtract

# Rows of a tile, and vectors of its columns: with a line of columns and one spread word, the sums
# just fit into 32 registers.
ROWS = 8
_VECTORS = 3
# Pairs of tokens whose products are summed in plain float32: few, for the sake of its last digits.
_SPAN = 128
# Columns, whole tiles, that one line after the other is multiplied with.
_TOGETHER = 960
# What LLVM calls a processor that has the instruction.
_FEATURE = "+avx512bf16"

_LINE = numba.types.Array(numba.float32, 1, "C")
_NUMBERS = numba.types.Array(numba.int16, 1, "C")
_WORDS = numba.types.Array(numba.int32, 1, "C")
_COUNT = numba.int64

_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_INTS = ir.VectorType(ir.IntType(32), WIDTH)
_NOTHING = ir.Constant(_INTS, ir.Undefined)


def _check_target():
    """Code for another processor could not be compiled at all, which ends the process."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    if numba.config.DISABLE_JIT or _FEATURE not in features.split(","):
        raise ImportError("numba does not compile for a processor that multiplies bfloat16")


_check_target()


class _BFloat(ir.Type):
    """A type that llvmlite does not name."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * WIDTH)


def _tile(vectors):
    """Multiply a tile of 8 rows and so many vectors of columns, all in registers."""

    def typed(typingctx, a, a_place, b, b_place, stride, pairs, sums):
        """Products of the rows at a place of ``a`` and the columns at one of ``b``.

        Args:
            typingctx: numba's.
            a: Packed tokens.
            a_place: Of the word of the first row, in words.
            b: Packed tokens.
            b_place: Of the line of the first columns.
            stride: From one line of columns to the next ones, in words.
            pairs: Of tokens, at least one.
            sums: float32 ``[8 * vectors * 16]``, filled.
        """

        def generate(context, builder, signature, arguments):
            def data(number):
                array = context.make_array(signature.args[number])
                return array(context, builder, arguments[number]).data

            def line(place):
                return builder.load(builder.bitcast(place, _INTS.as_pointer()), align=4)

            stride, pairs = arguments[4:6]
            kind = pairs.type
            multiply = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS]),
                "llvm.x86.avx512bf16.dpbf16ps.512",
            )
            rows = builder.gep(data(0), [arguments[1]])
            columns = [builder.gep(data(2), [arguments[3]])]
            for _ in range(vectors - 1):
                columns.append(builder.gep(columns[-1], [stride]))
            before = builder.basic_block
            loop, behind = (builder.append_basic_block(name) for name in ("pairs", "sums"))
            builder.branch(loop)
            builder.position_at_end(loop)
            pair = builder.phi(kind)
            pair.add_incoming(ir.Constant(kind, 0), before)
            totals = [builder.phi(_FLOATS) for _ in range(ROWS * vectors)]
            place = builder.mul(pair, ir.Constant(kind, WIDTH))
            right = [builder.bitcast(line(builder.gep(one, [place])), _PAIRS) for one in columns]
            results = []
            for row in range(ROWS):
                word = builder.load(builder.gep(rows, [builder.add(place, kind(row))]), align=4)
                spread = builder.insert_element(_NOTHING, word, ir.IntType(32)(0))
                spread = builder.shuffle_vector(spread, _NOTHING, _INTS([0] * WIDTH))
                left = builder.bitcast(spread, _PAIRS)
                for number, one in enumerate(right):
                    total = totals[row * vectors + number]
                    results.append(builder.call(multiply, [total, left, one]))
            following = builder.add(pair, kind(1))
            pair.add_incoming(following, builder.basic_block)
            for total, result in zip(totals, results, strict=True):
                total.add_incoming(_FLOATS([0.0] * WIDTH), before)
                total.add_incoming(result, builder.basic_block)
            more = builder.icmp_signed("<", following, pairs)
            builder.cbranch(more, loop, behind)
            builder.position_at_end(behind)
            for number, result in enumerate(results):
                place = builder.gep(data(6), [kind(WIDTH * number)])
                builder.store(result, builder.bitcast(place, _FLOATS.as_pointer()), align=4)
            return context.get_dummy_value()

        place = types.intp
        return types.void(a, place, b, place, place, place, sums), generate

    return intrinsic(typed)


_one, _two, _three = (_tile(vectors) for vectors in range(1, _VECTORS + 1))


@intrinsic
def _prefetch(typingctx, array, offset):
    """Ask for the line of the cache at an offset of an array, to write there."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, *[ir.IntType(32)] * 3])
        operation = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_write, keep, of_data = (ir.IntType(32)(number) for number in (1, 3, 1))
        builder.call(operation, [place, to_write, keep, of_data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@compiled(numba.void(_NUMBERS, _COUNT, _COUNT, _COUNT, _WORDS))
def pack(x, stride, tokens, features, packed):
    """Lay tokens out for :func:`add_products`; what is missing of a pair or a line is zero.

    Args:
        x: The bits of bfloat16 numbers, each token's contiguous.
        stride: From one token to the next.
        tokens: How many.
        features: Of each.
        packed: int32 ``[ceil(features / 16) * ceil(tokens / 2) * 16]``, filled.
    """
    pairs = (tokens + 1) // 2
    whole = features // WIDTH * WIDTH
    nothing = np.zeros(features, np.int16)
    for pair in range(pairs):
        first = x[2 * pair * stride : 2 * pair * stride + features]
        second = nothing
        if 2 * pair + 1 < tokens:
            second = x[(2 * pair + 1) * stride : (2 * pair + 1) * stride + features]
        for feature in range(0, whole, WIDTH):
            line = packed[feature * pairs + pair * WIDTH : feature * pairs + (pair + 1) * WIDTH]
            for i in range(WIDTH):
                low = np.int32(first[feature + i]) & np.int32(0xFFFF)
                line[i] = low | np.int32(second[feature + i]) << np.int32(16)
        if whole < features:
            line = packed[whole * pairs + pair * WIDTH : whole * pairs + (pair + 1) * WIDTH]
            for i in range(WIDTH):
                line[i] = 0
            for i in range(features - whole):
                low = np.int32(first[whole + i]) & np.int32(0xFFFF)
                line[i] = low | np.int32(second[whole + i]) << np.int32(16)


@numba.njit(error_model="numpy")
def _multiply_tile(a, a_place, b, b_place, stride, pairs, vectors, sums):
    """Sums of a tile of so many vectors of columns, from none."""
    if vectors == _VECTORS:
        _three(a, a_place, b, b_place, stride, pairs, sums)
    elif vectors == _VECTORS - 1:
        _two(a, a_place, b, b_place, stride, pairs, sums)
    else:
        _one(a, a_place, b, b_place, stride, pairs, sums)


@numba.njit(error_model="numpy")
def _add_tile(sums, width, high, high_place, high_stride, low, low_place, low_stride, rows, count):
    """Add the first ``rows`` and ``count`` columns of a tile of ``width`` to running sums."""
    even = count // WIDTH * WIDTH
    for row in range(rows):
        above, below = high_place + row * high_stride, low_place + row * low_stride
        for k in range(0, even, WIDTH):
            before, term = load(high, above + k), load(sums, row * width + k)
            total = add(before, term)
            of_term = subtract(total, before)
            lost = add(load(low, below + k), subtract(term, of_term))
            store(low, below + k, add(lost, subtract(before, subtract(total, of_term))))
            store(high, above + k, total)
        for k in range(even, count):
            before, term = high[above + k], sums[row * width + k]
            total = before + term
            of_term = total - before
            lost = low[below + k] + (term - of_term)
            low[below + k] = lost + (before - (total - of_term))
            high[above + k] = total


@compiled(
    numba.void(
        *(_WORDS, _COUNT, _WORDS, _COUNT, _COUNT),
        *(_LINE, _COUNT, _LINE, _COUNT),
        *(_COUNT, _COUNT, _COUNT, numba.boolean),
    )
)
def add_products(
    a, a_place, b, b_place, pairs, high, high_stride, low, low_stride, first, last, columns, half
):
    """Add products of features to running sums, as :func:`prismquant.kernels.moments.two_sum` does.

    Args:
        a: Packed tokens, whose features the rows are.
        a_place: Of the line of row 0, in words.
        b: Packed tokens, whose features the columns are.
        b_place: Of the line of column 0.
        pairs: Of tokens, at least one.
        high: The sums, from the first row on, a stride apart.
        high_stride: From one row to the next.
        low: What rounding took from them, likewise.
        low_stride: Likewise.
        first: The first row to add to, a multiple of 8.
        last: The row to stop before.
        columns: Of each row.
        half: Whether the block lies on the diagonal: whole tiles above it are left out.
    """
    sums = np.empty(ROWS * _VECTORS * WIDTH, np.float32)
    stride = pairs * WIDTH
    for row in range(first, last, ROWS):
        rows = min(ROWS, last - row)
        reach = min(columns, row + ROWS) if half else columns
        left = a_place + row // WIDTH * WIDTH * pairs + row % WIDTH
        column = 0
        while column < reach:
            above, below = row * high_stride + column, row * low_stride + column
            vectors = min(_VECTORS, (reach - column + WIDTH - 1) // WIDTH)
            width = vectors * WIDTH
            # They arrive while the tile is multiplied.
            for i in range(rows):
                for k in range(0, width, WIDTH):
                    _prefetch(high, above + i * high_stride + k)
                    _prefetch(low, below + i * low_stride + k)
            right = b_place + column * pairs
            count = min(width, columns - column)
            for start in range(0, pairs, _SPAN):
                span, place = min(_SPAN, pairs - start), start * WIDTH
                _multiply_tile(a, left + place, b, right + place, stride, span, vectors, sums)
                _add_tile(
                    sums, width, high, above, high_stride, low, below, low_stride, rows, count
                )
            column += width


@compiled(
    numba.void(_WORDS, _COUNT, _LINE, _COUNT, _COUNT, _COUNT),
)
def subtract_products(packed, pairs, matrix, stride, first, last):
    """Subtract products of features from lines of a lower triangle.

    Args:
        packed: As many features as the matrix has columns, of tokens.
        pairs: Of these, at least one and at most 128, so that they are summed in one go.
        matrix: From its first number on, lines a stride apart.
        stride: From one line to the next.
        first: The first line to change, a multiple of 8.
        last: The line to stop before.
    """
    sums = np.empty(ROWS * _VECTORS * WIDTH, np.float32)
    line = pairs * WIDTH
    # Packed columns stay in the cache while the lines go by.
    for begin in range(0, last, _TOGETHER):
        for row in range(max(first, begin // ROWS * ROWS), last, ROWS):
            rows = min(ROWS, last - row)
            reach = min(begin + _TOGETHER, row + rows)
            left = row // WIDTH * line + row % WIDTH
            for column in range(begin, reach, _VECTORS * WIDTH):
                vectors = min(_VECTORS, (reach - column + WIDTH - 1) // WIDTH)
                for i in range(rows):
                    for k in range(0, vectors * WIDTH, WIDTH):
                        _prefetch(matrix, (row + i) * stride + column + k)
                right = column * pairs
                _multiply_tile(packed, left, packed, right, line, pairs, vectors, sums)
                for i in range(rows):
                    place, own = (row + i) * stride + column, i * vectors * WIDTH
                    count = min(vectors * WIDTH, reach - column, row + i + 1 - column)
                    even = count // WIDTH * WIDTH
                    for k in range(0, even, WIDTH):
                        known = load(matrix, place + k)
                        store(matrix, place + k, subtract(known, load(sums, own + k)))
                    for k in range(even, count):
                        matrix[place + k] -= sums[own + k]
