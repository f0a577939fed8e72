"""The compiled first look at trials: it changes none of the scales that torch alone finds."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismquant.kernels import range_search as search
from prismquant.kernels.dispatch import imported
from prismquant.numerics import ranges
from prismquant.numerics.grids import FloatGrid, Grid, IntGrid
from prismquant.numerics.kinds import FLOAT_KINDS, Granularity
from prismquant.numerics.ranges import RangeRule
from prismquant.numerics.scale_search import Search, losses_in_steps
from prismquant.numerics.scales import ScaleFormat, global_scale

runs_numba = pytest.mark.skipif(
    search.look_for(torch.device("cpu")) is None, reason="there is no numba that works"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP4 = FloatGrid("e2m1")
# A grid, whether it is symmetric, and a kind of scale or the dtype of a float one.
CASES: list[tuple[Grid, bool, str | torch.dtype]] = [
    *((IntGrid(bits), True, dtype) for bits in (2, 4, 8) for dtype in DTYPES),
    *((IntGrid(bits), False, torch.bfloat16) for bits in (2, 3, 4, 8)),
    (IntGrid(3, narrow=True), True, torch.bfloat16),
    (IntGrid(4), False, torch.float16),
    (IntGrid(8), False, torch.float32),
    *((FloatGrid(kind), True, torch.bfloat16) for kind in FLOAT_KINDS),
    *((FloatGrid(kind), True, "e8m0") for kind in FLOAT_KINDS),
    (FloatGrid("e4m3"), True, torch.float32),
    (FP4, True, "e4m3"),
    (FP4, True, "e8m0-ceil"),
]
UNITS = [
    (Granularity.TENSOR, None),
    (Granularity.CHANNEL, None),
    (Granularity.GROUP, 16),
    (Granularity.GROUP, 96),
    (Granularity.BLOCK, 16),
]


def odd_weight(seed: int, rows: int, tail: bool) -> Tensor:
    """Among others rows that are all zero, of one sign, tiny, huge, or two magnitudes only."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, 192, generator=generator)
    if tail:
        w = w / torch.rand(rows, 192, generator=generator).clamp_min(1e-3).sqrt()
    w[0] = 0.0
    w[1].abs_()
    w[2] *= 1e-36
    w[3] *= 1e36
    w[4].sign_()
    w[5] = (w[5] * 4).round() / 4
    w[6] *= 1e-42
    return w


@runs_numba
@settings(max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    case=st.sampled_from(CASES),
    unit=st.sampled_from(UNITS),
    kind=st.sampled_from(["mse", "mse", "sweep"]),
    norm=st.sampled_from([0.7, 1.0, 2.0, 2.4, 3.5, 10.0]),
    weighted=st.booleans(),
    signed=st.booleans(),
    tail=st.booleans(),
    rows=st.sampled_from([7, 16, 37]),
)
def test_a_look_changes_none_of_the_scales(
    seed: int,
    case: tuple[Grid, bool, str | torch.dtype],
    unit: tuple[Granularity, int | None],
    kind: ranges.RuleKind,
    norm: float,
    weighted: bool,
    signed: bool,
    tail: bool,
    rows: int,
) -> None:
    """Bit for bit."""
    grid, symmetric, scale = case
    w = odd_weight(seed, rows, tail)
    importance = None
    if weighted:
        importance = torch.rand(192, generator=torch.Generator().manual_seed(seed)).pow(6)
        importance[::5] = 0.0
    form: torch.dtype | ScaleFormat
    if isinstance(scale, str):
        divisor = global_scale(w.abs().max(), grid) if scale == "e4m3" else None
        form = ScaleFormat(torch.bfloat16, scale, divisor)  # type: ignore[arg-type]
    else:
        form = scale
    rule = RangeRule(kind, norm=norm, signed_scale=signed)
    arguments = (w, grid, symmetric, *unit, rule, form, importance)
    want, want_zero = ranges.weight_scales(*arguments)
    found, zero = search.weight_scales(*arguments)
    assert torch.equal(found.float(), want.float())
    assert zero is want_zero is None or torch.equal(zero, want_zero)  # type: ignore[arg-type]


@runs_numba
@pytest.mark.parametrize("kind", ["e8m0", "e4m3", "float"])
def test_four_over_six_takes_the_same_scales(kind: str) -> None:
    w = odd_weight(1, 37, tail=True)
    divisor = global_scale(w.abs().max(), FP4) if kind == "e4m3" else None
    form = ScaleFormat(torch.bfloat16, kind, divisor)  # type: ignore[arg-type]
    arguments = (w, FP4, True, Granularity.GROUP, 16, RangeRule("four_over_six"), form)
    want, _ = ranges.weight_scales(*arguments)
    assert torch.equal(search.weight_scales(*arguments)[0].float(), want.float())


@runs_numba
def test_threads_share_the_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_TILES_OF_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    arguments = (odd_weight(4, 37, tail=True), IntGrid(4), False, Granularity.GROUP, 32)
    more = (RangeRule("mse"), torch.bfloat16)
    for found, want in zip(
        search.weight_scales(*arguments, *more),
        ranges.weight_scales(*arguments, *more),
        strict=True,
    ):
        assert found is not None
        assert want is not None
        assert torch.equal(found, want)


@runs_numba
@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4, 10.0])
@pytest.mark.parametrize(
    ("grid", "symmetric"), [(IntGrid(4), True), (IntGrid(4), False), (FloatGrid("e4m3"), True)]
)
def test_a_look_rules_out_all_but_a_few_and_never_the_best(
    grid: Grid, symmetric: bool, norm: float
) -> None:
    """Against all losses: nothing that is ruled out was the best."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(100, 64, generator=generator)
    importance = torch.rand(10, 64, generator=generator)
    rule = Search(grid, symmetric, RangeRule("mse", norm=norm), ScaleFormat(torch.float32))
    low, high = values.amin(-1), values.amax(-1)
    scales, zeros = rule.scales(low, high, torch.linspace(1, 0.2, 40).unsqueeze(-1))
    look = search.look_for(torch.device("cpu"))
    assert look is not None
    first, left = look(rule, values, importance, scales, zeros, scales[0])
    losses = losses_in_steps(
        values.view(10, 10, 64),
        scales.view(-1, 10, 10),
        None if zeros is None else zeros.view(-1, 10, 10),
        rule,
        importance,
    ).view(40, 100)
    best = (losses * rule.per_step(scales, scales[0])).argmin(0)
    alone = ~left.any(1)
    assert torch.equal(first[alone], best[alone])
    assert bool(left[~alone].gather(1, best[~alone].unsqueeze(1)).all())
    assert float(alone.float().mean()) > 0.8


def test_without_a_compiler_torch_does_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (odd_weight(3, 16, tail=False), IntGrid(4), True, Granularity.GROUP, 32)
    more = (RangeRule("mse"), torch.bfloat16)
    want, _ = search.weight_scales(*arguments, *more)
    imported.cache_clear()
    monkeypatch.delitem(sys.modules, "prismquant.kernels.cpu_search", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    try:
        assert search.look_for(torch.device("cpu")) is None
        assert torch.equal(search.weight_scales(*arguments, *more)[0], want)
    finally:
        imported.cache_clear()


def test_there_is_no_look_on_other_devices() -> None:
    assert search.look_for(torch.device("meta")) is None
