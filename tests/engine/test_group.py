"""What is gathered for layers that share an input: ranges, moments, columns, and for whom."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from prismquant.algorithms.problem import LayerResult
from prismquant.engine.calls import StepCall
from prismquant.engine.group import GroupSettings, LayerGroup
from prismquant.errors import NumericsError
from prismquant.formats.quantized_layer import scale_and_zero_point
from prismquant.formats.spec import spec
from prismquant.models.bind import bind
from prismquant.numerics.affine import simulate
from prismquant.numerics.hadamard import block_hadamard
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import OutlierRoom, PlanRow
from prismquant.recipe.layer_config import Options
from prismquant.recipe.schema import load_recipe
from prismquant.runtime.input_rotation import rotate_inputs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prismquant.diagnostics.step_record import LayerRecord
    from prismquant.formats.quantized_layer import QuantizedLayer

UP = "model.language_model.layers.0.mlp.up_proj"
IN = 128
bound = functools.cache(bind)


@pytest.fixture(scope="module")
def row(tiny: Callable[..., Path]) -> Callable[..., PlanRow]:
    """``row(rule)``: the row of an up projection under one rule."""

    def get(columns: int = 0, **rule: Any) -> PlanRow:
        recipe = load_recipe({"rules": [{"weights": "int4-g32", "weight_range": "minmax"} | rule]})
        if "activations" in rule or "outputs" in rule:
            plain = {"match": {"role": "patch_embed"}, "activations": "none", "outputs": "none"}
            recipe = recipe.with_rules(plain)
        plan = make_plan(recipe, bound(tiny("qwen2_vl")))
        found = next(row for row in plan.rows if row.site.name == UP)
        room = OutlierRoom(columns, "split", Options({"columns": columns})) if columns else None
        return replace(found, outliers=room)

    return get


def module(seed: int = 0, out: int = 256) -> nn.Linear:
    layer = nn.Linear(IN, out, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(out, IN, generator=torch.Generator().manual_seed(seed)))
    return layer


def group_of(row: PlanRow, *layers: nn.Module, **settings: Any) -> LayerGroup:
    how = {
        "device": torch.device("cpu"),
        "stored_dtype": torch.float32,
        "quantized_inputs": True,
        "vision_weight": 1.0,
    }
    names = [replace(row.site, name=f"{UP}.{index}") for index in range(len(layers))]
    rows = [replace(row, site=name) for name in names] if len(layers) > 1 else [row]
    pairs = zip(rows, layers, strict=True)
    sites = {row.site.name: layer.get_parameter("weight") for row, layer in pairs}
    return LayerGroup(
        rows, layers, GroupSettings(**(how | settings)), lambda site: sites[site.name]
    )


def call(weights: Tensor | None = None, vision: Tensor | None = None) -> StepCall:
    return StepCall((), {}, weights, vision, lambda _: None)


def solve(group: LayerGroup) -> tuple[LayerResult, list[QuantizedLayer], LayerRecord]:
    """The solver's result, the layers, and the record of the first."""
    result = group.solver.solve(group.problem())
    pairs = group.solved(result)
    return result, [layer for layer, _ in pairs], pairs[0][1]


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(seed))


def hessian_of(group: LayerGroup) -> Tensor:
    """What the solver is given."""
    hessian = group.problem().hessian
    assert hessian is not None
    return hessian.double()


def test_ranges_are_those_of_counted_tokens_together_and_by_modality(
    row: Callable[..., PlanRow],
) -> None:
    group = group_of(row(activations="int8-tensor-asym"), module())
    assert group.wants("ranges")
    x = tokens(6)
    x[0, 0], x[1, 0], x[2, 0], x[3, 0] = 900.0, 7.0, -9.0, 11.0
    weights = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    vision = torch.tensor([True, False, False, True, True, True])
    group.observe(x.reshape(2, 3, IN), call(weights, vision), "ranges")
    group.observe(x[1:2], call(None, torch.tensor([True])), "ranges")
    group.observe(tokens(4), call(weights[:4], torch.zeros(4, dtype=torch.bool)), "moments")
    _, (layer,), record = solve(group)
    assert record.input_range is not None
    assert (record.input_range.low, record.input_range.high) == (-9.0, 11.0)
    assert record.input_range.by_modality["text"] == (-9.0, 7.0)
    assert record.input_range.by_modality["vision"][1] == 11.0
    scale, zero = scale_and_zero_point(layer.input)
    assert scale is not None
    assert zero is not None
    assert float(scale) == pytest.approx(20 / 255)
    assert int(zero) == round(-128 + 9 / (20 / 255))


def test_a_batch_of_padding_alone_leaves_no_trace(row: Callable[..., PlanRow]) -> None:
    layer = module()
    group = group_of(row(activations="int8-tensor", outputs="int8-tensor"), layer)
    for what in ("columns", "ranges", "moments"):
        group.observe(tokens(3) * 100, call(torch.zeros(3)), what)  # type: ignore[arg-type]
        if what == "ranges":
            group.observe_outputs(tokens(3) * 100, call(torch.zeros(3)))
            group.observe_outputs(tokens(40), call())
        group.observe(tokens(40), call(), what)  # type: ignore[arg-type]
    _, (solved,), record = solve(group)
    assert record.input_range is not None
    assert record.input_range.high == pytest.approx(float(tokens(40).max()))
    largest = float(layer(tokens(40)).abs().max())
    assert float(solved.output.scale) == pytest.approx(largest / 127.5)  # type: ignore[union-attr]


@pytest.mark.parametrize("quantized_inputs", [True, False])
def test_moments_are_of_the_input_as_it_is_served(
    row: Callable[..., PlanRow], quantized_inputs: bool
) -> None:
    group = group_of(row(activations="int4-tensor"), module(), quantized_inputs=quantized_inputs)
    x = tokens(300)
    group.observe(x, call(), "ranges")
    group.observe(x, call(), "moments")
    seen = x
    if quantized_inputs:
        scale = (x.abs().max() / 7.5).reshape(1)
        four = spec("int4-tensor")
        seen = simulate(x, scale, None, four.grid, four.granularity)
    truth = seen.double().T @ seen.double() / len(x)
    torch.testing.assert_close(hessian_of(group), truth, rtol=1e-4, atol=1e-4)


def test_vision_tokens_weigh_what_they_are_told_to(row: Callable[..., PlanRow]) -> None:
    group = group_of(row(), module(), vision_weight=0.25)
    x, vision = tokens(200), torch.arange(200) % 3 == 0
    padding = (torch.arange(200) % 7 != 0).float()
    group.observe(x, call(padding, vision), "moments")
    weights = (padding * torch.where(vision, 0.25, 1.0)).double()
    truth = (x.double().T * weights) @ x.double() / weights.sum()
    torch.testing.assert_close(hessian_of(group), truth, rtol=1e-4, atol=1e-4)


def test_the_input_is_rotated_before_anything_is_seen_of_it(row: Callable[..., PlanRow]) -> None:
    block = nn.Sequential(module())
    rotate_inputs(block, "0", 64, None)
    group = group_of(row(activations="int8-tensor"), block[0])
    x = tokens(200)
    x[:, 3] += 5
    turned = block_hadamard(x, 64)
    for what in ("ranges", "moments"):
        group.observe(x, call(), what)  # type: ignore[arg-type]
    truth = turned.double().T @ turned.double() / len(x)
    torch.testing.assert_close(hessian_of(group), truth, rtol=2e-2, atol=1e-2)
    assert group._ranges.diagnostics().high == pytest.approx(float(turned.max()))


def test_split_columns_leave_range_moments_and_codes(row: Callable[..., PlanRow]) -> None:
    """And what is kept of the weight is the weight itself, in the stored dtype."""
    layer = module()
    group = group_of(row(2, activations="int8-tensor"), layer, stored_dtype=torch.bfloat16)
    x = tokens(300)
    x[:, [5, 77]] *= 50
    assert group.wants("columns")
    group.observe(x, call(), "columns")
    group.fit_columns()
    assert group.columns is not None
    assert group.columns.tolist() == [5, 77]
    group.observe(x, call(), "ranges")
    group.observe(x, call(), "moments")
    problem = group.problem()
    assert problem.hessian is not None
    hessian = problem.hessian.clone()
    result = group.solver.solve(problem)
    ((solved, record),) = group.solved(result)
    rest = x.clone()
    rest[:, [5, 77]] = 0
    assert record.input_range is not None
    assert record.split_columns == (5, 77)
    assert record.input_range.high == pytest.approx(float(rest.max()))
    assert result.weights[0].dequantize()[:, [5, 77]].abs().max() == 0
    values = solved.values(torch.float32)
    kept = layer.weight[:, [5, 77]].to(torch.bfloat16).float()
    assert torch.equal(values[:, [5, 77]], kept)
    assert (values - layer.weight).abs().max() < 1.0
    assert hessian[5].abs().max() == hessian[:, 77].abs().max() == 0
    others = [c for c in range(IN) if c not in (5, 77)]
    truth = (rest.double().T @ rest.double() / len(x))[others][:, others]
    torch.testing.assert_close(hessian.double()[others][:, others], truth, rtol=2e-2, atol=2e-2)


def test_corrections_aim_at_what_the_float_model_has(row: Callable[..., PlanRow]) -> None:
    layer, other = module(), module(1, 64)
    rule = {"correction": {"strength": 1.0, "damping": 1e-7}, "weights": "int8-channel"}
    group = group_of(row(**rule, solver="rtn"), layer, other)
    group.rows = [
        group.rows[0],
        replace(group.rows[1], site=replace(group.rows[1].site, out_features=64)),
    ]
    assert group.wants("moments")
    seen, turn = tokens(400), torch.linalg.qr(tokens(IN, 9))[0]
    wanted = seen + 0.2 * seen @ turn
    for part in range(4):
        rows = slice(100 * part, 100 * part + 100)
        group.observe(seen[rows], call(), "moments", wanted[rows])
    _, layers, record = solve(group)
    assert record.correction is not None
    assert record.correction.strength == 1.0
    for linear, solved in zip((layer, other), layers, strict=True):
        # Wanted is a linear map of what is seen, so the correction can be perfect.
        truth = linear.weight @ (torch.eye(IN) + 0.2 * turn.T)
        step = truth.abs().amax(1, keepdim=True) / 127.5
        assert ((solved.values(torch.float32) - truth).abs() <= 0.51 * step + 1e-3).all()


def test_what_is_not_finite_is_told_with_the_layer(row: Callable[..., PlanRow]) -> None:
    broken = module()
    broken.weight[0, 0] = float("nan")
    group = group_of(row(solver="rtn"), broken)
    with pytest.raises(NumericsError, match="1 values that are NaN") as caught:
        solve(group)
    assert caught.value.where == UP
    x = tokens(4)
    x[1, 1] = float("inf")
    for what in ("ranges", "moments"):
        group = group_of(row(activations="int8-tensor"), module())
        if what == "moments":
            group.observe(tokens(4), call(), "ranges")
        with pytest.raises(NumericsError) as caught:
            group.observe(x * (1 if what == "ranges" else float("nan")), call(), what)  # type: ignore[arg-type]
        assert caught.value.where == f"input of {UP}"


def test_a_solver_that_needs_moments_is_not_run_without(row: Callable[..., PlanRow]) -> None:
    with pytest.raises(NumericsError, match="no calibration token reached this layer") as caught:
        solve(group_of(row(), module()))
    assert caught.value.where == UP
    assert solve(group_of(row(solver="rtn"), module()))[1]


def test_moments_are_of_what_the_layers_multiply(row: Callable[..., PlanRow]) -> None:
    """Inputs rounded to the dtype of the layers' products, not as they come."""
    x = tokens(30)
    mixed = group_of(row(solver="gptq"), module(), products=torch.bfloat16)
    mixed.observe(x, call(), "moments")
    hessian, rounded = hessian_of(mixed), x.bfloat16().double()
    wanted = rounded.T @ rounded / len(x)
    torch.testing.assert_close(hessian, wanted, rtol=1e-5, atol=1e-6)
    plain = x.double().T @ x.double() / len(x)
    assert not torch.allclose(hessian, plain, rtol=1e-5, atol=1e-6)
