"""Grids, against their definitions in float64, against torch's casts and against the library."""

from __future__ import annotations

import functools
import itertools
import math

import compressed_tensors_library as library
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.numerics.grids import FloatGrid, IntGrid, integer_grid
from prismquant.numerics.kinds import FLOAT_KINDS, FloatKind

# Exponent and mantissa bits, the bias, and the largest number, as the standards give them.
STANDARD = {
    "e4m3": (4, 3, 7, 448.0),
    "e5m2": (5, 2, 15, 57344.0),
    "e3m2": (3, 2, 3, 28.0),
    "e2m3": (2, 3, 1, 7.5),
    "e2m1": (2, 1, 1, 6.0),
}


@functools.cache
def magnitudes(kind: str) -> list[float]:
    """All points from zero up, by code, from the definition of a floating-point number."""
    exponents, mantissas, bias, largest = STANDARD[kind]
    points = []
    for exponent, mantissa in itertools.product(range(2**exponents), range(2**mantissas)):
        lead = 0 if exponent == 0 else 2**mantissas
        points.append(math.ldexp(lead + mantissa, max(exponent, 1) - bias - mantissas))
    return [point for point in points if point <= largest]


def nearest(x: float, kind: str) -> tuple[float, int]:
    """The nearest point and its code without the sign; of two as near, the one of even code."""
    x = min(abs(x), STANDARD[kind][3])
    points = magnitudes(kind)
    code = min(range(len(points)), key=lambda c: (abs(points[c] - x), c % 2))
    return points[code], code


def trials(kind: str) -> Tensor:
    """Points, midpoints between them, their neighbours in float32, and what lies beyond."""
    points = torch.tensor(magnitudes(kind), dtype=torch.float64)
    middles = (points[1:] + points[:-1]) / 2
    beyond = torch.tensor([points[-1] * f for f in (1.01, 1.0625, 1.5, 100)] + [1e-45, 1e-30, 3e38])
    exact = torch.cat([points, middles, beyond.double()]).float()
    near = [torch.nextafter(exact, torch.full_like(exact, end)) for end in (math.inf, 0.0)]
    every = torch.cat([exact, *near])
    return torch.cat([every, -every])


def bits_of(x: Tensor) -> Tensor:
    """The bit patterns: tells -0.0 from 0.0."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_full_grid_is_two_s_complement(bits: int) -> None:
    grid = IntGrid(bits)
    assert (grid.qmin, grid.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert grid.levels == 2**bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_narrow_grid_is_symmetric_about_zero(bits: int) -> None:
    grid = IntGrid(bits, narrow=True)
    assert grid.qmin == -grid.qmax
    assert grid.levels == 2**bits - 1


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_other_widths_are_refused_with_the_legal_ones(bits: int) -> None:
    with pytest.raises(FormatError, match=rf"{bits} bits[\s\S]*2 to 8"):
        IntGrid(bits)


@pytest.mark.parametrize("bits", [4.0, "4", True, None])
def test_a_width_must_be_an_integer(bits: object) -> None:
    with pytest.raises(FormatError, match="must be an integer"):
        IntGrid(bits)  # type: ignore[arg-type]


def test_equal_grids_are_equal_and_frozen() -> None:
    assert IntGrid(4) == IntGrid(4, narrow=False)
    assert hash(IntGrid(4)) == hash(IntGrid(4))
    with pytest.raises(AttributeError):
        IntGrid(4).bits = 8  # type: ignore[misc]


def test_an_integer_grid_rounds_half_to_even_and_its_points_are_their_codes() -> None:
    x = torch.tensor([-9.0, -1.5, -0.4, 0.5, 1.5, 7.4, 99.0])
    points = IntGrid(4).round_(x)
    assert points is x
    assert points.tolist() == [-8, -2, 0, 0, 2, 7, 7]
    codes = torch.empty(7, dtype=torch.int8)
    IntGrid(4).write(points, codes)
    assert codes.tolist() == points.tolist()
    assert torch.equal(IntGrid(4).read(codes), points)


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_a_float_grid_has_the_points_of_the_standard(kind: FloatKind) -> None:
    """Every code that is a number, read and written again, is what the standard says."""
    grid, want = FloatGrid(kind), magnitudes(kind)
    codes = torch.tensor(range(len(want)), dtype=torch.int16)
    negative = (codes + (1 << (grid.bits - 1))).to(torch.int8)
    for own, sign in ((codes.to(torch.int8), 1.0), (negative, -1.0)):
        points = grid.read(own)
        expected = torch.tensor(want) * sign
        assert torch.equal(bits_of(points), bits_of(expected))
        assert torch.equal(bits_of(grid.round_(expected.clone())), bits_of(expected))
        again = torch.empty_like(own)
        grid.write(points, again)
        assert torch.equal(again, own)
    assert grid.largest == grid.span == max(want)
    assert len(want) == 2 ** (grid.bits - 1) - {"e4m3": 1, "e5m2": 4}.get(kind, 0)
    assert grid.mantissa == STANDARD[kind][1]


@pytest.mark.parametrize("kind", FLOAT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_goes_to_the_nearest_point_and_half_to_the_even_code(
    kind: FloatKind, dtype: torch.dtype
) -> None:
    grid, x = FloatGrid(kind), trials(kind).to(dtype)
    want = [math.copysign(nearest(v, kind)[0], v) for v in x.tolist()]
    rounded = grid.round_(x.clone())
    assert rounded.dtype == dtype
    assert torch.equal(bits_of(rounded), bits_of(torch.tensor(want, dtype=dtype)))
    codes = torch.empty(x.shape, dtype=torch.int8)
    grid.write(rounded, codes)
    sign = 1 << (grid.bits - 1)
    patterns = [nearest(v, kind)[1] + sign * (math.copysign(1, v) < 0) for v in x.tolist()]
    assert [code % 2**grid.bits for code in codes.tolist()] == patterns


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_eight_bits_are_what_torch_casts_to(kind: FloatKind) -> None:
    """For every finite bfloat16 and float16, and every neighbour of a tie."""
    grid = FloatGrid(kind)
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    every = [patterns.view(d).float() for d in (torch.bfloat16, torch.float16)] + [trials(kind)]
    x = torch.cat([part[part.isfinite()] for part in every])
    assert grid.dtype is not None
    cast = x.clamp(-grid.largest, grid.largest).to(grid.dtype)
    points = grid.round_(x.clone())
    assert torch.equal(bits_of(points), bits_of(cast.float()))
    codes = torch.empty(x.shape, dtype=torch.int8)
    grid.write(points, codes)
    assert torch.equal(codes, cast.view(torch.int8))
    assert torch.equal(bits_of(grid.read(codes)), bits_of(points))


def test_four_bits_are_what_the_library_rounds_to() -> None:
    x = torch.cat([trials("e2m1"), torch.randn(5000, generator=torch.Generator().manual_seed(0))])
    want = library.cast_to_fp4(x.clamp(-6, 6))
    assert torch.equal(FloatGrid("e2m1").round_(x.clone()), want)


def test_six_bits_are_what_the_library_rounds_to() -> None:
    x = torch.cat([trials("e2m3"), torch.randn(5000, generator=torch.Generator().manual_seed(0))])
    assert torch.equal(FloatGrid("e2m3").round_(x.clone()), library.cast_to_fp6(x.clamp(-7.5, 7.5)))


def test_float64_is_rounded_once() -> None:
    """A hair above a tie, too fine for float32, goes up; by way of float32 it would go to even."""
    tie = torch.tensor([1.0625 + 2**-40, -(1.0625 + 2**-40)], dtype=torch.float64)
    assert FloatGrid("e4m3").round_(tie).tolist() == [1.125, -1.125]


@pytest.mark.parametrize("grid", [IntGrid(4), *map(FloatGrid, FLOAT_KINDS)], ids=str)
def test_rounding_into_another_tensor_leaves_the_values_alone(grid: IntGrid | FloatGrid) -> None:
    x = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).T
    before, out = x.clone(), torch.empty_like(x)
    assert grid.rounded(x, out=out) is out
    assert torch.equal(x, before)
    assert torch.equal(out, grid.round_(before))


@given(
    kind=st.sampled_from(FLOAT_KINDS),
    values=st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=20),
)
def test_no_point_is_nearer_than_the_one_chosen(kind: FloatKind, values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    points = torch.tensor(magnitudes(kind), dtype=torch.float64)
    every = torch.cat([points, -points])
    least = (x.clamp(-points[-1], points[-1])[:, None] - every).abs().amin(1)
    chosen = FloatGrid(kind).round_(x.clone())
    assert torch.equal((x.clamp(-points[-1], points[-1]) - chosen).abs(), least)


def test_no_gradient_comes_through_either_kind() -> None:
    for grid in (IntGrid(4), FloatGrid("e4m3")):
        x = torch.randn(4, requires_grad=True)
        grid.round_(x * 1.0).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0.0] * 4


def test_other_float_grids_and_dtypes_are_refused() -> None:
    with pytest.raises(FormatError, match="did you mean 'e4m3'"):
        FloatGrid("e4m3fn")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="bfloat16"):
        FloatGrid("e4m3").round_(torch.zeros(2, dtype=torch.bfloat16))


def test_only_integers_take_a_zero_point() -> None:
    assert integer_grid(IntGrid(3)) == IntGrid(3)
    with pytest.raises(FormatError, match="e2m1 numbers are symmetric about zero"):
        integer_grid(FloatGrid("e2m1"))
