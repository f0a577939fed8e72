"""Rounding to nearest with every range rule and every kind of scale."""

from __future__ import annotations

import pytest
import torch

from prismquant.algorithms.base import LayerProblem
from prismquant.algorithms.rtn import RTN
from prismquant.errors import NumericsError, RecipeError
from prismquant.formats.spec import spec
from prismquant.numerics.affine import quantize
from prismquant.numerics.ranges import RangeRule, weight_scales


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
    assert weighted.notes["scale_weighting"] == "diagonal"


def test_weighing_without_calibration_is_refused_by_name():
    with pytest.raises(NumericsError) as caught:
        RTN("diagonal").solve(problem())
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
