"""Range rules, against brute force on the values themselves in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismquant.errors import FormatError, NumericsError, PrismQuantError, RecipeError
from prismquant.numerics.affine import dequantize, quantize, scale_zero_point, simulate
from prismquant.numerics.grids import FloatGrid, Grid, IntGrid
from prismquant.numerics.grouping import to_groups
from prismquant.numerics.kinds import FLOAT_KINDS, FloatKind, Granularity
from prismquant.numerics.ranges import (
    RangeRule,
    coupled_weight_scales,
    weight_scales,
)
from prismquant.numerics.scales import ScaleFormat, global_scale
from prismquant.statistics.input_range import InputRange, static_scale_zero_point

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNITS = [(Granularity.TENSOR, None), (Granularity.CHANNEL, None), (Granularity.GROUP, 16)]


def heavy_tailed(seed: int, *shape: int) -> Tensor:
    """Laplace-like values with a few outliers, as weights and activations have."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values * torch.rand(*shape, generator=generator).clamp(min=1e-6).log().abs()


def weight_losses(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    grid: Grid,
    unit: tuple[Granularity, int | None],
    norm: float,
    importance: Tensor | None = None,
) -> Tensor:
    """The measure of the mse rule, for every scale, in float64."""
    codes = quantize(w, scale, zero, grid, *unit)
    values = dequantize(codes, scale, zero, *unit, torch.float32, grid)
    error = (w.double() - values.double()).abs() ** norm
    if importance is not None:
        error = error * importance.double()
    return to_groups(error, *unit).sum(-1)


# --- rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kind": "max"}, "no range rule 'max'"),
        ({"percentile": 0.5}, "percentile.*0.5"),
        ({"percentile": 1.1}, "percentile.*1.1"),
        ({"max_shrink": 1.0}, "max_shrink"),
        ({"max_shrink": -0.1}, "max_shrink"),
        ({"steps": 1}, "steps"),
        ({"norm": 0}, "norm"),
        ({"norm": math.nan}, "norm"),
        ({"momentum": 0}, "momentum"),
    ],
)
def test_rules_out_of_bounds_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        RangeRule(**fields)


# --- scales of few bits -----------------------------------------------------------------------

FP4 = FloatGrid("e2m1")
NV, MX = (Granularity.GROUP, 16), (Granularity.GROUP, 32)


def coded(w: Tensor, kind: str, grid: Grid) -> ScaleFormat:
    divisor = global_scale(w.abs().amax(), grid) if kind == "e4m3" else None
    return ScaleFormat(torch.float32, kind, divisor)  # type: ignore[arg-type]


def every_scale(form: ScaleFormat) -> Tensor:
    """All that can be stored."""
    if form.global_scale is not None:
        codes = torch.arange(1, 0x7F).to(torch.int8).view(torch.float8_e4m3fn)
        return codes.float() / form.global_scale
    return 2.0 ** torch.arange(-40, 20).float()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    case=st.sampled_from(
        [("e4m3", FP4, NV), *(("e8m0", FloatGrid(kind), MX) for kind in ("e2m1", "e2m3", "e4m3"))]
    ),
    weighted=st.booleans(),
)
def test_a_sweep_finds_the_best_of_all_scales_that_can_be_stored(
    seed: int, case: tuple[str, Grid, Any], weighted: bool
) -> None:
    kind, grid, unit = case
    w = heavy_tailed(seed, 4, 64)
    importance = None
    if weighted:
        importance = torch.rand(64, generator=torch.Generator().manual_seed(seed)) + 0.5
    form = coded(w, kind, grid)
    shape = (4, 64 // (unit[1] or 1))

    def loss(scale: Tensor) -> Tensor:
        return weight_losses(w, scale, None, grid, unit, 2.0, importance)

    least = torch.stack([loss(s.expand(shape)) for s in every_scale(form)]).amin(0)
    found = []
    for rule in (RangeRule("sweep"), RangeRule("mse", norm=2.0), RangeRule()):
        scale, zero = weight_scales(w, grid, True, *unit, rule, form, importance)
        assert zero is None
        assert scale.dtype == form.memory_dtype
        assert set(scale.float().unique().tolist()) <= set(every_scale(form).tolist())
        found.append(loss(scale))
    assert bool((found[0] <= least * (1 + 1e-5) + 1e-12).all())
    assert bool((found[1] <= found[2] * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("kind", ["e4m3", "e8m0", "float"])
def test_four_over_six_takes_the_better_of_two_scales(kind: str) -> None:
    w = heavy_tailed(3, 20, 64)
    w[0, :16] = 0.0
    unit = NV if kind == "e4m3" else MX
    divisor = global_scale(w.abs().amax(), FP4, 256.0) if kind == "e4m3" else None
    form = ScaleFormat(torch.bfloat16, kind, divisor)  # type: ignore[arg-type]
    amax = to_groups(w, *unit).abs().amax(-1)
    tried = [form.of_magnitude(amax * factor, FP4) for factor in (1.0, 1.5)]
    losses = torch.stack([weight_losses(w, s, None, FP4, unit, 2.0) for s in tried])
    want = torch.where(losses[1] < losses[0], tried[1].float(), tried[0].float())
    found, _ = weight_scales(w, FP4, True, *unit, RangeRule("four_over_six"), form)
    assert torch.equal(found.float(), want)
    assert bool((losses[1] > losses[0]).any())
    # A power of two more can only take points away.
    assert bool((losses[1] < losses[0]).any()) == (kind != "e8m0")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("grid", [IntGrid(4), FP4], ids=str)
def test_a_sweep_over_float_scales_is_no_worse_than_mse(
    unit: tuple[Granularity, int | None], grid: Grid
) -> None:
    w = heavy_tailed(4, 12, 48)
    losses = []
    for rule in (RangeRule("sweep"), RangeRule("mse", norm=2.0), RangeRule()):
        scale, _ = weight_scales(w, grid, True, *unit, rule, torch.bfloat16)
        losses.append(weight_losses(w, scale, None, grid, unit, 2.0))
    assert bool((losses[0] <= losses[1] * (1 + 1e-5)).all())
    assert bool((losses[1] <= losses[2] * (1 + 1e-5)).all())


def test_rules_that_do_not_fit_are_refused() -> None:
    w = torch.ones(2, 16)
    with pytest.raises(RecipeError, match="E2M1"):
        weight_scales(w, IntGrid(4), True, *NV, RangeRule("four_over_six"), torch.float32)
    record = InputRange()
    record.update(w)
    with pytest.raises(RecipeError, match="for weights"):
        record.result(RangeRule("four_over_six"), FP4, True)
    with pytest.raises(FormatError, match="nothing to calibrate"):
        static_scale_zero_point(record, RangeRule(), FP4, True, torch.float32, "e8m0")


def test_calibration_finds_a_static_scale_or_a_global_one() -> None:
    x = heavy_tailed(5, 100, 32)
    record = InputRange()
    record.update(x)
    low, high = float(x.min()), float(x.max())
    fp8 = FloatGrid("e4m3")
    scale, zero, *ends = static_scale_zero_point(record, RangeRule(), fp8, True, torch.bfloat16)
    want, _ = scale_zero_point(torch.tensor([low]), torch.tensor([high]), fp8, True, torch.bfloat16)
    assert torch.equal(scale, want)
    assert (zero, *ends) == (None, low, high)
    for rule in (RangeRule(), RangeRule("mse")):
        divisor, zero, *ends = static_scale_zero_point(
            record, rule, FP4, True, torch.bfloat16, "e4m3"
        )
        assert torch.equal(divisor, global_scale(x.abs().amax(), FP4))
        assert (zero, *ends) == (None, low, high)


# --- blocks -----------------------------------------------------------------------------------

BLOCK = (Granularity.BLOCK, 16)


def blocks_of(w: Tensor) -> list[tuple[int, int, Tensor]]:
    return [
        (i // 16, j // 16, w[i : i + 16, j : j + 16])
        for i in range(0, len(w), 16)
        for j in range(0, w.shape[1], 16)
    ]


@pytest.mark.parametrize("rows", [5, 16, 40])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse"])
def test_a_block_is_like_a_tensor_of_its_own(rows: int, symmetric: bool, kind: str) -> None:
    """Also where the last row of blocks is cut off."""
    w, grid = heavy_tailed(6, rows, 48), IntGrid(4)
    rule = RangeRule(kind, percentile=0.9, norm=2.0)  # type: ignore[arg-type]
    importance = (
        torch.rand(48, generator=torch.Generator().manual_seed(0)) if kind == "mse" else None
    )
    scale, zero = weight_scales(w, grid, symmetric, *BLOCK, rule, torch.float32, importance)
    assert tuple(scale.shape) == (-(-rows // 16), 3)
    whole = (Granularity.TENSOR, None)
    for i, j, part in blocks_of(w):
        own_importance = None if importance is None else importance[j * 16 : j * 16 + 16]
        own = weight_scales(part, grid, symmetric, *whole, rule, torch.float32, own_importance)
        mine = (scale[i, j].view(1), None if zero is None else zero[i, j].view(1))
        if kind != "mse":
            assert torch.equal(mine[0], own[0])
            assert zero is None or torch.equal(mine[1], own[1])  # type: ignore[arg-type]
            continue
        losses = [
            sum(weight_losses(part, *s, grid, (Granularity.CHANNEL, None), 2.0, own_importance))
            for s in (mine, own)
        ]
        assert float(losses[0]) <= float(losses[1]) * 1.05


def test_blocks_chosen_by_what_their_errors_do_together_lose_less() -> None:
    w, grid = heavy_tailed(7, 40, 48), FP4
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(1)).cumsum(1)
    hessian = x.T @ x / 200

    def loss(scale: Tensor) -> Tensor:
        error = (w - simulate(w, scale, None, grid, *BLOCK)).double()
        found = torch.zeros(3, 3, dtype=torch.float64)
        for i, j, part in blocks_of(error):
            span = slice(j * 16, j * 16 + 16)
            found[i, j] = ((part @ hessian[span, span].double()) * part).sum()
        return found

    rule = RangeRule("mse")
    coupled, _ = coupled_weight_scales(w, grid, True, *BLOCK, rule, torch.float32, hessian)
    plain, _ = weight_scales(w, grid, True, *BLOCK, RangeRule(), torch.float32)
    assert coupled.shape == (3, 3)
    assert bool((loss(coupled) <= loss(plain) * (1 + 1e-5)).all())
    assert float(loss(coupled).sum()) < 0.9 * float(loss(plain).sum())


# --- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("unit", UNITS)
def test_minmax_holds_the_extremes_of_every_unit(
    unit: tuple[Granularity, int | None], symmetric: bool
) -> None:
    w = heavy_tailed(0, 6, 48)
    groups = to_groups(w, *unit)
    want = scale_zero_point(groups.amin(-1), groups.amax(-1), IntGrid(4), symmetric, torch.bfloat16)
    got = weight_scales(w, IntGrid(4), symmetric, *unit, RangeRule(), torch.bfloat16)
    assert torch.equal(got[0], want[0])
    assert got[1] is want[1] is None or torch.equal(got[1], want[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("percentile", [0.75, 0.99, 1.0])
def test_percentile_is_the_value_of_that_rank(
    unit: tuple[Granularity, int | None], symmetric: bool, percentile: float
) -> None:
    w = heavy_tailed(1, 6, 48)
    groups = to_groups(w, *unit).double()
    rank = math.ceil(percentile * groups.shape[-1])
    if symmetric:
        high = groups.abs().sort(-1).values[..., rank - 1]
        low = -high
    else:
        high = groups.sort(-1).values[..., rank - 1]
        low = groups.sort(-1).values[..., -rank]
    want = scale_zero_point(low.float(), high.float(), IntGrid(8), symmetric, torch.float32)
    rule = RangeRule("percentile", percentile=percentile)
    got = weight_scales(w, IntGrid(8), symmetric, *unit, rule, torch.float32)
    assert torch.equal(got[0], want[0])


@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    narrow=st.booleans(),
    symmetric=st.booleans(),
    unit=st.sampled_from(UNITS),
    norm=st.sampled_from([1.0, 2.0, 2.4]),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
)
def test_mse_is_never_worse_than_minmax_by_its_own_measure(
    seed: int,
    bits: int,
    narrow: bool,
    symmetric: bool,
    unit: tuple[Granularity, int | None],
    norm: float,
    dtype: torch.dtype,
    weighted: bool,
) -> None:
    w = heavy_tailed(seed, 4, 32)
    grid = IntGrid(bits, narrow)
    importance = heavy_tailed(seed + 1, 32).abs() if weighted else None
    rule = RangeRule("mse", norm=norm)
    found = weight_scales(w, grid, symmetric, *unit, rule, dtype, importance)
    plain = weight_scales(w, grid, symmetric, *unit, RangeRule(), dtype)
    losses = weight_losses(w, *found, grid, unit, norm, importance)
    bound = weight_losses(w, *plain, grid, unit, norm, importance)
    assert bool((losses <= bound * (1 + 1e-4)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("unit", UNITS)
def test_mse_comes_within_a_percent_of_trying_every_range(
    bits: int, symmetric: bool, norm: float, unit: tuple[Granularity, int | None]
) -> None:
    """Brute force over all 80 factors; but for a whole tensor the search looks at 27 of them."""
    w = heavy_tailed(bits, 8, 256)
    grid = IntGrid(bits)
    importance = heavy_tailed(9, 256).abs()
    groups = to_groups(w, *unit)
    low, high = groups.amin(-1), groups.amax(-1)
    top = (grid.levels - 1) / 2 / grid.qmax if symmetric else 1.0
    tried = [
        weight_losses(
            w,
            *scale_zero_point(low * factor, high * factor, grid, symmetric, torch.bfloat16),
            grid,
            unit,
            norm,
            importance,
        )
        for factor in torch.linspace(top, 0.2, 80).tolist()
    ]
    if symmetric:  # the other sign of the scale is the same grid, mirrored
        mirrored = [
            scale_zero_point(low * factor, high * factor, grid, symmetric, torch.bfloat16)[0]
            for factor in torch.linspace(top, 0.2, 80).tolist()
        ]
        tried += [
            weight_losses(w, -scale, None, grid, unit, norm, importance) for scale in mirrored
        ]
    best = torch.stack(tried).amin(0)
    rule = RangeRule("mse", norm=norm)
    found = weight_scales(w, grid, symmetric, *unit, rule, torch.bfloat16, importance)
    losses = weight_losses(w, *found, grid, unit, norm, importance)
    assert float(losses.sum()) <= 1.01 * float(best.sum())
    assert found[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", FLOAT_KINDS)
@pytest.mark.parametrize("unit", UNITS)
def test_scales_of_float_grids_follow_the_extremes_or_the_rank(
    unit: tuple[Granularity, int | None], kind: FloatKind
) -> None:
    w, grid = heavy_tailed(0, 6, 48), FloatGrid(kind)
    ranked = to_groups(w, *unit).abs().sort(-1).values
    rank = math.ceil(0.9 * ranked.shape[-1])
    for rule, edge in (
        (RangeRule(), ranked[..., -1]),
        (RangeRule("percentile", percentile=0.9), ranked[..., rank - 1]),
    ):
        scale, zero = weight_scales(w, grid, True, *unit, rule, torch.bfloat16)
        assert zero is None
        assert torch.equal(scale, (edge / grid.largest).to(torch.bfloat16))


@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(FLOAT_KINDS),
    unit=st.sampled_from(UNITS),
    norm=st.sampled_from([1.0, 2.0, 2.4]),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
)
def test_mse_on_float_grids_is_never_worse_than_minmax_by_its_own_measure(
    seed: int,
    kind: FloatKind,
    unit: tuple[Granularity, int | None],
    norm: float,
    dtype: torch.dtype,
    weighted: bool,
) -> None:
    w, grid = heavy_tailed(seed, 4, 32), FloatGrid(kind)
    importance = heavy_tailed(seed + 1, 32).abs() if weighted else None
    rule = RangeRule("mse", norm=norm)
    found = weight_scales(w, grid, True, *unit, rule, dtype, importance)
    plain = weight_scales(w, grid, True, *unit, RangeRule(), dtype)
    losses = weight_losses(w, *found, grid, unit, norm, importance)
    bound = weight_losses(w, *plain, grid, unit, norm, importance)
    assert bool((losses <= bound * (1 + 1e-4)).all())


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("unit", UNITS)
def test_mse_on_four_float_bits_comes_within_a_percent_of_trying_every_range(
    norm: float, unit: tuple[Granularity, int | None]
) -> None:
    """Ranges from that which puts the extremes on 4, the foot of the topmost binade."""
    w, grid = heavy_tailed(4, 8, 256), FloatGrid("e2m1")
    groups = to_groups(w, *unit)
    low, high = groups.amin(-1), groups.amax(-1)
    tried = [
        weight_losses(
            w,
            *scale_zero_point(low * factor, high * factor, grid, True, torch.bfloat16),
            grid,
            unit,
            norm,
        )
        for factor in torch.linspace(6 / 4, 0.2, 80).tolist()
    ]
    rule = RangeRule("mse", norm=norm)
    found = weight_scales(w, grid, True, *unit, rule, torch.bfloat16)
    losses = weight_losses(w, *found, grid, unit, norm)
    assert float(losses.sum()) <= 1.01 * float(torch.stack(tried).amin(0).sum())


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_sliding_the_extremes_down_the_topmost_binade_pays_in_small_groups(kind: FloatKind) -> None:
    """Without clipping anything: against the best of the ranges that are no wider than minmax."""
    w, grid, unit = heavy_tailed(5, 64, 256), FloatGrid(kind), (Granularity.GROUP, 16)
    low, high = (end(-1) for end in (to_groups(w, *unit).amin, to_groups(w, *unit).amax))
    narrower = [
        weight_losses(
            w, *scale_zero_point(low * f, high * f, grid, True, torch.float32), grid, unit, 2
        )
        for f in torch.linspace(1, 0.2, 80).tolist()
    ]
    found = weight_scales(w, grid, True, *unit, RangeRule("mse", norm=2), torch.float32)
    losses = weight_losses(w, *found, grid, unit, 2)
    assert float(losses.sum()) < 0.95 * float(torch.stack(narrower).amin(0).sum())


def test_importance_moves_the_choice_towards_what_matters() -> None:
    """With one outlier of no importance, the scale shrinks to the rest; otherwise it is held."""
    w = torch.linspace(-1, 1, 64).repeat(1, 1)
    w[0, 0] = 3.0
    careless, careful = torch.ones(64), torch.ones(64)
    careless[0], careful[0] = 0.0, 1e6
    rule = RangeRule("mse")
    scales = [
        weight_scales(
            w, IntGrid(4), True, Granularity.CHANNEL, None, rule, torch.float32, importance
        )[0].item()
        for importance in (careless, careful)
    ]
    assert abs(scales[0]) == pytest.approx(1 / 7, rel=0.15)
    # Held by the outermost code of one side or the other.
    assert 6.9 <= 3.0 / abs(scales[1]) <= 8.6


def test_a_signed_scale_spends_the_longer_side_of_the_grid_where_values_are() -> None:
    """Values of a mirrored grid, -1 to 2 at 2 bits, are exact with a negative scale only."""
    w = torch.tensor([[-1.0, 0.0, 1.0, 2.0] * 4])
    unit = (Granularity.CHANNEL, None)
    found = {
        signed: weight_scales(
            w, IntGrid(2), True, *unit, RangeRule("mse", signed_scale=signed), torch.float32
        )
        for signed in (True, False)
    }
    errors = {
        signed: float((simulate(w, *scales, IntGrid(2), *unit) - w).square().sum())
        for signed, scales in found.items()
    }
    assert float(found[True][0]) < 0 < float(found[False][0])
    assert errors[True] < 0.01 * errors[False]
    # A narrow grid has no longer side, and neither has a shifted one.
    for grid, symmetric in ((IntGrid(2, narrow=True), True), (IntGrid(2), False)):
        scale, _ = weight_scales(w, grid, symmetric, *unit, RangeRule("mse"), torch.float32)
        assert bool((scale > 0).all())


def test_weights_larger_than_a_piece_have_no_seam() -> None:
    w = heavy_tailed(3, 700, 512)
    rule = RangeRule("mse")
    unit = (Granularity.GROUP, 64)
    whole, zero = weight_scales(w, IntGrid(4), False, *unit, rule, torch.float16)
    rows = [0, 255, 511, 512, 513, 699]
    assert zero is not None
    for row in rows:
        scale, point = weight_scales(
            w[row : row + 1], IntGrid(4), False, *unit, rule, torch.float16
        )
        assert torch.equal(scale[0], whole[row])
        assert point is not None
        assert torch.equal(point[0], zero[row])
    total, _ = weight_scales(w, IntGrid(4), True, Granularity.TENSOR, None, rule, torch.float16)
    assert total.shape == (1,)


@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize(
    ("grid", "symmetric"),
    [(IntGrid(4), True), (IntGrid(4), False), *((FloatGrid(k), True) for k in FLOAT_KINDS)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unusual_weights_still_have_usable_scales(
    kind: Any, grid: Grid, symmetric: bool, dtype: torch.dtype
) -> None:
    """All zero, all negative, all positive, tiny, subnormal, huge, one outlier."""
    w = torch.stack(
        [
            torch.zeros(16),
            -torch.linspace(1, 2, 16),
            torch.linspace(1, 2, 16),
            torch.linspace(-1e-30, 1e-30, 16),
            torch.full((16,), 1e-44),
            3e38 * torch.linspace(-1, 1, 16),
            torch.eye(16)[0] * 1e4,
        ]
    )
    rule = RangeRule(kind)
    for unit in UNITS:
        scale, zero = weight_scales(w, grid, symmetric, *unit, rule, dtype)
        signed = kind == "mse" and symmetric and isinstance(grid, IntGrid)
        assert bool((torch.isfinite(scale) & ((scale > 0) | signed & (scale < 0))).all())
        assert scale.dtype == dtype
        codes = quantize(w, scale, zero, grid, *unit)
        assert bool(
            torch.isfinite(dequantize(codes, scale, zero, *unit, torch.float32, grid)).all()
        )
    scale, zero = weight_scales(w, grid, symmetric, Granularity.CHANNEL, None, rule, torch.float32)
    codes = quantize(w, scale, zero, grid, Granularity.CHANNEL)
    values = dequantize(codes, scale, zero, Granularity.CHANNEL, None, torch.float32, grid)
    assert bool((values[0] == 0).all())


@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse"])
def test_empty_weights_have_scales_of_the_right_shape(kind: Any) -> None:
    for shape, want in (((0, 16), (0, 1)), ((3, 0), (3, 1))):
        scale, _ = weight_scales(
            torch.zeros(shape),
            IntGrid(4),
            True,
            Granularity.CHANNEL,
            None,
            RangeRule(kind),
            torch.float32,
        )
        assert tuple(scale.shape) == want


def test_weights_and_importances_that_cannot_be_used_are_refused() -> None:
    w = heavy_tailed(4, 4, 32)

    def scales(w: Tensor, importance: Tensor | None = None, **rule: Any) -> None:
        unit = (Granularity.GROUP, rule.pop("size", 8))
        rule = {"kind": "mse"} | rule
        weight_scales(w, IntGrid(4), True, *unit, RangeRule(**rule), torch.float32, importance)

    bad = w.clone()
    bad[1, 2] = math.nan
    wrong: list[tuple[type[PrismQuantError], str, dict[str, Any]]] = [
        (NumericsError, r"nan at index \[1, 2\]", {"w": bad}),
        (FormatError, "24 does not divide 32", {"w": w, "size": 24}),
        (RecipeError, "ema rule is for activations", {"w": w, "kind": "ema"}),
        (NumericsError, r"shape \[32\]", {"w": w, "importance": torch.ones(31)}),
        (NumericsError, "negative", {"w": w, "importance": -torch.ones(32)}),
        (NumericsError, "importance", {"w": w, "importance": torch.full((32,), math.inf)}),
    ]
    for error, told, arguments in wrong:
        with pytest.raises(error, match=told):
            scales(**arguments)


# --- records ----------------------------------------------------------------------------------


def record_of(*batches: Tensor, momentum: float = 0.01) -> InputRange:
    record = InputRange(momentum)
    for batch in batches:
        record.update(batch)
    return record


def same(a: InputRange, b: InputRange, but: tuple[str, ...] = ()) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[k], right[k]) for k in left if k not in but) and a.count == b.count


@st.composite
def batches_of_values(draw: st.DrawFn) -> list[Tensor]:
    """Batches of very different magnitudes, with zeros, subnormals and powers of two among them."""
    special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -2.0,
        1e-45,
        -1e-45,
        1e-38,
        -1e38,
        2.0**-100,
        -(2.0**-113),
    ]
    number = st.one_of(st.sampled_from(special), st.floats(width=32, allow_nan=False))
    number = number.filter(math.isfinite)
    count = draw(st.integers(1, 5))
    return [torch.tensor(draw(st.lists(number, min_size=1, max_size=12))) for _ in range(count)]


@given(batches=batches_of_values(), data=st.data())
def test_a_record_depends_on_neither_order_nor_batches_nor_merges(
    batches: list[Tensor], data: st.DataObject
) -> None:
    """Bit for bit, but for the moving average, which is about order."""
    ordered = ("averages", "batches")
    together = record_of(torch.cat(batches))
    one_by_one = record_of(*batches)
    shuffled = record_of(*data.draw(st.permutations(batches)))
    cut = data.draw(st.integers(0, len(batches)))
    left, right = record_of(*batches[:cut]), record_of(*batches[cut:])
    untouched = right.state_dict()
    left.merge(right)
    assert same(one_by_one, together, but=ordered)
    assert same(one_by_one, shuffled, but=ordered)
    assert same(one_by_one, left, but=("averages",))
    torch.testing.assert_close(
        left.state_dict()["averages"], one_by_one.state_dict()["averages"], rtol=1e-9, atol=0
    )
    assert all(torch.equal(value, right.state_dict()[key]) for key, value in untouched.items())


@given(batches=batches_of_values())
def test_extremes_and_counts_are_exact(batches: list[Tensor]) -> None:
    values = torch.cat(batches)
    record = record_of(*batches)
    assert record.count == values.numel()
    assert (record.low, record.high) == (values.min().item(), values.max().item())
    assert record.result(RangeRule(), IntGrid(8), True) == (record.low, record.high)


@given(
    batches=batches_of_values(),
    percentile=st.sampled_from([0.6, 0.9, 0.99, 1.0]),
    symmetric=st.booleans(),
)
def test_percentiles_are_exact_to_within_one_bin(
    batches: list[Tensor], percentile: float, symmetric: bool
) -> None:
    values = torch.cat(batches).double().sort().values
    record = record_of(*batches)
    rank = math.ceil(percentile * len(values))
    rule = RangeRule("percentile", percentile=percentile)
    low, high = record.result(rule, IntGrid(8), symmetric)
    if symmetric:
        want_high = values.abs().sort().values[rank - 1].item()
        want_low = -want_high
    else:
        want_high, want_low = values[rank - 1].item(), values[-rank].item()
    assert 0 <= high - want_high <= record.bin_width
    assert 0 <= want_low - low <= record.bin_width


@pytest.mark.parametrize("percentile", [0.9, 0.999, 0.9999])
def test_percentiles_of_many_values_are_exact_to_within_one_bin(percentile: float) -> None:
    x = heavy_tailed(5, 400_000)
    record = record_of(*x.split(30_011))
    rank = math.ceil(percentile * x.numel())
    rule = RangeRule("percentile", percentile=percentile)
    low, high = record.result(rule, IntGrid(8), False)
    assert 0 <= high - x.sort().values[rank - 1].item() <= record.bin_width
    assert 0 <= x.sort().values[-rank].item() - low <= record.bin_width
    assert record.bin_width <= float(x.abs().max()) / 4096


def mean_error(x: Tensor, low: float, high: float, grid: Grid, symmetric: bool, p: float) -> float:
    """The p-norm error per value of a static scale, from the values themselves."""
    ends = (torch.tensor([low]), torch.tensor([high]))
    scale, zero = scale_zero_point(*ends, grid, symmetric, torch.float32)
    codes = quantize(x, scale, zero, grid, Granularity.TENSOR)
    values = dequantize(codes, scale, zero, Granularity.TENSOR, None, torch.float32, grid)
    error = x.double() - values.double()
    return float((error.abs() ** p).mean() ** (1 / p))


@pytest.mark.parametrize("grid", [IntGrid(4), IntGrid(8), *map(FloatGrid, FLOAT_KINDS)], ids=str)
@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mse_of_a_record_is_within_one_bin_of_brute_force(
    grid: Grid, norm: float, seed: int
) -> None:
    """Each value is taken for one at most half a bin away, and the distance to the nearest code
    changes no faster than the value: so both errors are off by half a bin at most."""
    x = heavy_tailed(seed, 20_000)
    record = record_of(x)
    rule = RangeRule("mse", norm=norm)
    low, high = record.result(rule, grid, True)
    assert low == -high
    edge = float(x.abs().max())
    brute = min(
        mean_error(x, -edge * f, edge * f, grid, True, norm)
        for f in torch.linspace(grid.headroom, 0.2, rule.steps, dtype=torch.float64).tolist()
    )
    assert mean_error(x, low, high, grid, True, norm) <= brute + record.bin_width


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_searches_the_ends_of_an_asymmetric_range_apart(bits: int) -> None:
    """After a GELU, the short side is worth all of itself while the long side is cut."""
    x = torch.nn.functional.gelu(heavy_tailed(6, 20_000))
    grid = IntGrid(bits)
    record = record_of(x)
    low, high = record.result(RangeRule("mse"), grid, False)
    assert record.low <= low <= 0 < high <= record.high
    extremes = (record.low, record.high)
    error = mean_error(x, low, high, grid, False, 2.4)
    assert error <= mean_error(x, *extremes, grid, False, 2.4) + record.bin_width
    jointly = min(
        mean_error(x, extremes[0] * f, extremes[1] * f, grid, False, 2.4)
        for f in torch.linspace(1, 0.2, 40).tolist()
    )
    assert error <= jointly * 1.01 + record.bin_width


@pytest.mark.parametrize(
    ("grid", "symmetric"),
    [(IntGrid(8), True), (IntGrid(8), False), *((FloatGrid(k), True) for k in FLOAT_KINDS)],
    ids=str,
)
@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0], [-3.0, -1.0], [1e-44], [3.4e38, -3.4e38]])
def test_unusual_records_still_choose_a_finite_range(
    values: list[float], grid: Grid, symmetric: bool
) -> None:
    record = record_of(torch.tensor(values))
    for kind in ("minmax", "percentile", "mse", "ema"):
        low, high = record.result(RangeRule(kind), grid, symmetric)  # type: ignore[arg-type]
        scale, _ = scale_zero_point(
            torch.tensor([low]), torch.tensor([high]), grid, symmetric, torch.float32
        )
        assert bool(torch.isfinite(scale).all())


def test_the_moving_average_forgets_at_the_rate_of_its_momentum() -> None:
    """Corrected for its start: the weights of the batches seen always sum to one."""
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 4.0]), torch.tensor([0.0, 10.0])]
    record = record_of(*batches, momentum=0.25)
    weights = [0.25 * 0.75**2, 0.25 * 0.75, 0.25]
    rule = RangeRule("ema", momentum=0.25)
    low, high = record.result(rule, IntGrid(8), False)
    assert low == pytest.approx((-1 * weights[0] - 3 * weights[1]) / sum(weights))
    assert high == pytest.approx((2 * weights[0] + 4 * weights[1] + 10 * weights[2]) / sum(weights))
    first = record_of(batches[0], momentum=0.25).result(rule, IntGrid(8), False)
    assert first == (-1.0, 2.0)


def test_another_momentum_is_refused() -> None:
    record = record_of(torch.ones(3))
    with pytest.raises(RecipeError, match=r"0\.5"):
        record.result(RangeRule("ema", momentum=0.5), IntGrid(8), True)
    with pytest.raises(NumericsError, match="cannot be merged"):
        record.merge(InputRange(0.5))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_any_shape_and_dtype_is_counted_as_float32(dtype: torch.dtype) -> None:
    x = heavy_tailed(7, 4, 6, 10).to(dtype)
    assert same(record_of(x), record_of(x.float().flatten()))
    assert same(record_of(x.transpose(0, 2)), record_of(x))


def test_nothing_recorded_is_no_range_and_an_empty_batch_is_no_batch() -> None:
    record = record_of(torch.zeros(0, 8))
    assert same(record, InputRange())
    with pytest.raises(NumericsError, match="no value has been recorded"):
        record.result(RangeRule(), IntGrid(8), True)
    seen = record_of(torch.ones(2))
    seen.merge(record)
    assert same(seen, record_of(torch.ones(2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_leave_the_record_unchanged(bad: float) -> None:
    record = record_of(torch.ones(4))
    x = torch.ones(3, 5)
    x[2, 1] = bad
    with pytest.raises(NumericsError, match=rf"{bad} at index \[2, 1\]"):
        record.update(x)
    assert same(record, record_of(torch.ones(4)))


def test_values_beyond_float32_are_refused() -> None:
    with pytest.raises(NumericsError, match="float32"):
        InputRange().update(torch.tensor([1e300], dtype=torch.float64))


def test_the_state_is_a_faithful_copy() -> None:
    record = record_of(heavy_tailed(8, 100), heavy_tailed(9, 50) * 100, momentum=0.2)
    back = InputRange.from_state_dict(record.state_dict())
    assert same(back, record)
    assert back.momentum == 0.2
    back.update(torch.ones(3))
    assert not same(back, record)
    assert same(InputRange.from_state_dict(InputRange().state_dict()), InputRange())


def test_a_broken_state_is_refused() -> None:
    state = record_of(torch.ones(3)).state_dict()
    with pytest.raises(NumericsError, match="made of"):
        InputRange.from_state_dict({k: v for k, v in state.items() if k != "counts"})
    with pytest.raises(NumericsError, match=r"counts.*\[3\]"):
        InputRange.from_state_dict(state | {"counts": torch.zeros(3, dtype=torch.int64)})
