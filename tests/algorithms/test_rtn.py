"""Rounding to nearest with every range rule and every kind of scale."""

from __future__ import annotations

import pytest
import torch

from prismquant.algorithms import rtn
from prismquant.algorithms.problem import LayerProblem
from prismquant.algorithms.rtn import RTN
from prismquant.errors import NumericsError, RecipeError
from prismquant.formats.spec import spec
from prismquant.numerics import ranges
from prismquant.numerics.affine import dequantize, quantize, quantize_with_values, scale_zero_point
from prismquant.numerics.grouping import to_groups
from prismquant.numerics.ranges import RangeRule, coupled_weight_scales, weight_scales


def problem(name="int4-g8", kind="minmax", hessian=None, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    weights = (torch.randn(6, 16), torch.randn(3, 16) * 3)
    return LayerProblem(
        ("gate", "up"), weights, spec(name), RangeRule(kind, norm=2.0), dtype, hessian
    )


@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize(
    "name", ["int8-tensor", "int8-channel", "int4-g8", "int2-g4-asym", "int3-channel-narrow"]
)
def test_codes_are_the_nearest_ones_under_the_rules_scales(name, kind):
    task = problem(name, kind)
    result = RTN().solve(task)
    form = task.spec
    for weight, quantized in zip(task.weights, result.weights, strict=True):
        scale, zero = weight_scales(
            weight,
            form.grid,
            form.symmetric,
            form.granularity,
            form.group_size,
            task.range_rule,
            torch.bfloat16,
        )
        codes = quantize(weight, scale, zero, form.grid, form.granularity, form.group_size)
        assert torch.equal(quantized.scale, scale)
        assert quantized.scale.dtype == torch.bfloat16
        assert torch.equal(quantized.codes, codes)
        assert (zero is None) == (quantized.zero_point is None)
        if zero is not None:
            assert torch.equal(quantized.zero_point, zero)


@pytest.mark.parametrize("calibrated", [False, True])
def test_losses_are_measured_on_what_is_stored(calibrated):
    torch.manual_seed(1)
    x = torch.randn(64, 16)
    hessian = x.T @ x / 64 if calibrated else None
    task = problem(hessian=hessian)
    result = RTN().solve(task)
    metric = torch.eye(16).double() if hessian is None else hessian.double()
    for weight, quantized, loss in zip(task.weights, result.weights, result.losses, strict=True):
        error = weight.double() - quantized.dequantize().double()
        assert loss == pytest.approx(float(((error @ metric) * error).sum()), rel=1e-5)
    assert result.baseline_losses == result.losses


def test_weighing_scales_with_the_diagonal_lowers_the_loss():
    torch.manual_seed(2)
    x = torch.randn(512, 16) * torch.logspace(-1, 1, 16)
    task = problem("int3-channel", "mse", x.T @ x / 512)
    plain, weighted = RTN().solve(task), RTN("diagonal").solve(task)
    assert sum(weighted.losses) < sum(plain.losses)
    assert weighted.diagnostics.scale_weighting == "diagonal"


@pytest.mark.parametrize("weighting", ["diagonal", "group"])
def test_weighing_without_calibration_is_refused_by_name(weighting):
    with pytest.raises(NumericsError) as caught:
        RTN(weighting).solve(problem())
    assert caught.value.where == "gate, up"


def test_a_rule_for_activations_is_refused():
    with pytest.raises(RecipeError):
        RTN().solve(problem(kind="ema"))


def test_a_layer_of_zeros_is_exact():
    task = LayerProblem(
        ("z",), (torch.zeros(3, 16),), spec("int4-g8"), RangeRule("mse"), torch.float16
    )
    result = RTN().solve(task)
    assert result.losses == (0.0,)
    assert not result.weights[0].codes.any()


# --- weighing by blocks of the Hessian --------------------------------------------------------


def correlated(features: int = 16, seed: int = 3) -> torch.Tensor:
    """The Hessian of inputs of low rank plus noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 4, generator=generator) @ torch.randn(4, features, generator=generator)
    x += 0.2 * torch.randn(400, features, generator=generator)
    return x.T @ x / len(x)


def block_losses(weight, scale, zero, form, hessian):
    """``e H e^T`` of every unit that has a scale, in float64."""
    unit = (form.granularity, form.group_size)
    codes = quantize(weight, scale, zero, form.grid, *unit)
    error = weight.double() - dequantize(codes, scale, zero, *unit, grid=form.grid).double()
    if form.granularity == "tensor":
        return ((error @ hessian.double()) * error).sum().view(1)
    groups = to_groups(error, *unit)
    size = groups.shape[-1]
    losses = [
        ((part @ hessian[i * size :, i * size :][:size, :size].double()) * part).sum(-1)
        for i, part in enumerate(groups.unbind(1))
    ]
    return torch.stack(losses, dim=1)


FORMS = ["int4-g8", "int3-g4-asym", "int3-channel", "int4-channel-narrow", "int4-tensor", "fp4-g8"]


@pytest.mark.parametrize("name", FORMS)
def test_no_factor_of_the_search_gives_a_group_a_smaller_error_than_the_one_chosen(name):
    """All factors are tried here, one in four and the best one's neighbours there."""
    form, rule, hessian = spec(name), RangeRule("mse", steps=40), correlated()
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(4))
    unit = (form.granularity, form.group_size)
    chosen = coupled_weight_scales(
        weight, form.grid, form.symmetric, *unit, rule, torch.bfloat16, hessian
    )
    found = block_losses(weight, *chosen, form, hessian)
    low, high = to_groups(weight, *unit).amin(-1), to_groups(weight, *unit).amax(-1)
    trials = []
    for factor in [1.0, *torch.linspace(0.2, 1.0, 33).tolist()]:
        ends = (low * factor, high * factor)
        scales = scale_zero_point(*ends, form.grid, form.symmetric, torch.bfloat16)
        trials.append(block_losses(weight, *scales, form, hessian))
    assert bool((found <= trials[0] * (1 + 1e-5)).all())
    best = torch.stack(trials).amin(0)
    assert float(found.sum()) < 1.1 * float(best.sum())


@pytest.mark.parametrize("name", ["int3-g8", "int3-channel", "int4-channel-asym"])
def test_weighing_by_groups_lowers_the_loss_where_inputs_are_correlated(name):
    task = problem(name, "mse", correlated())
    plain, diagonal, group = (
        sum(RTN(weighting).solve(task).losses) for weighting in ("none", "diagonal", "group")
    )
    assert group < min(plain, diagonal)


def test_with_a_diagonal_hessian_both_ways_of_weighing_are_one():
    hessian = torch.diag(torch.logspace(-2, 2, 16))
    task = problem("int3-g8", "mse", hessian)
    diagonal, group = RTN("diagonal").solve(task), RTN("group").solve(task)
    assert group.losses == pytest.approx(diagonal.losses, rel=1e-5)


@pytest.mark.parametrize("kind", ["minmax", "percentile"])
def test_other_rules_do_not_look_at_the_hessian(kind):
    task = problem("int4-g8", kind, correlated())
    plain, group = RTN().solve(task), RTN("group").solve(task)
    assert torch.equal(plain.weights[0].codes, group.weights[0].codes)
    assert group.diagnostics.scale_weighting == "group"


def test_columns_that_calibration_never_excites_are_rounded_with_care():
    """They have no cost of their own, yet their scale should hold them."""
    hessian = correlated()
    hessian[:8] = 0.0
    hessian[:, :8] = 0.0
    task = problem("int4-g8", "mse", hessian)
    result = RTN("group").solve(task)
    error = (task.weights[0] - result.weights[0].dequantize())[:, :8]
    assert float(error.square().mean()) < 0.02
    nothing = RTN("group").solve(problem("int4-g8", "mse", torch.zeros(16, 16)))
    assert nothing.losses == (0.0, 0.0)


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_the_size_of_the_hessian_does_not_matter(size):
    task = problem("int3-g8", "mse", correlated())
    scaled = problem("int3-g8", "mse", correlated() * size)
    plain, group = RTN("group").solve(task), RTN("group").solve(scaled)
    assert torch.equal(plain.weights[0].codes, group.weights[0].codes)


def test_how_rows_are_cut_into_pieces_does_not_matter(monkeypatch):
    for name in ("int3-g8", "int4-tensor", "int3-channel-asym"):
        task = problem(name, "mse", correlated())
        whole = RTN("group").solve(task)
        with monkeypatch.context() as patch:
            patch.setattr(ranges, "_COUPLED_PIECE", 32)
            pieces = RTN("group").solve(task)
        assert torch.equal(whole.weights[0].codes, pieces.weights[0].codes)
        assert torch.equal(whole.weights[0].scale, pieces.weights[0].scale)


def test_a_hessian_that_does_not_fit_is_refused():
    form = spec("int4-g8")
    weight = torch.randn(4, 16)
    rule = RangeRule("mse")
    for bad in (torch.eye(8), torch.full((16, 16), float("nan"))):
        with pytest.raises(NumericsError, match="Hessian"):
            coupled_weight_scales(
                weight, form.grid, True, form.granularity, 8, rule, torch.bfloat16, bad
            )


@pytest.mark.parametrize("kind", ["minmax", "mse"])
@pytest.mark.parametrize(
    "name", ["int4-g8", "int8-tensor", "int2-g4-asym", "fp8-b8", "fp8-channel", "nvfp4", "mxfp4"]
)
def test_blocks_of_rows_change_no_bit(monkeypatch, name, kind):
    """Also where the last block is smaller, or a square is cut off by the last row."""
    torch.manual_seed(2)
    weight, form = torch.randn(37, 64).bfloat16(), spec(name)
    stored = LayerProblem(
        ("w",), (weight.float(),), form, RangeRule(kind), torch.bfloat16
    ).scale_format
    found = []
    for block in (1, 64 * 5, 64 * 16, 1 << 20):
        monkeypatch.setattr(rtn, "_CPU_BLOCK", block)
        found.append(RTN().solve_weight(weight, form, RangeRule(kind), stored))
    for other in found[1:]:
        assert torch.equal(other.weight.codes, found[0].weight.codes)
        assert torch.equal(other.weight.scale.float(), found[0].weight.scale.float())
        assert other.loss == found[0].loss


@pytest.mark.parametrize("name", ["int4-g8", "int2-g4-asym", "int8-tensor", "fp8-b8", "mxfp4"])
def test_codes_with_values_are_codes_and_what_they_stand_for(name):
    """Bit for bit, negative zeros included."""
    torch.manual_seed(3)
    weight, form = torch.randn(19, 32), spec(name)
    weight[0, :4] = torch.tensor([0.0, -0.0, -1e-9, 1e-9])
    unit = (form.granularity, form.group_size)
    (quantized,) = (
        RTN()
        .solve(LayerProblem(("w",), (weight,), form, RangeRule("minmax"), torch.bfloat16))
        .weights
    )
    scales = (quantized.scale, quantized.zero_point)
    codes, values = quantize_with_values(weight, *scales, form.grid, *unit)
    assert torch.equal(codes, quantize(weight, *scales, form.grid, *unit))
    want = dequantize(codes, *scales, *unit, torch.float32, form.grid)
    assert torch.equal(values.view(torch.int32), want.view(torch.int32))
