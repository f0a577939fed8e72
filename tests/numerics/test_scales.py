"""Scales of few bits, against their definitions in exact arithmetic and against the library."""

from __future__ import annotations

import math
from fractions import Fraction

import compressed_tensors_library as library
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prismquant.errors import FormatError
from prismquant.formats.spec import spec
from prismquant.numerics.affine import dynamic_scale_zero_point, scale_zero_point
from prismquant.numerics.grids import FloatGrid, Grid, IntGrid
from prismquant.numerics.kinds import ScaleKind
from prismquant.numerics.scales import (
    ScaleFormat,
    as_scale_format,
    check_global_scale,
    global_scale,
)

E8M0: list[ScaleKind] = ["e8m0", "e8m0-floor", "e8m0-ceil"]
GRIDS: list[Grid] = [
    *(FloatGrid(kind) for kind in ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")),
    IntGrid(8, narrow=True),
]
FP4 = FloatGrid("e2m1")
# Every number of E4M3 that is positive, by its definition.
E4M3 = sorted(
    {
        math.ldexp((8 if e else 0) + m, max(e, 1) - 10)
        for e in range(16)
        for m in range(8)
        if (e, m) not in ((0, 0), (15, 7))
    }
)


def exponent(x: Fraction) -> int:
    """floor(log2 x), exactly."""
    power = x.numerator.bit_length() - x.denominator.bit_length()
    return power if Fraction(2) ** power <= x else power - 1


def e8m0_by_definition(amax: float, grid: Grid, kind: ScaleKind) -> float:
    """The power of two that a rule means, from exact fractions."""
    x, top = Fraction(amax), Fraction(grid.span)
    if kind == "e8m0-ceil":
        power = next(k for k in range(-200, 200) if x <= top * Fraction(2) ** k)
    else:
        if kind == "e8m0":
            # Round to nearest, half up, with so many bits behind the point.
            mantissa = {"e2m1": 1, "e4m3": 1, "e2m3": 3, "e3m2": 2, "e5m2": 2}
            bits = mantissa[grid.kind] if isinstance(grid, FloatGrid) else 6
            step = Fraction(2) ** (exponent(x) - bits)
            x = step * math.floor(x / step + Fraction(1, 2))
        power = exponent(x) - exponent(top)
    return math.ldexp(1.0, min(max(power, -126), 127 - exponent(top)))


def edges(grid: Grid) -> list[float]:
    """Magnitudes on either side of every threshold, in a few binades, and extreme ones."""
    fractions = [1, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.984375, 1.9921875, 2 - 2**-23]
    exact = torch.tensor([f * 2.0**k for k in (-20, -1, 0, 1, 7, 30) for f in fractions])
    near = [torch.nextafter(exact, torch.full_like(exact, end)) for end in (0.0, math.inf)]
    extreme = torch.tensor([1e-45, 1.2e-38, 3e-38, 3.4e38, grid.span])
    return [float(x) for x in torch.cat([exact, *near, extreme])]


@pytest.mark.parametrize("kind", E8M0)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_e8m0_is_the_power_of_two_that_its_rule_means(kind: ScaleKind, grid: Grid) -> None:
    form = ScaleFormat(torch.bfloat16, kind)
    amax = torch.tensor(edges(grid))
    found = form.of_magnitude(amax, grid)
    assert found.dtype == form.memory_dtype == torch.float8_e8m0fnu
    want = [e8m0_by_definition(x, grid, kind) for x in amax.tolist()]
    assert found.float().tolist() == want


@pytest.mark.parametrize("kind", E8M0)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_quotient_means_the_magnitude_that_it_came_from(kind: ScaleKind, grid: Grid) -> None:
    """Except within its own rounding error of a threshold."""
    form = ScaleFormat(torch.float32, kind)
    amax = 10 * torch.rand(5000, generator=torch.Generator().manual_seed(4)) + 1e-6
    ends = [form.of_magnitude(amax * f, grid).float() for f in (1 - 1e-6, 1 + 1e-6)]
    clear = ends[0] == ends[1]
    assert float(clear.float().mean()) > 0.99
    found = form.stored(amax / grid.span, grid).float()
    assert torch.equal(found[clear], ends[0][clear])


@pytest.mark.parametrize(("bits", "kind"), [(4, "e2m1"), (6, "e2m3"), (8, "e4m3")])
def test_the_plain_rule_is_the_one_of_compressed_tensors(bits: int, kind: str) -> None:
    grid = FloatGrid(kind)  # type: ignore[arg-type]
    random = torch.randn(3000, generator=torch.Generator().manual_seed(0)).abs()
    amax = torch.cat([torch.tensor(edges(grid)), random])
    amax = amax[(amax > 1e-30) & (amax < 1e30)]
    want = 2.0 ** (library.generate_mx_scales(amax, bits).double() - 127)
    found = ScaleFormat(torch.float32, "e8m0").of_magnitude(amax, grid)
    assert torch.equal(found.double(), want)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_ceil_rule_saturates_nothing_and_wastes_no_binade(grid: Grid) -> None:
    amax = torch.tensor([x for x in edges(grid) if 1e-30 < x < 1e30])
    scale = ScaleFormat(torch.float32, "e8m0-ceil").of_magnitude(amax, grid).float()
    assert bool((amax <= scale * grid.span).all())
    assert bool((amax > scale / 2 * grid.span).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", [*E8M0, "e4m3"])
def test_elements_times_scales_are_never_infinite(kind: ScaleKind, grid: Grid) -> None:
    huge = torch.tensor([torch.finfo(torch.float32).max])
    divisor = global_scale(huge, grid) if kind == "e4m3" else None
    scale = ScaleFormat(torch.float32, kind, divisor).of_magnitude(huge, grid)
    assert bool((scale.float() * grid.span).isfinite().all())
    assert bool((scale.float() > 0).all())


@pytest.mark.parametrize("kind", ["float", *E8M0, "e4m3"])
def test_an_empty_range_has_a_scale_like_any_other(kind: ScaleKind) -> None:
    divisor = torch.tensor([8.0]) if kind == "e4m3" else None
    form = ScaleFormat(torch.float32, kind, divisor)
    zero = torch.zeros(2, 3)
    want = 1 / 8 if kind == "e4m3" else 1.0
    for scale in (form.of_magnitude(zero, FP4), form.stored(zero, FP4)):
        assert scale.float().unique().tolist() == [want]


def nearest_e4m3(x: Fraction) -> float:
    """Of the numbers as near, the one of even code; codes count from 1."""
    codes = range(len(E4M3))
    return E4M3[min(codes, key=lambda c: (abs(Fraction(E4M3[c]) - x), (c + 1) % 2))]


@settings(max_examples=50)
@given(
    amaxes=st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=8),
    four_over_six=st.booleans(),
)
def test_e4m3_is_the_nearest_number_over_a_power_of_two(
    amaxes: list[float], four_over_six: bool
) -> None:
    """All steps but the first quotient are exact, so fractions can follow them."""
    amax = torch.tensor(amaxes)
    divisor = global_scale(amax.amax(), FP4, 256.0 if four_over_six else 448.0)
    power = exponent(Fraction((256 if four_over_six else 448) * 6) / Fraction(float(amax.max())))
    assert divisor.tolist() == [2.0**power]
    form = ScaleFormat(torch.float32, "e4m3", divisor)
    for x, scale in zip(amax, form.of_magnitude(amax, FP4), strict=True):
        wanted = Fraction(float(x / 6)) * Fraction(2) ** power
        assert Fraction(float(scale)) == Fraction(nearest_e4m3(wanted)) / Fraction(2) ** power
        assert form.levels(scale.view(1)).dtype == torch.float8_e4m3fn
    # The largest block comes to 448 or 256 or half of that, so E4M3 does not saturate.
    top = float(form.of_magnitude(amax, FP4).max() * divisor)
    assert 0.48 <= top / (256 if four_over_six else 448) <= 1.04


@pytest.mark.parametrize("value", [1.0, 0.37, 2688 / 1.7, 3e-5, 2.0**100, 2.0**-116])
def test_every_e4m3_number_is_read_and_written_over_any_global_scale(value: float) -> None:
    form = ScaleFormat(torch.float32, "e4m3", torch.tensor([value]))
    levels = torch.tensor(E4M3)
    scale = levels / torch.tensor([value])
    assert torch.equal(form.levels(scale).float(), levels)
    assert torch.equal(form.nearest(scale, FP4), scale)


def test_tiny_and_huge_tensors_have_a_global_scale_whose_reciprocal_is_exact() -> None:
    for amax in (1e-45, 1e-38, 1e-20, 1.0, 1e20, 3.4e38):
        divisor = global_scale(torch.tensor(amax), FP4)
        assert float(1 / divisor) * float(divisor) == 1.0
        assert math.frexp(float(divisor))[0] == 0.5
    assert global_scale(torch.tensor(0.0), FP4).tolist() == [1.0]


@pytest.mark.parametrize("kind", ["float", *E8M0, "e4m3"])
@pytest.mark.parametrize("grid", [FP4, FloatGrid("e4m3"), IntGrid(8, narrow=True)], ids=str)
def test_what_is_stored_already_stays_as_it_is(kind: ScaleKind, grid: Grid) -> None:
    divisor = torch.tensor([64.0]) if kind == "e4m3" else None
    form = ScaleFormat(torch.bfloat16, kind, divisor)
    amax = torch.rand(500, generator=torch.Generator().manual_seed(1)) * 3 + 1e-3
    scale = form.of_magnitude(amax, grid)
    again = form.nearest(scale.float(), grid)
    assert torch.equal(again, scale.float())
    assert torch.equal(form.kept(again).float(), scale.float())


def test_the_nearest_power_of_two_is_nearest_in_ratio() -> None:
    form = ScaleFormat(torch.float32, "e8m0")
    x = torch.tensor([1.0, 1.41, 1.42, 1.9, 0.70, 0.71])
    assert form.nearest(x, FP4).tolist() == [1, 1, 2, 2, 0.5, 1]


def test_only_float_scales_have_a_sign() -> None:
    x = torch.tensor([-0.5, 0.25])
    assert ScaleFormat(torch.float16).nearest(x, FP4).tolist() == [-0.5, 0.25]
    for form in (ScaleFormat(torch.float32, "e8m0"), nvfp4()):
        assert form.nearest(x, FP4).tolist() == [0.5, 0.25]


def nvfp4(divisor: float = 16.0) -> ScaleFormat:
    return ScaleFormat(torch.float32, "e4m3", torch.tensor([divisor]))


@pytest.mark.parametrize("form", [ScaleFormat(torch.float32, "e8m0"), nvfp4()], ids=["mx", "nv"])
@pytest.mark.parametrize(("top", "bottom"), [(1.5, 0.2), (1.0, 0.5)])
def test_candidates_are_all_that_can_be_stored_in_between(
    form: ScaleFormat, top: float, bottom: float
) -> None:
    amax = torch.rand(50, generator=torch.Generator().manual_seed(2)) * 5 + 0.1
    tried = torch.stack(list(form.candidates(amax, FP4, top, bottom)))
    every = (
        torch.tensor(E4M3) / 16
        if form.kind == "e4m3"
        else 2.0 ** torch.arange(-30, 30, dtype=torch.float32)
    )
    ceil = ScaleFormat(torch.float32, "e8m0-ceil").of_magnitude(amax, FP4).float()
    for x, most, own in zip(amax, ceil, tried.T, strict=True):
        assert set(own.tolist()) <= set(every.tolist())
        high = float(most) if form.kind == "e8m0" else float(x) / 6 * top
        wanted = every[(every <= high) & (every >= float(x) / 6 * bottom)]
        assert set(wanted.tolist()) <= set(own.tolist())
        assert own.tolist() == sorted(own.tolist(), reverse=True)


def test_dynamic_scales_of_groups_are_those_of_their_largest_magnitudes() -> None:
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    for name, form in (("nvfp4-dyn", nvfp4(256.0)), ("mxfp8-dyn", ScaleFormat(x.dtype, "e8m0"))):
        number = spec(name)
        unit = (number.granularity, number.group_size)
        scale, zero = dynamic_scale_zero_point(x, number.grid, True, *unit, form)
        amax = x.unflatten(-1, (-1, number.group_size)).abs().amax(-1).float()
        assert zero is None
        assert torch.equal(scale.float(), form.of_magnitude(amax, number.grid).float())


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ((torch.int8, "float"), "cannot be stored as torch.int8"),
        ((torch.float32, "e8m1"), "did you mean 'e8m0'"),
        ((torch.float32, "e4m3"), "no global scale"),
        ((torch.float32, "e8m0", torch.ones(1)), "a global scale"),
        ((torch.float32, "e4m3", torch.zeros(1)), "cannot be 0.0"),
        ((torch.float32, "e4m3", torch.tensor([math.inf])), "cannot be inf"),
        ((torch.float32, "e4m3", torch.ones(2)), "one floating-point number"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: tuple[object, ...], told: str) -> None:
    with pytest.raises(FormatError, match=told):
        ScaleFormat(*parts)  # type: ignore[arg-type]


def test_other_misuse_is_refused() -> None:
    with pytest.raises(FormatError, match="no E4M3 number over the global scale 16"):
        nvfp4().levels(torch.tensor([0.3]))
    with pytest.raises(FormatError, match="one level"):
        ScaleFormat(torch.float32, "e8m0").levels(torch.ones(1))
    with pytest.raises(FormatError, match="too many"):
        ScaleFormat(torch.float32).candidates(torch.ones(1), FP4, 1.0, 0.5)
    form = ScaleFormat(torch.float32, "e8m0")
    with pytest.raises(FormatError, match="asymmetric"):
        scale_zero_point(torch.zeros(1), torch.ones(1), IntGrid(8), False, form)
    with pytest.raises(FormatError, match="one floating-point number"):
        check_global_scale(torch.ones(1, dtype=torch.int32))


def test_a_dtype_stands_for_float_scales_of_it() -> None:
    form = as_scale_format(torch.bfloat16)
    assert (form.kind, form.memory_dtype, form.coded) == ("float", torch.bfloat16, False)
    assert as_scale_format(form) is form
