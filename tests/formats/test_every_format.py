"""Solvers, tuners, transforms and activations work for every number format, not only the usual."""

from __future__ import annotations

import math

import pytest
import tiny_blocks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismquant.algorithms.autoround import AutoRound
from prismquant.algorithms.awq import AWQ
from prismquant.algorithms.block_problem import BlockLayer, block_loss
from prismquant.algorithms.gptq import GPTQ
from prismquant.algorithms.latent_weight import Latent, Scaled
from prismquant.algorithms.layer_scales import Scales
from prismquant.algorithms.output_error import Trials, output_error
from prismquant.algorithms.problem import LayerProblem, scale_format
from prismquant.algorithms.rtn import RTN
from prismquant.algorithms.smooth_edge import Consumer, EdgeProblem
from prismquant.algorithms.zeroquant import ZeroQuant
from prismquant.errors import FormatError, RecipeError
from prismquant.formats.packed import layouts_for, pack, unpack
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import PRESETS, NumberSpec, spec
from prismquant.numerics.affine import dynamic_scale_zero_point, quantize, simulate
from prismquant.numerics.kinds import Granularity
from prismquant.numerics.ranges import RangeRule, weight_scales
from prismquant.numerics.scales import ScaleFormat, global_scale
from prismquant.runtime.linear import ActivationQuantizer
from prismquant.statistics.channel_sizes import ChannelSizes
from prismquant.statistics.hessian import Hessian

WEIGHTS = [name for name, number in PRESETS.items() if not number.dynamic]
FEATURES = 128
NEW = [
    "nvfp4",
    "mxfp4",
    "mxfp4-ceil",
    "mxfp6",
    "mxfp8",
    "mxfp8-e5m2",
    "mxint8",
    "fp4-b8",
    "int4-b8",
]


def inputs(features: int = FEATURES, tokens: int = 400, seed: int = 0) -> Tensor:
    """Of low rank plus noise, with features of different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features // 4, features, generator=generator) / math.sqrt(features // 4)
    x = torch.randn(tokens, features // 4, generator=generator) @ mix
    x = x + 0.3 * torch.randn(tokens, features, generator=generator)
    return x * torch.exp(0.5 * torch.randn(features, generator=generator))


def problem(
    name: str, rule: str = "mse", rows: tuple[int, ...] = (24, 7), calibrated: bool = True
) -> LayerProblem:
    """Two layers of one input; the second one's weights are larger."""
    generator = torch.Generator().manual_seed(1)
    weights = tuple(
        torch.randn(r, FEATURES, generator=generator) * (0.02 + 0.3 * i) for i, r in enumerate(rows)
    )
    record = Hessian(FEATURES)
    record.update(inputs())
    return LayerProblem(
        tuple(f"layer{i}" for i in range(len(rows))),
        weights,
        spec(name),
        RangeRule(rule, norm=2.0),  # type: ignore[arg-type]
        torch.bfloat16,
        record.result() if calibrated else None,
    )


def loss_of(task: LayerProblem, q: QuantizedTensor, index: int) -> float:
    error = task.weights[index].double() - q.dequantize().double()
    assert task.hessian is not None
    return float(((error @ task.hessian.double()) * error).sum())


# --- solvers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_gptq_is_never_worse_than_rounding_to_nearest(name: str) -> None:
    """With the same scales always; and what it says is what is stored."""
    task = problem(name)
    result = GPTQ().solve(task)
    for i, q in enumerate(result.weights):
        assert result.losses[i] <= result.baseline_losses[i] * (1 + 1e-5)
        assert result.losses[i] == pytest.approx(loss_of(task, q, i), rel=1e-3)
        for layout in layouts_for(q.spec):
            back = unpack(pack(q, layout), q.spec, layout)
            assert torch.equal(back.dequantize(), q.dequantize())
    nearest = RTN().solve(task)
    assert sum(result.losses) <= sum(nearest.losses) * (1 + 1e-5)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp6", "fp4-b8", "fp4-g16"])
def test_compensation_pays_in_small_formats(name: str) -> None:
    task = problem(name)
    assert sum(GPTQ().solve(task).losses) < 0.8 * sum(RTN().solve(task).losses)


@pytest.mark.parametrize("solver", [RTN(), RTN("diagonal"), RTN("group"), GPTQ()])
@pytest.mark.parametrize("rule", ["minmax", "mse", "sweep", "four_over_six", "percentile"])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_every_rule_works_with_scales_of_eight_bits(
    solver: RTN | GPTQ, rule: str, name: str
) -> None:
    task = problem(name, rule)
    result = solver.solve(task)
    for weight, q in zip(task.weights, result.weights, strict=True):
        assert q.scale.dtype == task.scale_format.memory_dtype
        assert float((q.dequantize() - weight).abs().mean() / weight.abs().mean()) < 0.25


@pytest.mark.parametrize("weighting", ["none", "group"])
def test_a_search_lowers_the_loss_of_nvfp4(weighting: str) -> None:
    def total(rule: str) -> float:
        return sum(RTN(weighting).solve(problem("nvfp4", rule)).losses)  # type: ignore[arg-type]

    assert total("sweep") <= total("mse") * 1.02
    assert total("mse") < total("minmax")
    assert total("four_over_six") < total("minmax")


@pytest.mark.parametrize("solver", [RTN(), GPTQ()])
def test_layers_that_are_fused_share_one_global_scale(solver: RTN | GPTQ) -> None:
    task = problem("nvfp4")
    first, second = solver.solve(task).weights
    largest = max(float(weight.abs().max()) for weight in task.weights)
    want = global_scale(torch.tensor(largest), task.spec.grid)
    assert first.global_scale is not None
    assert second.global_scale is not None
    assert first.global_scale.tolist() == second.global_scale.tolist() == want.tolist()
    given = LayerProblem(("a",), task.weights[:1], task.spec, task.range_rule, task.scale_format)
    assert given.scale_format.global_scale is not None
    assert given.scale_format.global_scale.tolist() == want.tolist()


def test_four_over_six_leaves_headroom_in_the_global_scale() -> None:
    plain, normal = problem("nvfp4").scale_format, problem("nvfp4", "four_over_six").scale_format
    assert plain.global_scale is not None
    assert normal.global_scale is not None
    assert float(normal.global_scale) in (
        float(plain.global_scale),
        float(plain.global_scale) / 2,
    )
    q = RTN().solve(problem("nvfp4", "four_over_six")).weights[1]
    assert float(pack(q, "nvfp4-pack-quantized")["weight_scale"].float().max()) <= 400


def test_misfits_are_refused_by_name() -> None:
    form = ScaleFormat(torch.bfloat16, "e8m0")
    with pytest.raises(FormatError, match="e8m0 are not those of nvfp4"):
        scale_format(spec("nvfp4"), RangeRule(), form, [])
    with pytest.raises(RecipeError, match="E2M1"):
        RTN().solve(problem("mxfp8", "four_over_six"))
    with pytest.raises(FormatError, match="does not divide"):
        LayerProblem(("a",), (torch.ones(4, 40),), spec("mxfp4"), RangeRule(), torch.bfloat16)


def test_a_layer_of_zeros_is_exact_in_every_format() -> None:
    for name in WEIGHTS:
        task = LayerProblem(
            ("z",), (torch.zeros(3, FEATURES),), spec(name), RangeRule("mse"), torch.float16
        )
        q = RTN().solve(task).weights[0]
        assert not q.dequantize().any()
        assert bool(q.scale.float().isfinite().all())


# --- tuners -----------------------------------------------------------------------------------


def layer_of(name: str, seed: int, shuffle: float) -> BlockLayer:
    """A layer whose start is rounded to nearest, but for a fraction of arbitrary codes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 64, generator=generator)
    form, rule = spec(name), RangeRule("mse")
    stored = scale_format(form, rule, torch.bfloat16, [weight.abs().amax()])
    unit = (form.granularity, form.group_size)
    scales = Scales(
        *weight_scales(weight, form.grid, form.symmetric, *unit, rule, stored), stored.global_scale
    )

    def codes_of(x: Tensor) -> Tensor:
        return quantize(x, scales.scale, scales.zero_point, form.grid, *unit)

    other = codes_of(2 * torch.randn(12, 64, generator=generator))
    pick = torch.rand(12, 64, generator=generator) < shuffle
    start = scales.quantized(torch.where(pick, other, codes_of(weight)), form)
    return BlockLayer("mlp.up", weight, rule, torch.bfloat16, start)


@settings(max_examples=40)
@given(
    name=st.sampled_from([*NEW, "int4-b8-asym"]),
    shuffle=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_a_latent_weight_begins_at_exactly_the_start(name: str, shuffle: float, seed: int) -> None:
    layer = layer_of(name, seed, shuffle)
    for found in (Latent(layer).quantized(), Scaled(layer, layer.start).quantized()):
        assert torch.equal(found.dequantize(), layer.start.dequantize())
        assert torch.equal(found.scale.float(), layer.start.scale.float())
        assert found.scale.dtype == layer.start.scale.dtype
        assert found.global_scale is layer.start.global_scale


@pytest.mark.parametrize("tuner", [AutoRound(iterations=20, settle=10), ZeroQuant(iterations=20)])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxint8", "fp4-b8"])
def test_tuners_are_never_worse_than_the_start(name: str, tuner: AutoRound | ZeroQuant) -> None:
    block = tiny_blocks.block(name, calls=4)
    result = tuner.tune(block)
    assert result.loss <= result.start_loss
    assert block_loss(block, result.weights) == pytest.approx(result.loss)
    for q in result.weights:
        for layout in layouts_for(q.spec):
            back = unpack(pack(q, layout), q.spec, layout)
            assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("name", ["nvfp4", "fp4-b8"])
def test_tuning_gains_in_small_formats(name: str) -> None:
    block = tiny_blocks.block(name, kind="minmax")
    result = AutoRound(iterations=60, settle=30).tune(block)
    assert result.loss < 0.97 * result.start_loss


@pytest.mark.parametrize("name", ["fp4-b8", "int3-b8", "int4-b8-asym"])
def test_gradients_of_blocks_are_those_of_their_scales(name: str) -> None:
    """Of the second phase, which is exact: against a difference quotient of the definition."""
    layer = layer_of(name, 5, 0.3)
    scaled = Scaled(layer, layer.start)
    slope = torch.randn(12, 64, generator=torch.Generator().manual_seed(2))
    scaled.backward(slope, layer.start)
    assert scaled.factor.grad is not None
    assert tuple(scaled.factor.grad.shape) == (2, 8)
    products = slope * layer.start.dequantize()
    for i in range(2):
        for j in range(8):
            want = products[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].sum()
            assert float(scaled.factor.grad[i, j]) == pytest.approx(float(want), abs=1e-4)


# --- transforms -------------------------------------------------------------------------------

SIZE = 64


def edge(
    weights: str | None, activations: str | None, rows: tuple[int, ...] = (9, 20)
) -> EdgeProblem:
    generator = torch.Generator().manual_seed(3)
    record = ChannelSizes(SIZE)
    x = inputs(SIZE, 80, seed=4)
    x[:, 1] *= 20
    record.update(x, torch.ones(80), torch.zeros(80, dtype=torch.bool))
    readers = tuple(
        Consumer(
            f"reader{i}",
            torch.randn(count, SIZE, generator=generator) * (1 + 3 * i),
            None if weights is None else spec(weights),
        )
        for i, count in enumerate(rows)
    )
    return EdgeProblem(
        "norm",
        SIZE,
        torch.arange(SIZE),
        readers,
        None if activations is None else spec(activations),
        RangeRule(),
        torch.bfloat16,
        record,
    )


def rounded(x: Tensor, form: NumberSpec, divisor: Tensor | None) -> Tensor:
    unit = (form.granularity, form.group_size)
    stored = ScaleFormat(torch.bfloat16, form.scale, divisor)
    scale, zero = dynamic_scale_zero_point(x, form.grid, form.symmetric, *unit, stored)
    return simulate(x, scale, zero, form.grid, *unit)


def brute_force(task: EdgeProblem, factors: Tensor) -> float:
    """The definition of the measure, products in float64."""
    x = task.record.inputs
    seen, form = x / factors, task.activations
    if form is not None:
        largest = torch.maximum(-task.record.low / factors, task.record.high / factors).amax()
        divisor = global_scale(largest, form.grid) if form.scale == "e4m3" else None
        seen = rounded(seen, form, divisor)
    scaled = [reader.weight * factors for reader in task.consumers]
    errors = []
    for reader, weight in zip(task.consumers, scaled, strict=True):
        shown, own = weight, reader.spec
        if own is not None:
            top = torch.stack([w.abs().amax() for w in scaled]).amax()
            divisor = global_scale(top, own.grid) if own.scale == "e4m3" else None
            shown = rounded(weight, own, divisor)
        exact = x.double() @ reader.weight.double().T
        error = exact - seen.double() @ shown.double().T
        errors.append(float(error.square().sum() / exact.square().sum()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("nvfp4", "nvfp4-dyn"),
        ("nvfp4", None),
        ("mxfp4", "mxfp8-dyn"),
        ("fp4-b16", "fp8-g32-dyn"),
        (None, "mxint8-dyn"),
    ],
)
def test_edges_are_judged_by_what_is_served(weights: str | None, activations: str | None) -> None:
    task = edge(weights, activations)
    factors = torch.exp(torch.randn(SIZE, generator=torch.Generator().manual_seed(5)))
    for scale in (None, factors):
        want = brute_force(task, torch.ones(SIZE) if scale is None else scale)
        assert output_error(task, scale) == pytest.approx(want, rel=1e-3)


def test_trials_of_blocks_look_at_whole_blocks() -> None:
    task = edge("fp4-b16", None, rows=(70,))
    assert Trials(task, 16).error(None) == pytest.approx(output_error(task, None), rel=0.3)
    assert Trials(task, 70).error(None) == pytest.approx(output_error(task, None), rel=1e-9)
    odd = Trials(task, 40)
    assert not odd.complete
    assert odd.error(None) == pytest.approx(output_error(task, None), rel=0.3)


@pytest.mark.parametrize(("weights", "activations"), [("nvfp4", "nvfp4-dyn"), ("mxfp4", None)])
def test_awq_helps_or_stays_away(weights: str, activations: str | None) -> None:
    task = edge(weights, activations)
    result = AWQ().fit(task)
    if result.scale is not None:
        assert output_error(task, result.scale) < output_error(task, None)


# --- activations ------------------------------------------------------------------------------


def test_dynamic_groups_have_a_scale_for_each_group_of_each_token() -> None:
    x = inputs(128, 6).view(2, 3, 128)
    for name in ("mxfp4-dyn", "mxfp8-dyn", "mxint8-dyn", "fp8-g128-dyn"):
        number = spec(name)
        size = number.group_size or 0
        seen = ActivationQuantizer(number)(x)
        for group, out in zip(x.split(size, -1), seen.split(size, -1), strict=True):
            for i in range(2):
                for j in range(3):
                    form = ScaleFormat(x.dtype, number.scale)
                    scale = form.of_magnitude(group[i, j].abs().amax(), number.grid)
                    want = simulate(
                        group[i, j], scale.view(1), None, number.grid, Granularity.TENSOR
                    )
                    assert torch.equal(out[i, j], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_inputs_have_dynamic_blocks_under_a_static_global_scale(dtype: torch.dtype) -> None:
    x = inputs(64, 6).to(dtype)
    divisor = global_scale(2 * x.abs().amax(), spec("nvfp4").grid)
    quantizer = ActivationQuantizer(spec("nvfp4-dyn"), divisor)
    seen = quantizer(x)
    assert seen.dtype == dtype
    unit = (Granularity.GROUP, 16)
    form = ScaleFormat(torch.float32, "e4m3", divisor)
    amax = x.float().unflatten(-1, (-1, 16)).abs().amax(-1)
    grid = spec("nvfp4").grid
    assert torch.equal(seen, simulate(x, form.of_magnitude(amax, grid), None, grid, *unit))
    # Tokens do not see one another.
    assert torch.equal(quantizer(x[:2]), seen[:2])
    # A module that moves to another dtype takes its buffers along: powers of two survive.
    assert torch.equal(quantizer.to(torch.bfloat16)(x), seen)


def test_values_beyond_the_calibrated_range_saturate() -> None:
    quantizer = ActivationQuantizer(spec("nvfp4-dyn"), torch.tensor([2688.0]))
    seen = quantizer(torch.full((1, 16), 50.0))
    assert seen.unique().tolist() == [1.0]


def test_a_quantizer_needs_the_static_scale_of_its_format_and_no_other() -> None:
    for name in ("nvfp4-dyn", "int8-tensor"):
        with pytest.raises(FormatError, match="no static scale"):
            ActivationQuantizer(spec(name))
    for name in ("mxfp4-dyn", "int8-token"):
        with pytest.raises(FormatError, match="a static scale"):
            ActivationQuantizer(spec(name), torch.ones(1))


def test_gradients_pass_through_blocks() -> None:
    x = inputs(64, 4).requires_grad_()
    ActivationQuantizer(spec("mxfp4-dyn"))(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
