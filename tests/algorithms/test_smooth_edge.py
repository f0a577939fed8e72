"""The measure that judges scales of edges, against float64; and what fits a scale to be folded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismquant.algorithms import output_error as measure
from prismquant.algorithms.edge_scale import best_scale, foldable_scale, judge
from prismquant.algorithms.output_error import Trials, output_error
from prismquant.algorithms.smooth_edge import Consumer, EdgeProblem, hopeless
from prismquant.diagnostics.edge_diagnostics import AWQChoice, EdgeDiagnostics
from prismquant.errors import FormatError, NumericsError
from prismquant.formats.spec import NumberSpec, spec
from prismquant.numerics.affine import dynamic_scale_zero_point, scale_zero_point, simulate
from prismquant.numerics.ranges import RangeRule, weight_scales
from prismquant.statistics.channel_sizes import ChannelSizes
from prismquant.statistics.input_range import InputRange

SIZE, TILE, TOKENS = 8, 2, 60
MINMAX = RangeRule()
ALL = (torch.ones(SIZE, dtype=torch.bool), 1e6, False)


def seen(seed: int = 0, features: int = SIZE * TILE) -> ChannelSizes:
    """A record of text and vision tokens of different weights; one channel is an outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, features, generator=generator)
    x[:, 1] *= 30
    record = ChannelSizes(features)
    record.update(
        x,
        torch.randint(0, 3, (TOKENS,), generator=generator),
        torch.rand(TOKENS, generator=generator) < 0.4,
    )
    return record


def edge(
    weights: str | None = "int4-g8",
    activations: str | None = None,
    rows: tuple[int, ...] = (7, 5),
    *,
    seed: int = 0,
    rule: RangeRule = MINMAX,
    weight_range: RangeRule = MINMAX,
    vision_weight: float = 1.0,
    record: ChannelSizes | None = None,
) -> EdgeProblem:
    """An edge whose channels feed two columns each, as behind a concatenating merger."""
    generator = torch.Generator().manual_seed(100 + seed)
    form = None if weights is None else spec(weights)
    return EdgeProblem(
        "norm",
        SIZE,
        torch.arange(SIZE).repeat(TILE),
        tuple(
            Consumer(
                f"consumer{i}",
                torch.randn(count, SIZE * TILE, generator=generator) * (1 + 9 * i),
                form,
                weight_range,
            )
            for i, count in enumerate(rows)
        ),
        None if activations is None else spec(activations),
        rule,
        torch.bfloat16,
        seen(seed) if record is None else record,
        vision_weight,
    )


def positive(seed: int = 3) -> Tensor:
    return torch.exp(torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)))


def rounded(x: Tensor, form: NumberSpec, rule: RangeRule) -> Tensor:
    unit = (form.granularity, form.group_size)
    scales = weight_scales(x, form.grid, form.symmetric, *unit, rule, torch.bfloat16)
    return simulate(x, *scales, form.grid, *unit)


def served(problem: EdgeProblem, x: Tensor, factors: Tensor) -> Tensor:
    """The scaled input as the definition says, from the public record."""
    form = problem.activations
    if form is None:
        return x
    unit = (form.granularity, form.group_size)
    if form.dynamic:
        scales = dynamic_scale_zero_point(x, form.grid, form.symmetric, *unit, torch.bfloat16)
        return simulate(x, *scales, form.grid, *unit)
    low = (problem.record.low / factors).amin().view(1)
    high = (problem.record.high / factors).amax().view(1)
    if problem.activation_range.kind != "minmax":
        values = InputRange(problem.activation_range.momentum)
        values.update(x)
        ends = values.result(problem.activation_range, form.grid, form.symmetric)
        low, high = (torch.tensor([end]) for end in ends)
    scales = scale_zero_point(low, high, form.grid, form.symmetric, torch.bfloat16)
    return simulate(x, *scales, form.grid, *unit)


def brute_force(problem: EdgeProblem, scale: Tensor | None) -> float:
    """The definition, one consumer at a time, products in float64."""
    scale = torch.ones(problem.size) if scale is None else scale
    factors = scale[problem.columns]
    record = problem.record
    x = record.inputs
    costs = record.token_weights.double()
    costs = costs * torch.where(record.vision, problem.vision_weight, 1.0)
    shown = served(problem, x / factors, factors)
    errors = []
    for consumer in problem.consumers:
        weight = consumer.weight * factors
        if consumer.spec is not None:
            weight = rounded(weight, consumer.spec, consumer.range_rule)
        exact = x.double() @ consumer.weight.double().T
        error = exact - shown.double() @ weight.double().T
        lost, total = ((part**2).sum(1) @ costs for part in (error, exact))
        errors.append(float(lost / total))
    return sum(errors) / len(errors)


# --- the measure ------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("vision_weight", [0.0, 1.0, 0.3])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("int4-g8", None),
        ("int8-tensor", None),
        (None, "int8-token"),
        ("int3-channel", "int8-token"),
        ("int4-channel-asym", "int8-tensor"),
        ("int4-g8", "int8-tensor-asym"),
        ("fp4-g8", "fp8-token"),
        ("fp8-channel", "fp8-tensor"),
    ],
)
def test_the_error_is_the_one_of_the_definition(weights, activations, vision_weight, scaled):
    problem = edge(weights, activations, vision_weight=vision_weight)
    scale = positive() if scaled else None
    expected = brute_force(problem, scale)
    assert expected > 0
    assert output_error(problem, scale) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["percentile", "mse"])
def test_weights_and_static_inputs_follow_their_range_rules(kind):
    rule = RangeRule(kind, percentile=0.97)
    problem = edge("int3-channel", "int8-tensor", rule=rule, weight_range=rule)
    expected = brute_force(problem, positive())
    assert output_error(problem, positive()) == pytest.approx(expected, rel=1e-4)
    plain = edge("int3-channel", "int8-tensor")
    assert expected != pytest.approx(brute_force(plain, positive()), rel=1e-2)


def test_the_static_range_holds_every_token_not_only_those_of_the_sample():
    record = ChannelSizes(4, sample=1)
    record.update(torch.tensor([[100.0, 0.0, 0.0, 0.0]]))
    record.update(torch.ones(1, 4))
    assert torch.equal(record.inputs, torch.ones(1, 4))
    problem = EdgeProblem(
        "n",
        4,
        torch.arange(4),
        (Consumer("r", torch.eye(4), None),),
        spec("int8-tensor"),
        MINMAX,
        torch.float32,
        record,
    )
    # The step is 100 / 127.5, although the sample holds nothing but ones.
    assert output_error(problem, None) == pytest.approx((100 / 127.5 - 1) ** 2, rel=1e-3)


def test_scales_of_one_change_nothing():
    problem = edge("int4-channel", "int8-token")
    assert output_error(problem, torch.ones(SIZE)) == output_error(problem, None)


@pytest.mark.parametrize("name", ["int4-channel", "int4-g8"])
def test_a_common_power_of_two_changes_nothing(name):
    problem = edge(name, "int8-token")
    assert output_error(problem, torch.full((SIZE,), 8.0)) == output_error(problem, None)


def test_every_reader_counts_by_its_relative_error():
    """The second consumer's outputs are ten times larger; each counts half all the same."""
    both = output_error(edge(), None)
    problem = edge()
    alone = [
        output_error(
            EdgeProblem(
                "n", SIZE, problem.columns, (r,), None, MINMAX, torch.bfloat16, problem.record
            ),
            None,
        )
        for r in problem.consumers
    ]
    assert both == pytest.approx(sum(alone) / 2, rel=1e-6)


def test_nothing_is_lost_where_nothing_is_quantized_or_nothing_arrives():
    floating = edge(None, None)
    assert output_error(floating, positive()) == 0
    assert hopeless(floating).diagnostics.skipped
    empty = edge(record=ChannelSizes(SIZE * TILE))
    assert output_error(empty, positive()) == 0
    assert "no calibration token" in hopeless(empty).diagnostics.skipped
    assert hopeless(edge()) is None


def test_a_reader_that_puts_out_nothing_loses_nothing():
    problem = edge()
    silent = Consumer("silent", torch.zeros(3, SIZE * TILE), spec("int4-g8"))
    one = EdgeProblem("n", SIZE, problem.columns, (silent,), None, MINMAX, torch.bfloat16, seen())
    assert output_error(one, None) == 0


@pytest.mark.parametrize("name", ["int4-g8", "int4-channel", "int8-tensor"])
def test_how_rows_are_cut_into_pieces_does_not_matter(monkeypatch, name):
    problem = edge(name, "int8-token", rows=(23, 6))
    whole = output_error(problem, positive())
    monkeypatch.setattr(measure, "_PIECE", 5 * TOKENS)
    assert output_error(problem, positive()) == pytest.approx(whole, rel=1e-6)


def test_trials_on_some_rows_are_trials_of_an_edge_with_these_rows():
    problem = edge("int4-g8", rows=(20, 4))
    trials = Trials(problem, rows=5)
    chosen = problem.consumers[0].weight[[0, 4, 8, 12, 16]]
    consumers = (Consumer("some", chosen, spec("int4-g8")), problem.consumers[1])
    fewer = EdgeProblem(
        "n", SIZE, problem.columns, consumers, None, MINMAX, torch.bfloat16, problem.record
    )
    assert not trials.complete
    assert trials.error(positive()) == pytest.approx(output_error(fewer, positive()), rel=1e-6)
    assert Trials(problem, rows=20).complete
    assert Trials(problem).complete


@pytest.mark.parametrize("rule", [MINMAX, RangeRule(kind="mse", steps=20)])
@pytest.mark.parametrize("name", ["int4-g8", "int4-channel", "int8-tensor", "nvfp4", "fp4-b16"])
def test_scales_that_are_tried_together_have_the_errors_that_they_have_alone(name, rule):
    rows = (32, 16) if name == "fp4-b16" else (23, 6)
    problem = edge(name, "int8-token", rows=rows, weight_range=rule)
    generator = torch.Generator().manual_seed(3)
    scales = [torch.exp(torch.randn(SIZE, generator=generator)) for _ in range(5)]
    trials = Trials(problem, rows=40)
    alone = [trials.error(scale) for scale in (None, *scales)]
    assert trials.errors([None, *scales]) == alone
    assert len({*alone}) == len(alone)


# --- folding ----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    logs=st.lists(st.floats(-100, 100), min_size=1, max_size=12),
    dead=st.integers(0, 2**12 - 1),
    max_scale=st.floats(2, 1e6),
    power_of_two=st.booleans(),
)
def test_settled_scales_are_bounded_centred_and_one_where_dead(logs, dead, max_scale, power_of_two):
    live = torch.tensor([not dead >> i & 1 for i in range(len(logs))])
    values = torch.tensor(logs, dtype=torch.float64)
    values[~live] = math.nan
    scale = foldable_scale(values, live, max_scale, power_of_two)
    assert scale.dtype == torch.float32
    assert bool((scale[~live] == 1).all())
    assert float(scale.max()) <= max_scale * (1 + 1e-6)
    assert float(scale.min()) >= (1 - 1e-6) / max_scale
    if power_of_two:
        assert bool((torch.frexp(scale).mantissa == 0.5).all())
    elif bool(live.any()):
        assert float(scale[live].max() * scale[live].min()) == pytest.approx(1, rel=1e-5)


def test_settling_keeps_ratios_within_the_bound():
    logs = torch.tensor([0.0, 1.0, 3.5, -2.0])
    scale = foldable_scale(logs, torch.ones(4, dtype=torch.bool), 1e6, False)
    torch.testing.assert_close(scale / scale[0], torch.exp2(logs), rtol=1e-6, atol=0)


def test_one_stray_channel_does_not_push_the_others_to_the_bound():
    logs = torch.tensor([0.0, 0.5, 1.0, -90.0])
    scale = foldable_scale(logs, torch.ones(4, dtype=torch.bool), 1024.0, False)
    torch.testing.assert_close(scale[:3] / scale[0], torch.exp2(logs[:3]))


def test_equal_logs_settle_to_exact_ones():
    scale = foldable_scale(torch.full((5,), 3.3), torch.ones(5, dtype=torch.bool), 100.0, False)
    assert torch.equal(scale, torch.ones(5))


def test_channels_gather_what_their_columns_hold():
    problem = edge()
    values = torch.arange(16.0)
    assert problem.channel_max(values).tolist() == list(range(8, 16))
    assert problem.channel_mean(values).tolist() == [i + 4.0 for i in range(8)]
    unused = EdgeProblem(
        "n",
        3,
        torch.zeros(16, dtype=torch.int64),
        problem.consumers,
        None,
        MINMAX,
        torch.bfloat16,
        problem.record,
    )
    assert unused.channel_max(values).tolist() == [15, 0, 0]
    assert unused.channel_mean(values).tolist() == [7.5, 0, 0]


# --- choosing ---------------------------------------------------------------------------------


NO = AWQChoice(0.0, False)


def test_the_best_candidate_is_kept_with_its_notes():
    problem = edge("int4-g8")
    scales = [positive(seed) for seed in range(6)]
    scales.append(
        foldable_scale(problem.channel_max(problem.record.absmax.amax(0)).log2() / 2, *ALL)
    )
    errors = [output_error(problem, scale) for scale in scales]
    result = best_scale(problem, [(AWQChoice(i, False), s) for i, s in enumerate(scales)], rows=100)
    winner = errors.index(min(errors))
    assert errors[winner] < output_error(problem, None)
    assert result.diagnostics.choice.exponent == winner
    assert torch.equal(result.scale, scales[winner])
    assert result.diagnostics.error_after == pytest.approx(errors[winner], rel=1e-6)
    assert result.diagnostics.error_before == pytest.approx(output_error(problem, None), rel=1e-6)
    assert result.diagnostics.tried == 7


def test_no_candidate_is_kept_that_does_not_gain():
    problem = edge("int8-channel")
    result = best_scale(problem, [(NO, torch.full((SIZE,), 4.0)), (NO, torch.ones(SIZE))], rows=9)
    assert result.scale is None
    assert result.diagnostics.tried == 1
    assert "no scale" in result.diagnostics.skipped


def test_what_wins_on_some_rows_must_win_on_all():
    """One row gains from the scale, forty others lose: the search sees only the one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(41, 8, generator=generator)
    weight[0] = torch.tensor([7.4, 0.33, 0.33, 0.33, 0.33, 0.33, 0.33, 0.33])
    record = ChannelSizes(8)
    record.update(torch.randn(50, 8, generator=generator))
    problem = EdgeProblem(
        "n",
        8,
        torch.arange(8),
        (Consumer("r", weight, spec("int4-channel")),),
        None,
        MINMAX,
        torch.bfloat16,
        record,
    )
    scale = torch.tensor([1 / 20.0, 1, 1, 1, 1, 1, 1, 1])
    assert Trials(problem, 1).error(scale) < Trials(problem, 1).error(None)
    assert output_error(problem, scale) > output_error(problem, None)
    result = best_scale(problem, [(NO, scale)], rows=1)
    assert result.scale is None
    assert result.diagnostics.error_after > result.diagnostics.error_before


def test_scales_of_one_are_an_exact_no_op():
    result = judge(edge(), torch.ones(SIZE), NO, must_gain=False)
    assert result.scale is None
    assert result.diagnostics == EdgeDiagnostics(NO, skipped="all scales are one")


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"columns": torch.arange(SIZE)}, "columns must be"),
        ({"columns": torch.arange(16, dtype=torch.int32)}, "int64"),
        ({"columns": torch.arange(16)}, "0 to 15"),
        ({"columns": torch.arange(16) - 8}, "-8 to 7"),
        ({"consumers": ()}, "consumers"),
        ({"consumers": (Consumer("r", torch.ones(2, 5), None),)}, "input features"),
        ({"activations": spec("int4-g8")}, "activations"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(change: dict[str, Any], told: str):
    fields = {**vars(edge()), **change}
    with pytest.raises(FormatError, match=told) as caught:
        EdgeProblem(**fields)
    assert caught.value.where == "norm"


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_vision_weight_must_be_a_number_from_zero_on(bad):
    with pytest.raises(NumericsError, match="vision tokens"):
        edge(vision_weight=bad)


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (torch.ones(2, 8, dtype=torch.bfloat16), FormatError),
        (torch.ones(8), FormatError),
        (torch.ones(2, 7), FormatError),
        (torch.tensor([[1.0, math.nan]]).repeat(1, 4), NumericsError),
    ],
)
def test_a_reader_that_is_unfit_is_refused_by_name(weight, error):
    with pytest.raises(error) as caught:
        Consumer("up_proj", weight, spec("int4-g8"))
    assert caught.value.where == "up_proj"
