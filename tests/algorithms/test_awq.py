"""AWQ: the scales it tries against the formula, and a search that never harms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismquant.algorithms import awq
from prismquant.algorithms.awq import AWQ
from prismquant.algorithms.output_error import output_error
from prismquant.algorithms.smooth_edge import Consumer, EdgeProblem
from prismquant.errors import RecipeError
from prismquant.formats.spec import spec
from prismquant.numerics.ranges import RangeRule
from prismquant.statistics.channel_sizes import ChannelSizes

SIZE = 32


def problem(
    weights: str | None = "int4-g8",
    activations: str | None = None,
    *,
    seed: int = 0,
    spread: float = 1.0,
    tile: int = 1,
    kind: str = "minmax",
) -> EdgeProblem:
    """Inputs whose channels differ in size, more so for vision tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, SIZE * tile, generator=generator)
    marks = torch.rand(256, generator=generator) < 0.5
    x *= torch.exp(spread * torch.randn(SIZE * tile, generator=generator))
    x[marks] *= torch.exp(spread * torch.randn(SIZE * tile, generator=generator))
    record = ChannelSizes(SIZE * tile)
    record.update(x, torch.randint(1, 3, (256,), generator=generator), marks)
    form = None if weights is None else spec(weights)
    return EdgeProblem(
        "norm",
        SIZE,
        torch.arange(SIZE).repeat(tile),
        tuple(
            Consumer(
                name,
                torch.randn(rows, SIZE * tile, generator=generator),
                form,
                RangeRule(kind),  # type: ignore[arg-type]
            )
            for name, rows in (("gate", 24), ("up", 16))
        ),
        None if activations is None else spec(activations),
        RangeRule(),
        torch.bfloat16,
        record,
    )


def by_formula(
    task: EdgeProblem, exponent: float, weight_term: int, group: int, vision_weight: float = 1.0
) -> Tensor:
    """The scale of the paper, or with the weight term, in float64, one number at a time."""
    record = task.record
    costs = record.token_weights.double() * torch.where(record.vision, vision_weight, 1.0)
    inputs = (record.inputs.double().abs() * costs.unsqueeze(1)).sum(0) / costs.sum()
    sizes = torch.zeros(len(inputs), dtype=torch.float64)
    rows = [row.double().abs() for consumer in task.consumers for row in consumer.weight]
    for row in rows:
        for start in range(0, len(row), group):
            part = row[start : start + group]
            sizes[start : start + group] += part / part.max() / len(rows)
    inputs, sizes = inputs.view(-1, SIZE).mean(0), sizes.view(-1, SIZE).mean(0)
    scale = inputs**exponent / (sizes ** (1 - exponent) if weight_term else 1.0)
    return (scale / (scale.max() * scale.min()).sqrt()).float()


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize(
    ("name", "group"), [("int4-g8", 8), ("int3-channel", SIZE), ("int4-g16-asym", 16)]
)
def test_the_scale_is_the_best_of_the_formula(monkeypatch, name, group, tile, duo):
    """Every scale of the grid is computed and measured by itself."""
    monkeypatch.setattr(awq, "_PIECE", 7 * SIZE * tile)
    task = problem(name, tile=tile)
    group = SIZE * tile if name == "int3-channel" else group
    scales = {
        (step / 6, term): by_formula(task, step / 6, term, group)
        for term in range(1 + duo)
        for step in range(1, 7 - term)
    }
    errors = {key: output_error(task, scale) for key, scale in scales.items()}
    best = min(errors, key=errors.__getitem__)
    result = AWQ(grid=6, duo=duo).fit(task)
    assert (result.diagnostics.choice.exponent, result.diagnostics.choice.weight_term) == best
    torch.testing.assert_close(result.scale, scales[best], rtol=1e-5, atol=0)
    assert result.diagnostics.error_after == pytest.approx(errors[best], rel=1e-3)
    assert result.diagnostics.tried == (11 if duo else 6)


def test_a_salient_channel_is_protected():
    """A channel whose input is large gets finer steps, and the outputs' error falls by far."""
    task = problem("int4-channel", spread=0.0)
    x = task.record.inputs.clone()
    x[:, 3] *= 30
    record = ChannelSizes(SIZE)
    record.update(x)
    result = AWQ().fit(EdgeProblem(**{**vars(task), "record": record}))
    assert result.diagnostics.error_after < 0.6 * result.diagnostics.error_before
    assert int(result.scale.argmax()) == 3


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    weights=st.sampled_from([None, "int4-g8", "int3-channel", "int8-tensor", "fp4-g8"]),
    activations=st.sampled_from([None, "int8-token", "int8-tensor", "fp8-token"]),
    spread=st.sampled_from([0.0, 0.1, 2.0]),
    power_of_two=st.booleans(),
    rows=st.sampled_from([2, 100]),
)
def test_it_is_never_worse_than_no_scaling(seed, weights, activations, spread, power_of_two, rows):
    task = problem(weights, activations, seed=seed, spread=spread)
    result = AWQ(grid=3, rows=rows, power_of_two=power_of_two).fit(task)
    if result.scale is None:
        assert result.diagnostics.skipped
    else:
        assert output_error(task, result.scale) < output_error(task, None)
        assert bool(torch.isfinite(result.scale).all())
        assert bool((result.scale > 0).all())


def test_looking_both_ways_is_never_worse_than_one_way():
    for seed in range(5):
        task = problem(seed=seed)
        both, one = (AWQ(duo=duo).fit(task).diagnostics.error_after for duo in (True, False))
        assert both <= one


def test_even_inputs_leave_the_edge_as_it_is():
    record = ChannelSizes(8)
    record.update(torch.full((5, 8), 2.0))
    consumer = Consumer("r", torch.full((4, 8), 0.7), spec("int4-channel"))
    how = (None, RangeRule(), torch.float32)
    task = EdgeProblem("n", 8, torch.arange(8), (consumer,), *how, record)
    result = AWQ().fit(task)
    assert result.scale is None
    assert result.diagnostics.tried == 0


def test_scales_follow_the_range_rule_of_the_weights():
    plain, searched = (AWQ().fit(problem(kind=k)).diagnostics for k in ("minmax", "mse"))
    assert searched.error_after < plain.error_after


@pytest.mark.parametrize("vision_weight", [0.0, 0.1, 10.0])
def test_vision_tokens_count_as_told_in_means_and_errors(vision_weight):
    task = problem()
    result = AWQ(grid=4, duo=False, vision_weight=vision_weight).fit(task)
    expected = by_formula(task, result.diagnostics.choice.exponent, 0, 8, vision_weight)
    torch.testing.assert_close(result.scale, expected, rtol=1e-5, atol=0)
    weighed = EdgeProblem(**{**vars(task), "vision_weight": vision_weight})
    assert result.diagnostics.error_before == pytest.approx(output_error(weighed, None), rel=1e-6)


def test_where_only_vision_tokens_came_their_weight_does_not_matter():
    record = ChannelSizes(SIZE)
    task = problem()
    record.update(task.record.inputs, None, torch.ones(256, dtype=torch.bool))
    alone = EdgeProblem(**{**vars(task), "record": record})
    scales = [AWQ(vision_weight=w).fit(alone).scale for w in (1.0, 0.25)]
    torch.testing.assert_close(*scales)
    assert AWQ(vision_weight=0.0).fit(alone).scale is None


def test_a_channel_that_is_never_active_keeps_its_scale():
    task = problem()
    record = ChannelSizes(SIZE)
    x = task.record.inputs.clone()
    x[:, 4] = 0.0
    record.update(x)
    result = AWQ().fit(EdgeProblem(**{**vars(task), "record": record}))
    assert float(result.scale[4]) == 1


def test_powers_of_two_and_bounds():
    task = problem(spread=3.0)
    result = AWQ(power_of_two=True, max_scale=5.0).fit(task)
    assert set(result.scale.tolist()) <= {0.25, 0.5, 1.0, 2.0, 4.0}
    assert result.diagnostics.largest_scale == float(result.scale.max())


def test_edges_without_tokens_or_formats_are_skipped_with_the_reason():
    assert "quantized" in AWQ().fit(problem(None, None)).diagnostics.skipped
    empty = EdgeProblem(**{**vars(problem()), "record": ChannelSizes(SIZE)})
    assert "calibration" in AWQ().fit(empty).diagnostics.skipped


@pytest.mark.parametrize(
    "options",
    [
        {"grid": 0},
        {"vision_weight": -1.0},
        {"vision_weight": math.nan},
        {"rows": 0},
        {"max_scale": 1.5},
        {"max_scale": 1e7},
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, Any]):
    with pytest.raises(RecipeError, match=next(iter(options))):
        AWQ(**options)
