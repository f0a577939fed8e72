"""The reference gives the codes of the solver, and what its head says of it is true."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prismquant.algorithms.gptq import GPTQ
from prismquant.algorithms.gptq.reference import (
    gptq_points,
    losses,
    smallest_pivot_last,
    upper_factor,
)
from prismquant.algorithms.layer_scales import Scales, scale_lines, scales_by_column
from prismquant.algorithms.problem import LayerProblem
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import spec
from prismquant.numerics.ranges import RangeRule

FORMATS = ["int4-g16", "int3-g16-asym", "int2-channel", "int8-tensor", "fp8-channel", "fp4-g16"]
FORMATS += ["nvfp4", "mxfp4"]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(form: str, *, rows: int = 24, features: int = 64, seed: int = 0) -> LayerProblem:
    """Correlated inputs with features of different size."""
    rank = features // 4
    x = normal(600, rank, seed=seed) @ normal(rank, features, seed=seed + 1) / math.sqrt(rank)
    x = (x + 0.3 * normal(600, features, seed=seed + 2)) * normal(features, seed=seed + 3).exp()
    weights = (normal(rows, features, seed=seed + 4),)
    rule = RangeRule("minmax", norm=2.0)
    return LayerProblem(("one",), weights, spec(form), rule, torch.bfloat16, x.T @ x / len(x))


def expected_points(
    given: LayerProblem, found: QuantizedTensor, *, damping: float, passes: int
) -> Tensor:
    """The reference's points with the scales that the solver has chosen."""
    scales = Scales(found.scale, found.zero_point, found.global_scale)
    steps, zeros = scales_by_column((scales,), [len(found.codes)], given.spec)
    lines = scale_lines(torch.arange(given.in_features), given.spec)
    zeros = torch.zeros_like(steps) if zeros is None else zeros
    assert given.hessian is not None
    return gptq_points(
        given.weights[0], given.hessian, steps[lines].T, zeros[lines].T, given.spec.grid,
        damping=damping, passes=passes,
    )  # fmt: skip


@pytest.mark.parametrize("passes", [0, 1, 3])
@pytest.mark.parametrize("form", FORMATS)
def test_the_solver_gives_the_codes_of_the_reference(form: str, passes: int) -> None:
    """No target of these lies so near a tie that float32 or the order of sums decides."""
    given = problem(form)
    found = GPTQ(refine_passes=passes).solve(given).weights[0]
    expected = expected_points(given, found, damping=0.1, passes=passes)
    assert torch.equal(given.spec.grid.read(found.codes).double(), expected)


def test_rows_that_lose_more_than_rounded_to_nearest_take_the_nearest_points() -> None:
    """With damping that drowns the Hessian there are some, in the solver as in the reference."""
    given = problem("int2-channel", rows=200, features=4)
    result = GPTQ(damping=5.0, refine_passes=0).solve(given)
    assert result.diagnostics.nearest_rows
    expected = expected_points(given, result.weights[0], damping=5.0, passes=0)
    assert torch.equal(given.spec.grid.read(result.weights[0].codes).double(), expected)


def test_the_loss_is_a_sum_of_one_square_for_each_column() -> None:
    hessian = problem("int4-g16").hessian
    assert hessian is not None
    damped = hessian.double() + 0.1 * torch.diag(hessian.double().diagonal())
    order = smallest_pivot_last(damped)
    damped = damped[order][:, order]
    root, errors = upper_factor(damped), normal(5, 64, seed=9).double()
    torch.testing.assert_close(root @ root.T, damped)
    assert torch.equal(root, root.triu())
    squares = (errors @ root).square().sum(1)
    torch.testing.assert_close(squares, losses(errors, damped))
