"""Sixteen float32 numbers that numba computes with at once, as a type of their own.

A loop that numba compiles is turned into vector instructions where its compiler can prove that this
is safe, which is easily lost, and never keeps an array in registers. Here the vectors are written
out instead: a variable of this type is a register (one of AVX-512, two of AVX2, four of NEON), and
each function below stands for one instruction or a few. None of them is reordered, and only
:func:`multiply_add` rounds once instead of twice.

Only kernels for CPUs import this file, which needs the package ``numba``.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types, typing
from numba.extending import intrinsic, models, register_model

# Numbers in a vector.
WIDTH = 16

_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_INTS = ir.VectorType(ir.IntType(32), WIDTH)
_BYTES = ir.VectorType(ir.IntType(8), WIDTH)
_HALVES = ir.VectorType(ir.IntType(16), WIDTH)
# Of a float32: the bits of the exponent, and the sign.
_EXPONENT = 0x7F80_0000
_SIGN = 0x8000_0000
# Bits of its mantissa that are stored, and what its exponents are counted from.
_MANTISSA = 23
_BIAS = 127


class Lanes(types.Type):
    """The type, as numba sees it."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    """A vector of the machine."""

    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _FLOATS)


LANES = Lanes()


def _place(context, builder, signature, arguments, element):
    """Pointer to ``WIDTH`` elements of the first argument, from the second on."""
    data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), element.as_pointer())


def _constant(value):
    return ir.Constant(_INTS, [value] * WIDTH)


def _everywhere(builder, scalar, kind):
    """One number in all places of a vector."""
    nothing = ir.Constant(kind, ir.Undefined)
    vector = builder.insert_element(nothing, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(vector, nothing, _constant(0))


@intrinsic
def load(typingctx, array, offset):
    """The numbers from an offset, in elements, behind the first of a float32 array."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments, _FLOATS)
        return builder.load(place, align=4)

    return LANES(array, types.intp), generate


@intrinsic
def load_upper(typingctx, array, offset):
    """Numbers of which an int16 array holds the upper halves, as bfloat16 does."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments, _HALVES)
        bits = builder.zext(builder.load(place, align=2), _INTS)
        return builder.bitcast(builder.shl(bits, _constant(16)), _FLOATS)

    return LANES(array, types.intp), generate


def unpacker(width, *, first):
    """A function that unpacks sixteen words, each of so many parts as fit in it.

    Args:
        width: Bits of a part.
        first: Whether parts replace what a buffer holds; else they are added to it.

    Returns:
        ``unpack(words, place, buffer, offset, value)``: of the int32 words from ``place`` on, the
        lowest parts go to the sixteen numbers from ``offset`` on of a float32 buffer, the next to
        the sixteen behind, and so on. What goes there is a part less ``value``, or what is there
        plus a part times ``value``.
    """

    @intrinsic
    def unpack(typingctx, words, place, buffer, offset, value):
        def generate(context, builder, signature, arguments):
            words, place, buffer, offset, value = arguments
            typed = signature.args
            given = typing.signature(types.void, typed[0], typed[1])
            address = _place(context, builder, given, (words, place), _INTS)
            word = builder.load(address, align=4)
            value = _everywhere(builder, value, _FLOATS)
            target = typing.signature(types.void, typed[2], typed[3])
            start = _place(context, builder, target, (buffer, offset), _FLOATS)
            for number in range(32 // width):
                bits = builder.lshr(word, _constant(width * number))
                part = builder.sitofp(builder.and_(bits, _constant((1 << width) - 1)), _FLOATS)
                own = builder.gep(start, [ir.Constant(ir.IntType(32), number)])
                if first:
                    part = builder.fsub(part, value)
                else:
                    part = builder.fadd(builder.load(own, align=4), builder.fmul(part, value))
                builder.store(part, own, align=4)
            return context.get_dummy_value()

        return types.void(words, types.intp, buffer, types.intp, types.float32), generate

    return unpack


@intrinsic
def from_patterns(typingctx, value, sign, mantissa, bias):
    """Numbers of a floating-point format, whose bit patterns are given as whole numbers.

    Numbers below the smallest normal one are counted, not shifted into place: a processor that
    takes them as zero changes none.

    Args:
        typingctx: numba's.
        value: The patterns, from 0 on.
        sign: Which bit the sign is, int32.
        mantissa: Bits of the mantissa that are stored, int32.
        bias: What exponents are counted from, int32.
    """

    def generate(context, builder, signature, arguments):
        value, sign, mantissa, bias = arguments
        sign, mantissa, bias = (_everywhere(builder, n, _INTS) for n in (sign, mantissa, bias))
        code = builder.fptosi(value, _INTS)
        negative = builder.lshr(code, sign)
        magnitude = builder.sub(code, builder.shl(negative, sign))
        up = builder.sub(_constant(_MANTISSA), mantissa)
        moved = builder.shl(builder.sub(_constant(_BIAS), bias), _constant(_MANTISSA))
        normal = builder.bitcast(builder.add(builder.shl(magnitude, up), moved), _FLOATS)
        # The spacing of the smallest numbers is a power of two.
        power = builder.sub(builder.sub(_constant(_BIAS + 1), bias), mantissa)
        spacing = builder.bitcast(builder.shl(power, _constant(_MANTISSA)), _FLOATS)
        small = builder.fmul(builder.sitofp(magnitude, _FLOATS), spacing)
        first = builder.shl(_constant(1), mantissa)
        chosen = builder.select(builder.icmp_signed("<", magnitude, first), small, normal)
        signs = builder.shl(negative, _constant(31))
        return builder.bitcast(builder.or_(builder.bitcast(chosen, _INTS), signs), _FLOATS)

    return LANES(LANES, types.int32, types.int32, types.int32), generate


@intrinsic
def store(typingctx, array, offset, value):
    """Leave numbers at an offset of a float32 array."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments, _FLOATS)
        builder.store(arguments[2], place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, LANES), generate


@intrinsic
def store_bytes(typingctx, array, offset, value):
    """Leave whole numbers at an offset of an int8 array."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments, _BYTES)
        builder.store(builder.fptosi(arguments[2], _BYTES), place, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, LANES), generate


@intrinsic
def spread(typingctx, value):
    """One float32 in all places."""

    def generate(context, builder, signature, arguments):
        return _everywhere(builder, arguments[0], _FLOATS)

    return LANES(types.float32), generate


def _of_two(name):
    """An operation on two vectors."""

    def typed(typingctx, a, b):
        def generate(context, builder, signature, arguments):
            return getattr(builder, name)(*arguments)

        return LANES(LANES, LANES), generate

    return intrinsic(typed)


add, subtract, multiply, divide = (_of_two(name) for name in ("fadd", "fsub", "fmul", "fdiv"))


@intrinsic
def multiply_add(typingctx, a, b, c):
    """``a b + c``, rounded once where the processor can."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        operation = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32")
        return builder.call(operation, arguments)

    return LANES(LANES, LANES, LANES), generate


@intrinsic
def clamp(typingctx, value, lowest, highest):
    """Values moved between two bounds; NaN stays."""

    def generate(context, builder, signature, arguments):
        value, lowest, highest = arguments
        value = builder.select(builder.fcmp_ordered("<", value, lowest), lowest, value)
        return builder.select(builder.fcmp_ordered(">", value, highest), highest, value)

    return LANES(LANES, LANES, LANES), generate


@intrinsic
def power_below(typingctx, value, smallest):
    """The power of two at or below each magnitude, but no less than ``smallest``."""

    def generate(context, builder, signature, arguments):
        value, smallest = arguments
        bits = builder.and_(builder.bitcast(value, _INTS), _constant(_EXPONENT))
        power = builder.bitcast(bits, _FLOATS)
        return builder.select(builder.fcmp_ordered("<", power, smallest), smallest, power)

    return LANES(LANES, LANES), generate


@intrinsic
def with_sign(typingctx, value, sign):
    """Magnitudes of ``value``, signs of ``sign``."""

    def generate(context, builder, signature, arguments):
        value, sign = (builder.bitcast(one, _INTS) for one in arguments)
        magnitude = builder.and_(value, _constant(_SIGN - 1))
        signs = builder.and_(sign, _constant(_SIGN))
        return builder.bitcast(builder.or_(magnitude, signs), _FLOATS)

    return LANES(LANES, LANES), generate


@intrinsic
def differ(typingctx, a, b):
    """Whether any two numbers are not the same."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(builder.fcmp_unordered("!=", *arguments), ir.IntType(WIDTH))
        return builder.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(WIDTH), 0))

    return types.boolean(LANES, LANES), generate


@intrinsic
def store_patterns(typingctx, array, offset, value, smallest, mantissa, sign):
    """Leave the codes of points of a floating-point grid at an offset of an int8 array.

    A code counts spacings from the foot of the binade, and binades; the leading one that normal
    numbers do not store makes up for the zero that the first exponent is.

    Args:
        typingctx: numba's.
        array: int8.
        offset: In elements.
        value: The points.
        smallest: The smallest normal number of the grid, float32.
        mantissa: Bits of the mantissa that are stored, int32.
        sign: Which bit the sign is, int32.
    """

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments, _BYTES)
        value, smallest, mantissa, sign = arguments[2:]
        least = builder.bitcast(_everywhere(builder, smallest, _FLOATS), _INTS)
        bits = builder.bitcast(value, _INTS)
        magnitude = builder.and_(bits, _constant(_SIGN - 1))
        power = builder.and_(bits, _constant(_EXPONENT))
        # Of positive numbers, bits are in the order of values.
        power = builder.select(builder.icmp_unsigned("<", power, least), least, power)
        shift = _everywhere(builder, mantissa, _INTS)
        scale = builder.uitofp(builder.shl(_constant(1), shift), _FLOATS)
        ratio = builder.fdiv(builder.bitcast(magnitude, _FLOATS), builder.bitcast(power, _FLOATS))
        code = builder.fptosi(builder.fmul(ratio, scale), _INTS)
        binade = builder.lshr(builder.sub(power, least), _constant(_MANTISSA))
        code = builder.add(code, builder.shl(binade, shift))
        negative = builder.lshr(bits, _constant(31))
        code = builder.or_(code, builder.shl(negative, _everywhere(builder, sign, _INTS)))
        builder.store(builder.trunc(code, _BYTES), place, align=1)
        return context.get_dummy_value()

    scalars = types.float32, types.int32, types.int32
    return types.void(array, types.intp, LANES, *scalars), generate
