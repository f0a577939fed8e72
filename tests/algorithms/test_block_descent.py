"""What tuners share: latent weights, their gradients, the loss, and what every tuner promises."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import tiny_blocks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prismquant.algorithms.autoround import AutoRound
from prismquant.algorithms.block_descent import Schedule, conclude, descend
from prismquant.algorithms.block_problem import BlockLayer, BlockProblem, block_loss, starting_loss
from prismquant.algorithms.gptq import GPTQ
from prismquant.algorithms.latent_weight import Latent, Scaled
from prismquant.algorithms.zeroquant import ZeroQuant
from prismquant.diagnostics.tuning_diagnostics import TuningDiagnostics
from prismquant.errors import FormatError, NumericsError
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import spec
from prismquant.numerics.affine import quantize
from prismquant.numerics.ranges import RangeRule, weight_scales

INTEGERS = ["int2-g4", "int3-channel", "int4-tensor", "int4-g8-asym", "int2-channel-asym"]
FLOATS = ["fp8-channel", "fp4-g8"]
TUNERS = [AutoRound(iterations=30, settle=10), ZeroQuant(iterations=30, settle=10)]


def layer_of(
    name: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, shuffle: float = 0.0
) -> BlockLayer:
    """A layer whose start is rounded to nearest, but for a fraction of arbitrary codes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, generator=generator)
    form, rule = spec(name), RangeRule("mse")
    scale, zero = weight_scales(
        weight, form.grid, form.symmetric, form.granularity, form.group_size, rule, dtype
    )

    def codes_of(x):
        return quantize(x, scale, zero, form.grid, form.granularity, form.group_size)

    other = codes_of(2 * torch.randn(6, 16, generator=generator))
    pick = torch.rand(6, 16, generator=generator) < shuffle
    start = QuantizedTensor(torch.where(pick, other, codes_of(weight)), scale, zero, form)
    return BlockLayer("mlp.up", weight, rule, dtype, start)


def assert_same(one: QuantizedTensor, two: QuantizedTensor) -> None:
    # As values: floating-point grids have two codes for zero.
    assert torch.equal(one.dequantize(), two.dequantize())
    assert one.spec.kind != "int" or torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale, two.scale)
    assert one.scale.dtype == two.scale.dtype
    assert (one.zero_point is None) == (two.zero_point is None)
    if one.zero_point is not None and two.zero_point is not None:
        assert torch.equal(one.zero_point, two.zero_point)


def in_grid(quantized: QuantizedTensor) -> bool:
    grid = quantized.spec.grid
    return bool(((quantized.codes >= grid.qmin) & (quantized.codes <= grid.qmax)).all())


@settings(max_examples=60)
@given(
    name=st.sampled_from(INTEGERS + FLOATS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    shuffle=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_a_latent_weight_begins_at_exactly_the_start_whatever_its_codes(name, dtype, shuffle, seed):
    layer = layer_of(name, seed, dtype, shuffle)
    latent = Latent(layer)
    assert_same(latent.quantized(), layer.start)
    assert_same(Scaled(layer, layer.start).quantized(), layer.start)


def test_a_weight_whose_code_is_the_nearest_has_no_offset():
    assert not Latent(layer_of("int3-g8")).offset.any()


def textbook(layer: BlockLayer, offset, low, high):
    """Fake quantization with straight-through rounding, written out, in float64."""
    form, start = layer.start.spec, layer.start
    size = form.group_size or layer.weight.shape[1]

    def through(x):
        return x + (x.round() - x).detach()

    def wide(x):
        return x.repeat_interleave(size, dim=1)

    scale = start.scale.double()
    zero = torch.zeros_like(scale)
    if start.zero_point is None:
        scale = scale * high
    else:
        steps = form.grid.levels - 1
        bottom = (form.grid.qmin - start.zero_point.double()) * scale * low
        top = (form.grid.qmax - start.zero_point.double()) * scale * high
        scale = (top - bottom) / steps
        zero = through(form.grid.qmin - bottom / scale)
        zero = zero.clamp(form.grid.qmin, form.grid.qmax)
    codes = through(layer.weight.double() / wide(scale) + offset) + wide(zero)
    return (codes.clamp(form.grid.qmin, form.grid.qmax) - wide(zero)) * wide(scale)


@pytest.mark.parametrize("name", ["int2-g4", "int3-channel", "int4-g8-asym", "int2-channel-asym"])
def test_gradients_are_those_of_straight_through_rounding(name):
    """Against automatic differentiation of the definition, away from the start."""
    layer = layer_of(name, 3, torch.float32)
    latent = Latent(layer)
    generator = torch.Generator().manual_seed(1)
    latent.offset += 0.4 * (torch.rand(6, 16, generator=generator) - 0.5)
    for factor in latent.factors:
        factor *= 0.85 + 0.2 * torch.rand(factor.shape, generator=generator)
    quantized = latent.quantized()
    slope = torch.randn(6, 16, generator=generator)
    latent.backward(slope, quantized)

    given_ = [x.double().requires_grad_() for x in (latent.offset, *latent.factors)]
    value = textbook(layer, given_[0], given_[1], given_[-1])
    torch.testing.assert_close(value.detach().float(), quantized.dequantize())
    expected = torch.autograd.grad((value * slope.double()).sum(), given_)
    for x, gradient in zip((latent.offset, *latent.factors), expected, strict=True):
        torch.testing.assert_close(x.grad.double(), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int3-g8", "int4-channel-asym", "int8-tensor", "fp4-g8"])
def test_gradients_of_scales_alone_are_exact(name):
    layer = layer_of(name, 1, torch.float32, 0.3)
    scaled = Scaled(layer, layer.start)
    scaled.factor *= torch.rand(scaled.factor.shape) + 0.5
    slope = torch.randn(6, 16)
    scaled.backward(slope, scaled.quantized())

    def total() -> float:
        return float((scaled.quantized().dequantize().double() * slope).sum())

    here, gradient = total(), scaled.factor.grad
    assert gradient is not None
    scaled.factor *= 1.25
    rise = float((gradient.double() * scaled.factor.double()).sum()) * 0.2
    assert total() - here == pytest.approx(rise, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", FLOATS)
def test_offsets_on_a_floating_point_grid_are_in_its_local_steps(name):
    """Half a step moves about half of all codes by one point, near zero and far from it alike."""
    layer = layer_of(name)
    latent = Latent(layer)
    latent.offset += 0.5
    before, after = layer.start.dequantize(), latent.quantized().dequantize()
    assert bool((after >= before).all())
    for part in (layer.weight.abs() < 0.5, layer.weight.abs() > 1):
        assert 0.25 < float((after != before)[part].double().mean()) < 0.75


def test_the_loss_is_the_mean_over_tokens_of_the_summed_square():
    weights = [torch.rand(64) for _ in range(8)]
    problem = tiny_blocks.block(token_weights=weights)
    values = {layer.name: layer.start.dequantize().double() for layer in problem.layers}
    floats = {name: weight.double() for name, weight in tiny_blocks.floats(0).items()}
    total = 0.0
    for x, weight in zip(tiny_blocks.draw(0, 8, 64), weights, strict=True):
        error = tiny_blocks.run(x.double(), values) - tiny_blocks.run(x.double(), floats)
        total += float((error.square().sum(1) * weight).sum())
    assert starting_loss(problem) == pytest.approx(total / float(sum(w.sum() for w in weights)))


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_tokens_of_weight_zero_change_nothing_whatever_they_hold(tuner):
    xs = tiny_blocks.draw(0, 4, 64)
    floats = tiny_blocks.floats(0)
    padded = [torch.cat([x, torch.full((5, tiny_blocks.WIDTH), 1e4)]) for x in xs]
    targets = [
        torch.cat([tiny_blocks.run(x, floats), torch.full((5, tiny_blocks.WIDTH), math.nan)])
        for x in xs
    ]
    counted = [torch.cat([torch.ones(64), torch.zeros(5)])] * 4
    plain = tuner.tune(tiny_blocks.block(calls=4))
    result = tuner.tune(
        tiny_blocks.block(calls=4, inputs=padded, targets=targets, token_weights=counted)
    )
    assert result.start_loss == pytest.approx(plain.start_loss, rel=1e-5)
    assert result.loss == pytest.approx(plain.loss, rel=0.1)


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
@pytest.mark.parametrize("solver", [None, GPTQ()], ids=["rtn", "gptq"])
@pytest.mark.parametrize("name", ["int2-g16", "int3-g16-asym", "int4-channel", "fp4-g16"])
def test_what_is_returned_is_better_and_gives_exactly_the_loss_that_is_told(tuner, solver, name):
    problem = tiny_blocks.block(name, solver=solver)
    result = tuner.tune(problem)
    assert result.start_loss == block_loss(problem, [layer.start for layer in problem.layers])
    assert result.loss == block_loss(problem, result.weights)
    assert result.loss < result.start_loss
    for layer, quantized in zip(problem.layers, result.weights, strict=True):
        assert quantized.scale.dtype == layer.scale_dtype
        assert quantized.spec == layer.start.spec
        assert quantized.spec.kind != "int" or in_grid(quantized)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    tuner=st.sampled_from(
        [
            AutoRound(iterations=3, learning_rate=1.0, settle=0),
            AutoRound(iterations=3, learning_rate=1.0),
            AutoRound(iterations=5, batch=1, momentum=0.0),
            ZeroQuant(iterations=3, learning_rate=1.0, range_learning_rate=1.0, settle=0),
            ZeroQuant(iterations=5, batch=1),
        ]
    ),
    name=st.sampled_from(["int2-g8", "int8-channel", "int3-tensor", "int4-g16-asym"]),
    gptq=st.booleans(),
)
def test_no_tuner_is_ever_worse_than_its_start(seed, tuner, name, gptq):
    problem = tiny_blocks.block(
        name, solver=GPTQ() if gptq else None, calls=3, tokens=16, seed=seed
    )
    result = tuner.tune(problem)
    assert result.loss <= result.start_loss
    assert result.loss == block_loss(problem, result.weights)
    assert all(in_grid(quantized) for quantized in result.weights)


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_a_seed_fixes_the_result_and_the_problem_stays_as_it_was(tuner):
    problem = tiny_blocks.block(solver=GPTQ())
    before = [(layer.weight.clone(), layer.start.codes.clone()) for layer in problem.layers]
    torch.manual_seed(1)
    first = tuner.tune(problem)
    torch.manual_seed(2)
    second = tuner.tune(problem)
    for one, two in zip(first.weights, second.weights, strict=True):
        assert_same(one, two)
    assert first.loss == second.loss
    assert first.diagnostics == second.diagnostics
    for layer, (weight, codes) in zip(problem.layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.start.codes, codes)
    third = replace(tuner, seed=5).tune(problem)
    assert third.loss != first.loss


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_gradients_are_taken_even_where_they_are_switched_off(tuner):
    with torch.no_grad():
        result = tuner.tune(tiny_blocks.block())
    assert result.loss < result.start_loss


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_rounding_alone_leaves_scales_and_zero_points(tuner):
    problem = tiny_blocks.block("int3-g16-asym")
    result = replace(tuner, learn_range=False).tune(problem)
    assert result.loss < result.start_loss
    assert result.diagnostics.changed_scales == 0
    assert result.diagnostics.settled_loss is None
    for layer, quantized in zip(problem.layers, result.weights, strict=True):
        assert torch.equal(layer.start.scale, quantized.scale)
        assert torch.equal(layer.start.zero_point, quantized.zero_point)


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_a_block_without_error_is_left_alone(tuner):
    problem = tiny_blocks.block()
    values = {layer.name: layer.start.dequantize() for layer in problem.layers}
    exact = replace(problem, target=lambda call: problem.output(call, values))
    result = tuner.tune(exact)
    assert (result.loss, result.start_loss) == (0.0, 0.0)
    assert result.diagnostics.iterations == 0
    for layer, quantized in zip(problem.layers, result.weights, strict=True):
        assert_same(layer.start, quantized)


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_a_layer_that_no_call_reaches_stays_as_it_was(tuner):
    problem = tiny_blocks.block()
    idle = replace(problem.layers[0], name="idle")
    result = tuner.tune(replace(problem, layers=(idle, *problem.layers)))
    assert_same(result.weights[0], idle.start)
    assert result.loss < result.start_loss


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_descent_ends_where_the_output_stops_being_finite(tuner):
    problem = tiny_blocks.block()
    runs = iter(range(10_000))

    def output(call, values):
        result = problem.output(call, values)
        return result * math.inf if next(runs) == 8 + 5 * 4 else result

    result = tuner.tune(replace(problem, output=output))
    assert result.diagnostics.iterations == 5
    assert result.loss <= result.start_loss


def test_a_start_that_is_not_finite_is_refused_by_name():
    problem = replace(
        tiny_blocks.block(), target=lambda call: torch.full((64, tiny_blocks.WIDTH), math.inf)
    )
    with pytest.raises(NumericsError) as caught:
        AutoRound().tune(problem)
    assert caught.value.where == "blocks.0"


@given(calls=st.integers(1, 12), batch=st.integers(1, 15), seed=st.integers(0, 100))
def test_every_call_is_seen_as_often_as_any_other(calls, batch, seed):
    schedule = Schedule(20, batch, seed)
    seen: Counter[int] = Counter()
    for chosen in schedule.batches(calls):
        assert len(set(chosen)) == len(chosen) == min(batch, calls)
        seen.update(chosen)
        counts = [seen[call] for call in range(calls)]
        assert max(counts) - min(counts) <= 1
    assert list(schedule.batches(calls)) == list(schedule.batches(calls))


def test_steps_are_told_what_is_left():
    problem, told = tiny_blocks.block(), []
    latents = [Latent(layer) for layer in problem.layers]
    assert descend(problem, latents, Schedule(4, 2, 0), 1.0, told.append) == 4
    assert told == [1.0, 0.75, 0.5, 0.25]


KNOWN = TuningDiagnostics("autoround", 0.5)


def test_worse_codes_are_dropped_and_the_scales_of_the_start_settle():
    problem = tiny_blocks.block()
    worse = [
        replace(layer.start, codes=torch.zeros_like(layer.start.codes)) for layer in problem.layers
    ]
    start_loss = starting_loss(problem)
    kept = conclude(problem, start_loss, worse, Schedule(0, 1, 0), KNOWN)
    assert (kept.loss, kept.diagnostics.kept_start_codes) == (start_loss, True)
    assert (kept.diagnostics.method, kept.diagnostics.learning_rate) == ("autoround", 0.5)
    settled = conclude(problem, start_loss, worse, Schedule(30, 4, 0), KNOWN)
    assert settled.loss < start_loss
    assert settled.diagnostics.changed_codes == 0
    assert settled.diagnostics.changed_scales > 0
    assert settled.loss == settled.diagnostics.settled_loss


def test_layers_that_do_not_fit_are_refused_by_name():
    good = layer_of("int3-g8")
    wrong = [
        {"weight": good.weight.double()},
        {"weight": good.weight[:3]},
        {"scale_dtype": torch.float32},
    ]
    for change in wrong:
        with pytest.raises(FormatError) as caught:
            replace(good, **change)
        assert caught.value.where == "mlp.up"
    with pytest.raises(NumericsError) as refused:
        replace(good, weight=good.weight / 0)
    assert refused.value.where == "mlp.up"


def test_blocks_that_cannot_be_tuned_are_refused_by_name():
    problem = tiny_blocks.block()
    changes = [
        {"layers": ()},
        {"layers": problem.layers[:1] * 2},
        {"calls": 0},
    ]
    for change in changes:
        with pytest.raises(FormatError) as caught:
            replace(problem, **change)
        assert caught.value.where == "blocks.0"


@pytest.mark.parametrize(
    "change",
    [
        {"target": lambda call: torch.zeros(3, tiny_blocks.WIDTH)},
        {"token_weights": lambda call: torch.ones(3)},
    ],
)
def test_targets_and_weights_of_other_tokens_are_refused(change):
    problem: BlockProblem = replace(tiny_blocks.block(), **change)
    with pytest.raises(FormatError, match="call 0") as caught:
        starting_loss(problem)
    assert caught.value.where == "blocks.0"
