"""The affine map, against float64 arithmetic by hand and against the compressed-tensors library."""

from __future__ import annotations

import math

import compressed_tensors_library as library
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prismquant.errors import FormatError, NumericsError
from prismquant.numerics.affine import (
    dequantize,
    dynamic_scale_zero_point,
    extremes,
    quantize,
    scale_zero_point,
    simulate,
)
from prismquant.numerics.finite import all_finite, check_finite
from prismquant.numerics.grids import FloatGrid, Grid, IntGrid
from prismquant.numerics.grouping import from_groups, to_groups
from prismquant.numerics.kinds import FLOAT_KINDS, FloatKind, Granularity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNITS = [
    (Granularity.TENSOR, None),
    (Granularity.CHANNEL, None),
    (Granularity.TOKEN, None),
    (Granularity.GROUP, 8),
]


def sample(
    seed: int, *shape: int, dtype: torch.dtype = torch.float32, spread: float = 0.0
) -> Tensor:
    """Normal values; with ``spread``, rows of very different magnitude."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    if spread:
        values *= 10 ** (spread * (torch.rand(*shape[:-1], 1, generator=generator) - 0.5))
    return values.to(dtype)


def bits_of(x: Tensor) -> Tensor:
    """The bit patterns: tells -0.0 from 0.0."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


# --- groups -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "size", "expected"),
    [
        (Granularity.TENSOR, None, (1, 96)),
        (Granularity.CHANNEL, None, (2, 3, 1, 16)),
        (Granularity.TOKEN, None, (2, 3, 1, 16)),
        (Granularity.GROUP, 4, (2, 3, 4, 4)),
    ],
)
def test_groups_put_what_shares_a_scale_on_the_last_axis(
    granularity: Granularity, size: int | None, expected: tuple[int, ...]
) -> None:
    x = sample(0, 2, 3, 16)
    groups = to_groups(x, granularity, size)
    assert tuple(groups.shape) == expected
    assert groups.data_ptr() == x.data_ptr()
    assert torch.equal(from_groups(groups, x.shape), x)
    scale, _ = dynamic_scale_zero_point(x, IntGrid(8), True, granularity, size)
    assert tuple(scale.shape) == expected[:-1]


def test_a_group_size_that_does_not_divide_names_both_numbers_and_the_legal_sizes() -> None:
    with pytest.raises(FormatError) as caught:
        to_groups(torch.zeros(2, 96), Granularity.GROUP, 64)
    message = str(caught.value)
    assert "64" in message
    assert "96" in message
    assert "1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96" in message


@pytest.mark.parametrize("size", [None, 0, -1])
def test_group_granularity_needs_a_positive_size(size: int | None) -> None:
    with pytest.raises(FormatError, match="positive group size"):
        to_groups(torch.zeros(2, 8), Granularity.GROUP, size)


def test_a_scalar_has_no_channels() -> None:
    with pytest.raises(FormatError, match="scalar"):
        to_groups(torch.tensor(1.0), Granularity.CHANNEL)


# --- scales -----------------------------------------------------------------------------------


def test_symmetric_scale_of_a_full_grid_is_absmax_over_half_the_steps() -> None:
    scale, zero = scale_zero_point(
        torch.tensor([-3.0, -1.0]), torch.tensor([1.0, 15.0]), IntGrid(4), True, torch.float32
    )
    assert zero is None
    assert scale.tolist() == [pytest.approx(0.4), 2.0]


def test_symmetric_scale_of_a_narrow_grid_puts_absmax_on_the_outermost_code() -> None:
    scale, _ = scale_zero_point(
        torch.tensor([-14.0]), torch.tensor([1.0]), IntGrid(4, narrow=True), True, torch.float32
    )
    assert scale.item() == 2.0


def test_asymmetric_scale_covers_the_range_and_its_zero_point_fits_the_rounded_scale() -> None:
    low, high = torch.tensor([-1.0, 0.0, -9.0]), torch.tensor([2.3, 5.0, 0.0])
    scale, zero = scale_zero_point(low, high, IntGrid(4), False, torch.bfloat16)
    assert zero is not None
    assert scale.dtype == torch.bfloat16
    assert torch.equal(scale, ((high - low) / 15).to(torch.bfloat16))
    assert zero.dtype == torch.int8
    assert zero.tolist() == [round(-8 + 1.0 / scale[0].item()), -8, 7]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_beside_zero_is_widened_to_hold_it(symmetric: bool) -> None:
    for low, high in ((2.0, 6.0), (-6.0, -2.0)):
        ends = (torch.tensor([low]), torch.tensor([high]))
        zero_held = (ends[0].clamp(max=0), ends[1].clamp(min=0))
        assert scale_zero_point(*ends, IntGrid(8), symmetric, torch.float32) == scale_zero_point(
            *zero_held, IntGrid(8), symmetric, torch.float32
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_of_zero_width_has_scale_one(symmetric: bool, dtype: torch.dtype) -> None:
    ends = torch.zeros(3, 1)
    scale, zero = scale_zero_point(ends, ends, IntGrid(4), symmetric, dtype)
    assert scale.tolist() == [[1.0]] * 3
    x = torch.zeros(3, 8)
    assert torch.equal(simulate(x, scale, zero, IntGrid(4), Granularity.CHANNEL), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_neither_underflow_nor_overflow_their_dtype(
    symmetric: bool, dtype: torch.dtype
) -> None:
    high = torch.tensor([1e-45, 1e-38, 1e-7, 1e-3, 1e6, 3.4e38])
    scale, zero = scale_zero_point(-high, high, IntGrid(2), symmetric, dtype)
    limits = torch.finfo(dtype)
    assert scale.dtype == dtype
    assert bool(torch.isfinite(scale).all())
    assert float(scale.float().min()) >= limits.smallest_normal
    assert float(scale.float().max()) <= limits.max
    assert zero is None or zero.dtype == torch.int8


def test_a_range_wider_than_float32_still_has_the_right_scale() -> None:
    low, high = torch.tensor([-3e38]), torch.tensor([3e38])
    scale, zero = scale_zero_point(low, high, IntGrid(8), False, torch.float32)
    assert scale.item() == pytest.approx(6e38 / 255, rel=1e-6)
    assert zero is not None
    assert abs(zero.item()) <= 1


def test_only_the_three_scale_dtypes_are_allowed() -> None:
    with pytest.raises(FormatError, match="float64"):
        scale_zero_point(torch.zeros(1), torch.ones(1), IntGrid(8), True, torch.float64)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ranges_that_are_not_finite_are_refused(bad: float) -> None:
    for ends in ((bad, 1.0), (-1.0, bad)):
        with pytest.raises(NumericsError, match="end of a range"):
            scale_zero_point(
                torch.tensor([ends[0]]), torch.tensor([ends[1]]), IntGrid(8), True, torch.float32
            )


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([-3.0, 0.0, 3.0]),
)
def test_zero_is_always_exact_and_values_in_range_err_by_half_a_step(
    bits: int, symmetric: bool, seed: int, dtype: torch.dtype, offset: float
) -> None:
    """In float64, from the stored scale; a clipped end may err by the scale's rounding more."""
    x = sample(seed, 4, 16) + offset
    x[:, 0] = 0.0
    grid = IntGrid(bits)
    scale, zero = dynamic_scale_zero_point(x, grid, symmetric, Granularity.CHANNEL, None, dtype)
    got = simulate(x, scale, zero, grid, Granularity.CHANNEL).double()
    assert bool((got[:, 0] == 0).all())
    shift = torch.zeros_like(scale).double() if zero is None else zero.double()
    step = scale.double()
    held = (x.double() / step + shift >= grid.qmin) & (x.double() / step + shift <= grid.qmax)
    error = (got - x.double()).abs()
    assert bool((error <= step * (0.5 + 1e-4))[held].all())
    slack = 0.5 + grid.levels * torch.finfo(dtype).eps + 1e-4
    assert bool((error <= step * (0.5 + slack)).all())


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_the_scale_of_a_float_grid_puts_the_largest_magnitude_on_the_outermost_point(
    kind: FloatKind,
) -> None:
    grid = FloatGrid(kind)
    low, high = torch.tensor([-3.0, -1.0]), torch.tensor([1.0, 15.0])
    scale, zero = scale_zero_point(low, high, grid, True, torch.float32)
    assert zero is None
    assert torch.equal(scale, torch.tensor([3.0, 15.0]) / grid.largest)
    x = torch.tensor([[-3.0, 1.0], [-1.0, 15.0]])
    codes = quantize(x, scale[:, None], None, grid, Granularity.CHANNEL)
    assert grid.read(codes)[[0, 1], [0, 1]].tolist() == [-grid.largest, grid.largest]


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_float_grids_take_no_zero_point(kind: FloatKind) -> None:
    ends, one = (-torch.ones(1), torch.ones(1)), torch.ones(1)
    with pytest.raises(FormatError, match="symmetric about zero"):
        scale_zero_point(*ends, FloatGrid(kind), False, torch.float32)
    zero, x = torch.zeros(1, dtype=torch.int8), torch.ones(2, 4)
    for call in (quantize, simulate):
        with pytest.raises(FormatError, match="symmetric about zero"):
            call(x, one, zero, FloatGrid(kind), Granularity.TENSOR)


# --- the map ----------------------------------------------------------------------------------


def test_codes_round_half_to_even_after_clamping() -> None:
    x = torch.tensor([[-9.0, -8.4, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.4, 99.0]])
    codes = quantize(x, torch.ones(1), None, IntGrid(4), Granularity.TENSOR)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[-8, -8, -2, 0, 0, 2, 2, 6, 7, 7]]


def test_the_zero_point_is_added_before_rounding() -> None:
    """0.5 + 1 rounds to 2, although 0.5 alone would round to 0."""
    zero = torch.ones(1, dtype=torch.int8)
    codes = quantize(torch.tensor([[0.5]]), torch.ones(1), zero, IntGrid(4), Granularity.TENSOR)
    assert codes.item() == 2


@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    narrow=st.booleans(),
    symmetric=st.booleans(),
    unit=st.sampled_from(UNITS),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    lead=st.sampled_from([(3,), (2, 5), (1,), (2, 1, 3)]),
)
def test_simulation_is_dequantized_codes_bit_for_bit(
    seed: int,
    bits: int,
    narrow: bool,
    symmetric: bool,
    unit: tuple[Granularity, int | None],
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    lead: tuple[int, ...],
) -> None:
    granularity, size = unit
    grid = IntGrid(bits, narrow)
    x = sample(seed, *lead, 24, dtype=dtype, spread=4.0)
    scale, zero = dynamic_scale_zero_point(x, grid, symmetric, granularity, size, scale_dtype)
    codes = quantize(x, scale, zero, grid, granularity, size)
    assert grid.qmin <= int(codes.min()) <= int(codes.max()) <= grid.qmax
    want = dequantize(codes, scale, zero, granularity, size, dtype)
    got = simulate(x, scale, zero, grid, granularity, size)
    assert got.dtype == dtype
    assert torch.equal(bits_of(got), bits_of(want))


@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(FLOAT_KINDS),
    unit=st.sampled_from(UNITS),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    lead=st.sampled_from([(3,), (2, 5), (1,), (2, 1, 3)]),
)
def test_simulation_on_float_grids_is_dequantized_codes_bit_for_bit(
    seed: int,
    kind: FloatKind,
    unit: tuple[Granularity, int | None],
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    lead: tuple[int, ...],
) -> None:
    """Negative zeros included; and the values are a point of the grid times the scale."""
    granularity, size = unit
    grid = FloatGrid(kind)
    x = sample(seed, *lead, 24, dtype=dtype, spread=4.0)
    scale, _ = dynamic_scale_zero_point(x, grid, True, granularity, size, scale_dtype)
    codes = quantize(x, scale, None, grid, granularity, size)
    want = dequantize(codes, scale, None, granularity, size, dtype, grid)
    got = simulate(x, scale, None, grid, granularity, size)
    assert got.dtype == dtype
    assert torch.equal(bits_of(got), bits_of(want))
    steps = to_groups(x, granularity, size).float() / scale.float().unsqueeze(-1)
    points = grid.round_(steps) * scale.float().unsqueeze(-1)
    assert torch.equal(from_groups(points, x.shape).to(dtype), got)


def test_codes_are_those_of_float64_arithmetic_wherever_it_is_not_a_tie() -> None:
    x = sample(1, 64, 64)
    grid = IntGrid(4)
    scale, zero = dynamic_scale_zero_point(x, grid, False, Granularity.GROUP, 16, torch.bfloat16)
    assert zero is not None
    exact = to_groups(x, Granularity.GROUP, 16).double() / scale.double().unsqueeze(-1)
    exact = (exact + zero.double().unsqueeze(-1)).clamp(grid.qmin, grid.qmax)
    codes = to_groups(quantize(x, scale, zero, grid, Granularity.GROUP, 16), Granularity.GROUP, 16)
    clear = ((exact - exact.floor()) - 0.5).abs() > 1e-5
    assert bool((codes.double() == exact.round())[clear].all())
    assert float(clear.float().mean()) > 0.99


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_large_tensors_on_float_grids_go_in_pieces_without_a_seam(kind: FloatKind) -> None:
    x, grid = sample(2, 300, 1000, spread=2.0), FloatGrid(kind)
    for granularity, size in UNITS[1:]:
        scale, _ = dynamic_scale_zero_point(x, grid, True, granularity, size)
        whole = quantize(x, scale, None, grid, granularity, size)
        for i in (0, 130, 131, 132, 299):
            own = quantize(x[i : i + 1], scale[i : i + 1], None, grid, granularity, size)
            assert torch.equal(whole[i : i + 1], own)


def test_large_tensors_go_in_pieces_without_a_seam() -> None:
    """Bigger than one piece, and rows that do not tile it."""
    x = sample(2, 300, 1000, spread=2.0)
    grid = IntGrid(8)
    for granularity, size in UNITS:
        scale, zero = dynamic_scale_zero_point(x, grid, False, granularity, size)
        whole = quantize(x, scale, zero, grid, granularity, size)
        if granularity == Granularity.TENSOR:
            parts = [quantize(row[None], scale, zero, grid, granularity, size) for row in x]
        else:
            assert zero is not None
            parts = [
                quantize(x[i : i + 1], scale[i : i + 1], zero[i : i + 1], grid, granularity, size)
                for i in range(len(x))
            ]
        assert torch.equal(whole, torch.cat(parts))


def test_the_input_is_left_as_it_was_and_may_be_strided() -> None:
    x = sample(3, 32, 24).T
    before = x.clone()
    grid = IntGrid(4)
    scale, zero = dynamic_scale_zero_point(x, grid, True, Granularity.CHANNEL)
    got = simulate(x, scale, zero, grid, Granularity.CHANNEL)
    assert torch.equal(x, before)
    assert torch.equal(got, simulate(before.contiguous(), scale, zero, grid, Granularity.CHANNEL))


@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0,), (2, 0, 16)])
@pytest.mark.parametrize(("granularity", "size"), UNITS)
@pytest.mark.parametrize("grid", [IntGrid(8), FloatGrid("e4m3"), FloatGrid("e2m1")], ids=str)
def test_empty_tensors_pass_through(
    shape: tuple[int, ...], granularity: Granularity, size: int | None, grid: Grid
) -> None:
    x = torch.zeros(shape)
    scale, zero = dynamic_scale_zero_point(x, grid, True, granularity, size)
    assert scale.shape == to_groups(x, granularity, size).shape[:-1]
    assert bool((scale == 1).all())
    assert simulate(x, scale, zero, grid, granularity, size).shape == x.shape
    assert quantize(x, scale, zero, grid, granularity, size).dtype == torch.int8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused_with_their_place(
    bad: float, dtype: torch.dtype
) -> None:
    x = sample(4, 4, 8, dtype=dtype)
    x[2, 5] = bad
    one = torch.ones(1)
    calls = [
        lambda: quantize(x, one, None, IntGrid(8), Granularity.TENSOR),
        lambda: simulate(x, one, None, IntGrid(8), Granularity.TENSOR),
        lambda: extremes(x, Granularity.TOKEN),
        lambda: check_finite(x, "it"),
    ]
    for call in calls:
        with pytest.raises(NumericsError, match=rf"{bad}.*\[2, 5\]"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_that_overflows_is_not_taken_for_an_infinite_value(dtype: torch.dtype) -> None:
    x = torch.full((40, 50), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(x)
    for bad in (torch.inf, -torch.inf, torch.nan):
        x[17, 3] = bad
        assert not all_finite(x)
        assert not all_finite(x.mT)
    x[17, 4] = torch.inf
    x[17, 3] = -torch.inf
    assert not all_finite(x)


def test_integers_cannot_be_quantized() -> None:
    with pytest.raises(FormatError, match="int64"):
        quantize(torch.arange(4)[None], torch.ones(1), None, IntGrid(8), Granularity.TENSOR)


def test_a_scale_of_the_wrong_shape_is_refused_with_its_shape() -> None:
    x = sample(5, 4, 16)
    with pytest.raises(FormatError, match=r"\[3, 1\].*4 rows of 1 groups"):
        simulate(x, torch.ones(3, 1), None, IntGrid(8), Granularity.CHANNEL)
    with pytest.raises(FormatError, match="zero point"):
        simulate(
            x,
            torch.ones(4, 1),
            torch.zeros(2, 1, dtype=torch.int8),
            IntGrid(8),
            Granularity.CHANNEL,
        )


# --- the compressed-tensors library -----------------------------------------------------------


def dynamic_args(bits: int, symmetric: bool, granularity: Granularity, size: int | None) -> object:
    return library.QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy=granularity.value,
        group_size=size,
        dynamic=True,
    )


@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    unit=st.sampled_from([UNITS[0], UNITS[2], UNITS[3]]),
    offset=st.sampled_from([-2.0, 0.0, 2.0]),
)
def test_dynamic_activations_equal_the_library_in_float32(
    seed: int,
    bits: int,
    symmetric: bool,
    unit: tuple[Granularity, int | None],
    offset: float,
) -> None:
    """Scales, zero points and simulated values, for the three-axis activations of a model."""
    granularity, size = unit
    x = sample(seed, 2, 7, 32, spread=3.0) + offset
    args = dynamic_args(bits, symmetric, granularity, size)
    their_scale, their_zero = library.compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    scale, zero = dynamic_scale_zero_point(x, IntGrid(bits), symmetric, granularity, size)
    assert torch.equal(scale.flatten(), their_scale.flatten())
    if zero is not None:
        assert torch.equal(zero.flatten(), their_zero.flatten().to(torch.int8))
    got = simulate(x, scale, zero, IntGrid(bits), granularity, size)
    want = library.fake_quantize(x, their_scale, their_zero, args)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_activations_in_16_bits_are_a_code_from_the_library_and_nearer_the_input(
    symmetric: bool, dtype: torch.dtype
) -> None:
    """The library divides in 16 bits, we in float32: its zero point may be a code off as well."""
    x = sample(6, 2, 64, 128, dtype=dtype, spread=2.0)
    args = dynamic_args(8, symmetric, Granularity.TOKEN, None)
    their_scale, their_zero = library.compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    scale, zero = dynamic_scale_zero_point(x, IntGrid(8), symmetric, Granularity.TOKEN)
    assert scale.dtype == dtype
    torch.testing.assert_close(scale, their_scale, rtol=torch.finfo(dtype).eps, atol=0)
    ours = simulate(x, scale, zero, IntGrid(8), Granularity.TOKEN).double()
    theirs = library.fake_quantize(x, their_scale, their_zero, args).double()
    exact = x.double()
    codes = 1 if symmetric else 2
    rounding = torch.finfo(dtype).eps * exact.abs()
    assert bool(((ours - theirs).abs() <= codes * (scale.double() + rounding)).all())
    if symmetric:
        assert torch.equal(scale, their_scale)
    assert float((ours - exact).norm()) <= float((theirs - exact).norm())


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_activations_equal_the_library_in_float32(symmetric: bool) -> None:
    x = sample(7, 2, 9, 32)
    args = library.QuantizationArgs(num_bits=8, symmetric=symmetric, strategy="tensor")
    low, high = torch.tensor([-1.7]), torch.tensor([2.9])
    their_scale, their_zero = library.calculate_qparams(low, high, args)
    scale, zero = scale_zero_point(low, high, IntGrid(8), symmetric, torch.float32)
    assert torch.equal(scale, their_scale)
    got = simulate(x, scale, zero, IntGrid(8), Granularity.TENSOR)
    assert torch.equal(got, library.fake_quantize(x, their_scale, their_zero, args))


def float_args(bits: int, granularity: Granularity, size: int | None, dynamic: bool) -> object:
    return library.QuantizationArgs(
        num_bits=bits,
        type="float",
        symmetric=True,
        strategy=granularity.value,
        group_size=size,
        dynamic=dynamic,
    )


@given(
    seed=st.integers(0, 10_000),
    grid=st.sampled_from([FloatGrid("e4m3"), FloatGrid("e2m1")]),
    unit=st.sampled_from([UNITS[0], UNITS[2], UNITS[3]]),
)
def test_dynamic_activations_on_float_grids_equal_the_library_in_float32(
    seed: int, grid: FloatGrid, unit: tuple[Granularity, int | None]
) -> None:
    granularity, size = unit
    x = sample(seed, 2, 7, 32, spread=3.0)
    args = float_args(grid.bits, granularity, size, dynamic=True)
    their_scale, _ = library.compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    scale, zero = dynamic_scale_zero_point(x, grid, True, granularity, size)
    assert zero is None
    assert torch.equal(scale.flatten(), their_scale.flatten())
    got = simulate(x, scale, None, grid, granularity, size)
    assert torch.equal(got, library.fake_quantize(x, their_scale, None, args))


@pytest.mark.parametrize("grid", [FloatGrid("e4m3"), FloatGrid("e2m1")], ids=str)
def test_static_activations_on_float_grids_equal_the_library_in_float32(grid: FloatGrid) -> None:
    x = sample(7, 2, 9, 32)
    args = float_args(grid.bits, Granularity.TENSOR, None, dynamic=False)
    low, high = torch.tensor([-1.7]), torch.tensor([2.9])
    their_scale, _ = library.calculate_qparams(low, high, args)
    scale, _ = scale_zero_point(low, high, grid, True, torch.float32)
    assert torch.equal(scale, their_scale)
    got = simulate(x, scale, None, grid, Granularity.TENSOR)
    assert torch.equal(got, library.fake_quantize(x, their_scale, None, args))


# --- blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 8, 19, 24])
def test_blocks_are_squares_and_the_last_row_may_be_cut_off(rows: int) -> None:
    """Against the same weight, one square at a time."""
    w = torch.randn(rows, 24, generator=torch.Generator().manual_seed(0)) * torch.rand(rows, 1)
    unit, grid = (Granularity.BLOCK, 8), IntGrid(4)
    scale, zero = dynamic_scale_zero_point(w, grid, False, *unit, torch.float32)
    assert zero is not None
    lines = -(-rows // 8)
    assert scale.shape == zero.shape == (lines, 3)
    codes = quantize(w, scale, zero, grid, *unit)
    for i in range(lines):
        for j in range(3):
            part = (slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8))
            own = dynamic_scale_zero_point(w[part], grid, False, Granularity.TENSOR)
            assert (scale[i, j], zero[i, j]) == (own[0], own[1])
            assert torch.equal(codes[part], quantize(w[part], *own, grid, Granularity.TENSOR))
    values = dequantize(codes, scale, zero, *unit)
    assert torch.equal(values, simulate(w, scale, zero, grid, *unit))
    groups = to_groups(w, *unit)
    assert groups.shape == (lines, 3, 64)
    assert torch.equal(from_groups(groups, w.shape, Granularity.BLOCK), w)
    assert float(groups[0, 0].sum()) == pytest.approx(float(w[:8, :8].sum()), abs=1e-5)


def test_a_scale_that_does_not_cover_the_blocks_is_refused() -> None:
    w, unit = torch.ones(9, 16), (Granularity.BLOCK, 8)
    for shape in ((1, 2), (9, 2), (2, 1)):
        with pytest.raises(FormatError, match="block granularity"):
            quantize(w, torch.ones(shape), None, IntGrid(4), *unit)
    with pytest.raises(FormatError, match="8 does not divide 15"):
        to_groups(torch.ones(8, 15), *unit)


def test_empty_weights_have_no_blocks() -> None:
    for shape in ((0, 16), (4, 0)):
        low, high = extremes(torch.ones(shape), Granularity.BLOCK, 8)
        assert low.numel() == high.numel() == 0
