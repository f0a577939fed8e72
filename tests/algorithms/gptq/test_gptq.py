"""GPTQ against the textbook, against brute force, and against what must not matter."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismquant.algorithms.gptq import GPTQ, cholesky, row_chunks
from prismquant.algorithms.gptq.row_chunks import peak_solve_bytes
from prismquant.algorithms.problem import LOSS_BLOCK, LayerProblem, LayerResult, row_losses
from prismquant.algorithms.rtn import RTN
from prismquant.errors import NumericsError
from prismquant.formats.spec import NumberSpec, spec
from prismquant.kernels import products
from prismquant.numerics.grids import IntGrid
from prismquant.numerics.ranges import RangeRule
from prismquant.statistics.hessian import Hessian

if TYPE_CHECKING:
    from prismquant.formats.quantized_layer import QuantizedTensor

PLAIN = GPTQ(refine_passes=0)
ORDERS = ["original", "activation", "group", "pivot"]
FLOATS = ["fp8-channel", "fp8-g16", "fp8-tensor", "fp8-e5m2-g16", "fp4-g16", "fp4-channel"]


def correlated(tokens: int, features: int, seed: int, noise: float = 0.3) -> Tensor:
    """Inputs of low rank plus noise, with features of different size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank = max(1, features // 4)
    x = normal(tokens, rank) @ normal(rank, features) / math.sqrt(rank)
    return (x + noise * normal(tokens, features)) * torch.exp(0.5 * normal(features))


def moments(x: Tensor) -> Tensor:
    record = Hessian(x.shape[1])
    record.update(x)
    return record.result()


def make(
    name: str = "int4-g16",
    rows: tuple[int, ...] = (12,),
    features: int = 48,
    *,
    kind: str = "minmax",
    tokens: int = 512,
    seed: int = 0,
    hessian: Tensor | None = None,
) -> LayerProblem:
    generator = torch.Generator().manual_seed(1000 + seed)
    return LayerProblem(
        tuple(f"layers.0.{i}" for i in range(len(rows))),
        tuple(torch.randn(r, features, generator=generator) for r in rows),
        spec(name),
        RangeRule(kind, norm=2.0),  # type: ignore[arg-type]
        torch.bfloat16,
        moments(correlated(tokens, features, seed)) if hessian is None else hessian,
    )


def damp(hessian: Tensor, damping: float, basis: str) -> Tensor:
    """The damped Hessian of live columns, float64."""
    diagonal = hessian.double().diagonal()
    live = diagonal > 0
    extra = diagonal if basis == "column" else diagonal[live].mean() * live
    return hessian.double() + torch.diag(damping * extra)


def loss_under(hessian: Tensor, weight: Tensor, quantized: QuantizedTensor) -> float:
    error = weight.double() - quantized.dequantize().double()
    return float(((error @ hessian.double()) * error).sum())


def columns_of(scale: Tensor, form: NumberSpec, shape: torch.Size) -> Tensor:
    """A scale or zero point written out for every weight, float64."""
    spread = scale.double().reshape(1, -1) if form.granularity == "tensor" else scale.double()
    if form.block_structure:
        spread = spread.repeat_interleave(form.block_structure[0], dim=0)[: shape[0]]
    return spread.repeat_interleave(shape[1] // spread.shape[1], dim=1).expand(shape)


def points_of(form: NumberSpec) -> Tensor:
    """Every point of a symmetric format, ascending, float64."""
    if isinstance(form.grid, IntGrid):
        return torch.arange(form.grid.qmin, form.grid.qmax + 1).double()
    codes = torch.arange(2**form.bits).to(torch.int8)
    points = form.grid.read(codes).double()
    return points[points.isfinite()].unique()


def round_to(points: Tensor, x: Tensor) -> Tensor:
    """The nearest point, by looking at all."""
    return points[(x.unsqueeze(-1) - points).abs().argmin(-1)]


def textbook(
    weight: Tensor, quantized: QuantizedTensor, damped: Tensor, order: list[int]
) -> Tensor:
    """Points of GPTQ in its first form: the optimal brain surgeon's update after each column.

    Everything in float64, one column at a time, on the inverse of the Hessian of what remains.
    """
    form = quantized.spec
    step = columns_of(quantized.scale, form, weight.shape)
    zero = torch.zeros(weight.shape, dtype=torch.float64)
    if quantized.zero_point is not None:
        zero = columns_of(quantized.zero_point, form, weight.shape)
    work, found, points = weight.double().clone(), torch.zeros_like(step), points_of(form)
    inverse = torch.linalg.inv(damped)
    for column in order:
        point = round_to(points, work[:, column] / step[:, column] + zero[:, column])
        value = (point - zero[:, column]) * step[:, column]
        found[:, column] = point
        push = (work[:, column] - value) / inverse[column, column]
        work -= torch.outer(push, inverse[column])
        work[:, column] = value
        line = inverse[column].clone()
        inverse = inverse - torch.outer(line, line) / line[column]
        inverse[column], inverse[:, column] = 0.0, 0.0
    return found


def order_of(damped: Tensor, kind: str, size: int | None = None) -> list[int]:
    """The order of the sweep, from its definition; groups are of ``size`` columns."""
    diagonal = damped.diagonal().tolist()
    if kind == "original":
        return list(range(len(damped)))
    if kind == "activation":
        return sorted(range(len(damped)), key=lambda i: -diagonal[i])
    if kind == "group":
        starts = range(0, len(damped), size or len(damped))
        groups = [range(len(damped))[start:][:size] for start in starts]
        groups.sort(key=lambda group: -max(diagonal[i] for i in group))
        return [i for group in groups for i in sorted(group, key=lambda i: -diagonal[i])]
    rest, late = damped.clone(), []
    for _ in range(len(damped)):
        free = rest.diagonal().clone()
        free[late] = math.inf
        pick = int(free.argmin())
        rest = rest - torch.outer(rest[pick], rest[pick]) / rest[pick, pick]
        late.append(pick)
    return late[::-1]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name",
    [
        *("int8-tensor", "int4-channel", "int4-g16", "int3-g16-asym", "int2-g8"),
        *("int5-channel-asym", *FLOATS),
        *("nvfp4", "mxfp4", "mxfp6-ceil", "mxfp8-floor", "mxint8", "fp8-b16", "int4-b8-asym"),
    ],
)
def test_codes_are_those_of_textbook_gptq(name, order):
    problem = make(name, features=64 if name.startswith("mx") else 48)
    weight, hessian = problem.weights[0], problem.hessian
    damped = damp(hessian, 0.1, "column")
    result = GPTQ(order=order, refine_passes=0).solve(problem).weights[0]
    expected = textbook(weight, result, damped, order_of(damped, order, problem.spec.group_size))
    assert torch.equal(result.spec.grid.read(result.codes).double(), expected)


def test_codes_are_those_of_textbook_gptq_with_the_usual_damping():
    problem = make("int4-channel", seed=1)
    solver = GPTQ(damping=0.01, damping_basis="mean", order="activation", refine_passes=0)
    result = solver.solve(problem).weights[0]
    damped = damp(problem.hessian, 0.01, "mean")
    expected = textbook(problem.weights[0], result, damped, order_of(damped, "activation"))
    assert torch.equal(result.spec.grid.read(result.codes).double(), expected)


@pytest.mark.parametrize("name", ["int4-g16", "int3-channel-asym", "nvfp4", "fp4-b16", *FLOATS])
@pytest.mark.parametrize("passes", [0, 2])
def test_the_block_size_does_not_change_the_codes(name, passes):
    problem = make(name, rows=(20,), features=144, seed=1)
    first, *others = (
        GPTQ(block_size=size, refine_passes=passes).solve(problem).weights[0].codes
        for size in (1, 16, 50, 128, 1000)
    )
    for codes in others:
        assert torch.equal(codes, first)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(
        ["int2-g4", "int2-channel-asym", "int3-g8", "int4-tensor", "fp4-g4", "fp8-channel"]
    ),
    kind=st.sampled_from(["minmax", "mse"]),
    tokens=st.sampled_from([4, 16, 200]),
    solver=st.sampled_from(
        [GPTQ(), PLAIN, GPTQ(damping=1.0), GPTQ(order="original"), GPTQ(order="group")]
    ),
)
def test_no_row_is_ever_worse_than_rounded_to_nearest(seed, name, kind, tokens, solver):
    problem = make(name, (8, 5), 16, kind=kind, tokens=tokens, seed=seed)
    result = solver.solve(problem)
    form, hessian = problem.spec, problem.hessian.double()
    for i, (weight, quantized) in enumerate(zip(problem.weights, result.weights, strict=True)):
        step = columns_of(quantized.scale, form, weight.shape)
        zero = torch.zeros_like(step)
        if quantized.zero_point is not None:
            zero = columns_of(quantized.zero_point, form, weight.shape)
        near = round_to(points_of(form), weight.double() / step + zero)
        nearest = weight.double() - (near - zero) * step
        error = weight.double() - quantized.dequantize().double()
        bound = ((nearest @ hessian) * nearest).sum(1)
        rows = ((error @ hessian) * error).sum(1)
        assert bool((rows <= bound * (1 + 1e-4) + 1e-6).all())
        assert result.losses[i] == pytest.approx(float(rows.sum()), rel=1e-3, abs=1e-6)
        assert result.baseline_losses[i] == pytest.approx(float(bound.sum()), rel=1e-3)
        assert result.losses[i] <= result.baseline_losses[i]


def test_rows_that_come_out_worse_fall_back_and_are_counted():
    """Damping that drowns the Hessian makes the sweep lose some rows under the true one."""
    results = [
        GPTQ(damping=0.0, order="original", refine_passes=0).solve(
            make("int2-channel", (64,), 4, tokens=64, seed=seed)
        )
        for seed in range(5)
    ]
    assert sum(result.diagnostics.nearest_rows for result in results) > 0


def test_strongly_correlated_inputs_gain_a_lot():
    problem = make("int4-g32", (64,), 128, kind="mse", tokens=2048)
    result = GPTQ().solve(problem)
    assert sum(result.losses) < 0.3 * sum(RTN().solve(problem).losses)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("basis", ["column", "mean"])
def test_the_squares_of_the_sweep_add_up_to_the_damped_loss(order, basis):
    """The identity that the left-looking form rests on."""
    problem = make("int3-g16", (10, 7), seed=2)
    result = GPTQ(order=order, damping_basis=basis, refine_passes=0).solve(problem)
    assert result.diagnostics.nearest_rows == 0
    damped = damp(problem.hessian, result.diagnostics.damping, basis)
    total = sum(
        loss_under(damped, w, q) for w, q in zip(problem.weights, result.weights, strict=True)
    )
    assert result.diagnostics.swept_loss == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_what_refinement_gains_adds_up_to_the_damped_loss(order):
    problem = make("int3-g16", (10, 7), seed=2)
    result = GPTQ(order=order, refine_passes=3).solve(problem)
    assert result.diagnostics.nearest_rows == 0
    damped = damp(problem.hessian, 0.1, "column")
    total = sum(
        loss_under(damped, w, q) for w, q in zip(problem.weights, result.weights, strict=True)
    )
    assert result.diagnostics.refined_loss == pytest.approx(total, rel=1e-5)
    assert result.diagnostics.refined_loss < result.diagnostics.swept_loss


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(["int2-g8", "int3-g8-asym", "int4-g16"]))
def test_each_pass_of_refinement_lowers_the_damped_loss_or_leaves_it(seed, name):
    problem = make(name, (8,), 32, seed=seed, tokens=100)
    notes = [GPTQ(refine_passes=n).solve(problem).diagnostics for n in (1, 2, 3, 8)]
    losses = [notes[0].swept_loss] + [n.refined_loss for n in notes]
    for before, after in itertools.pairwise(losses):
        assert after <= before * (1 + 1e-5)


@pytest.mark.parametrize("name", ["int2-g8", "fp4-g8", "fp8-e5m2-g8"])
def test_refinement_ends_where_no_single_code_can_be_improved(name):
    problem = make(name, (6,), 24, seed=3)
    quantized = GPTQ(refine_passes=50).solve(problem).weights[0]
    weight, damped = problem.weights[0], damp(problem.hessian, 0.1, "column")
    step = columns_of(quantized.scale, problem.spec, weight.shape)
    error = weight.double() - quantized.dequantize().double()
    best = ((error @ damped) * error).sum(1)
    for column in range(24):
        for point in points_of(problem.spec):
            other = error.clone()
            other[:, column] = weight[:, column].double() - point * step[:, column]
            assert bool((((other @ damped) * other).sum(1) >= best * (1 - 1e-5)).all())


def optimum(problem: LayerProblem, quantized: QuantizedTensor) -> float:
    """The least loss with these scales: over every combination of points for every row."""
    weight, form = problem.weights[0].double(), problem.spec
    step, zero = columns_of(quantized.scale, form, weight.shape), 0.0
    if quantized.zero_point is not None:
        zero = columns_of(quantized.zero_point, form, weight.shape)[:, None]
    every = torch.cartesian_prod(*[points_of(form)] * problem.in_features)
    errors = weight[:, None] - (every - zero) * step[:, None]
    losses = ((errors @ problem.hessian.double()) * errors).sum(-1)
    return float(losses.min(dim=1).values.sum())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("passes", [0, 2, 20])
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("int2-channel", 4),
        ("int3-g2", 4),
        ("int3-channel-asym", 4),
        ("int4-channel", 3),
        ("int4-g2", 4),
        ("fp4-channel", 3),
        ("fp4-g2", 4),
        ("fp8-channel", 2),
        ("fp8-e5m2-channel", 2),
    ],
)
def test_brute_force_bounds_the_loss_from_below(name, columns, passes, order):
    """The optimum is a bound, never undercut by sweep or descent; descent ends not far from it."""
    reached, best = 0.0, 0.0
    for seed in range(4):
        problem = make(name, (4,), columns, seed=seed)
        result = GPTQ(order=order, refine_passes=passes).solve(problem)
        least = optimum(problem, result.weights[0])
        nearest = RTN().solve(problem).losses[0]
        assert least * (1 - 1e-5) <= result.losses[0] <= nearest * (1 + 1e-5)
        reached, best = reached + result.losses[0], best + least
    assert passes == 0 or reached <= 1.5 * best


@pytest.mark.parametrize("kind", ["minmax", "mse"])
@pytest.mark.parametrize(
    "name", [f"int{bits}-{unit}" for bits in range(2, 9) for unit in ("g16", "g16-asym")] + FLOATS
)
def test_compensation_pays_in_every_format(name, kind):
    problem = make(name, (32,), kind=kind, seed=5)
    result = GPTQ().solve(problem)
    assert result.losses[0] < 0.5 * result.baseline_losses[0]


@pytest.mark.parametrize("name", ["int4-g16", "fp4-g16"])
def test_the_order_by_groups_keeps_columns_of_a_group_together(name):
    """What it does to the codes is that of a Hessian whose columns are so permuted beforehand."""
    problem = make(name)
    damped = damp(problem.hessian, 0.1, "column")
    order = order_of(damped, "group", 16)
    assert [len({i // 16 for i in order[k : k + 16]}) for k in (0, 16, 32)] == [1, 1, 1]
    permuted = LayerProblem(
        problem.names,
        (problem.weights[0][:, order].contiguous(),),
        problem.spec,
        problem.range_rule,
        problem.scale_dtype,
        problem.hessian[order][:, order].contiguous(),
    )
    result = GPTQ(order="group", refine_passes=0).solve(problem)
    assert result.diagnostics.order == "group"
    beforehand = GPTQ(order="original", refine_passes=0).solve(permuted)
    assert torch.equal(result.weights[0].codes[:, order], beforehand.weights[0].codes)


def test_layers_that_share_an_input_are_solved_as_if_alone():
    for name in ("int4-g16", "int8-tensor", "int3-channel-asym", "fp8-channel", "fp4-g16"):
        together = make(name, (10, 6, 3))
        result = GPTQ().solve(together)
        for i, weight in enumerate(together.weights):
            alone = LayerProblem(
                ("one",), (weight,), together.spec, together.range_rule, torch.bfloat16,
                together.hessian,
            )  # fmt: skip
            own = GPTQ().solve(alone)
            assert torch.equal(own.weights[0].codes, result.weights[i].codes)
            assert torch.equal(own.weights[0].scale, result.weights[i].scale)
            assert own.losses[0] == pytest.approx(result.losses[i], rel=1e-5)


@pytest.mark.parametrize("name", ["int4-g16", "int4-g16-asym", "fp8-g16", "fp4-g16"])
def test_the_order_of_the_sweep_does_not_touch_the_groups(name):
    """Scales are those of the original columns, so a reader needs no index of groups."""
    problem = make(name)
    nearest = RTN().solve(problem).weights[0]
    for order in ORDERS:
        result = GPTQ(order=order).solve(problem).weights[0]
        assert torch.equal(result.scale, nearest.scale)
        step = columns_of(result.scale, problem.spec, result.codes.shape)
        zero = 0.0
        if result.zero_point is not None:
            assert torch.equal(result.zero_point, nearest.zero_point)
            zero = columns_of(result.zero_point, problem.spec, result.codes.shape)
        values = (result.spec.grid.read(result.codes).double() - zero) * step
        torch.testing.assert_close(result.dequantize().double(), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["int4-g16", *FLOATS])
def test_the_order_of_samples_does_not_change_the_codes(name):
    """With inputs whose sums are exact, not by one bit."""
    x = torch.randint(-8, 9, (200, 48), generator=torch.Generator().manual_seed(0)).float()
    shuffled = x[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    first = GPTQ().solve(make(name, hessian=moments(x)))
    second = GPTQ().solve(make(name, hessian=moments(shuffled)))
    assert torch.equal(first.weights[0].codes, second.weights[0].codes)
    assert first.losses == second.losses


@pytest.mark.parametrize("solver", [GPTQ(), PLAIN, GPTQ(damping_basis="mean")])
def test_columns_that_calibration_never_excites_disturb_nothing(solver):
    x = correlated(300, 48, 4)
    dead = [0, 17, 47]
    live = [i for i in range(48) if i not in dead]
    x[:, dead] = 0.0
    problem = make("int4-channel", hessian=moments(x))
    weight = problem.weights[0]
    # Small enough not to decide the scales, which both problems then share.
    weight[:, dead] *= 0.1
    result = solver.solve(problem)
    smaller = LayerProblem(
        ("live",),
        (weight[:, live].contiguous(),),
        problem.spec,
        problem.range_rule,
        torch.bfloat16,
        problem.hessian[live][:, live],
    )
    expected = solver.solve(smaller)
    codes = result.weights[0].codes
    assert torch.equal(codes[:, live], expected.weights[0].codes)
    assert torch.equal(codes[:, dead], RTN().solve(problem).weights[0].codes[:, dead])
    assert result.diagnostics.dead_columns == 3
    assert result.diagnostics.swept_loss == pytest.approx(expected.diagnostics.swept_loss, rel=1e-6)


def test_an_input_that_is_always_zero_means_rounding_to_nearest():
    problem = make(kind="mse", hessian=torch.zeros(48, 48))
    result = GPTQ().solve(problem)
    assert torch.equal(result.weights[0].codes, RTN().solve(problem).weights[0].codes)
    assert result.losses == (0.0,)
    assert result.diagnostics.dead_columns == 48


@pytest.mark.parametrize("basis", ["column", "mean"])
@pytest.mark.parametrize("order", ORDERS)
def test_fewer_tokens_than_columns_still_factorize(basis, order):
    problem = make("int4-g16", (16,), 64, tokens=5)
    result = GPTQ(damping_basis=basis, order=order).solve(problem)
    assert result.diagnostics.damping == 0.1
    assert result.losses[0] < 0.5 * result.baseline_losses[0]


def twins() -> Tensor:
    """A Hessian of which two columns are exactly equal: whole numbers add up without rounding."""
    x = torch.randint(-8, 9, (40, 8), generator=torch.Generator().manual_seed(0)).float()
    x[:, 5] = x[:, 2]
    return x.T @ x


@pytest.mark.parametrize("order", ORDERS)
def test_without_damping_a_singular_hessian_climbs_the_ladder(order):
    """No precision can factorize it; the first rung of damping, in float64, can."""
    problem = make("int4-channel", (4,), 8, hessian=twins())
    result = GPTQ(damping=0.0, order=order).solve(problem)
    assert result.diagnostics.damping == 1e-6
    assert result.diagnostics.damping_attempts == 4
    assert result.losses[0] <= result.baseline_losses[0]


@pytest.mark.parametrize("order", ORDERS)
def test_more_precision_is_tried_before_more_damping(order):
    """A pivot of a ten-millionth of its diagonal is noise in float32 and sound in float64."""
    problem = make("int4-channel", (4,), 8, hessian=twins())
    notes = GPTQ(damping=1e-7, order=order).solve(problem).diagnostics
    assert (notes.damping, notes.precision) == (1e-7, "float64")
    assert notes.damping_attempts == 2
    assert GPTQ(order=order).solve(problem).diagnostics.precision == "float32"


@pytest.mark.skipif(
    not products.supports(torch.device("cpu"), torch.bfloat16),
    reason="this processor does not multiply bfloat16",
)
@pytest.mark.parametrize("order", ["original", "pivot"])
def test_a_factorization_that_rounding_spoils_is_made_in_float32(order, monkeypatch):
    """A mean that explains nearly everything, rounded against the rule: not positive definite."""
    x = correlated(2000, 600, seed=5)
    x += 100 * correlated(1, 600, seed=6)
    problem = make("int4-channel", (4,), 600, hessian=x.T @ x / len(x))
    rounded = replace(problem, products=torch.bfloat16)
    solver = GPTQ(order=order)
    notes = solver.solve(rounded).diagnostics
    assert notes.precision == "float32, products of bfloat16"
    assert notes.damping_attempts == 1
    monkeypatch.setattr(cholesky, "_HEAVY", float("inf"))
    notes = solver.solve(rounded).diagnostics
    assert (notes.precision, notes.damping) == ("float32", solver.damping)
    assert notes.damping_attempts == 2


def test_what_is_no_hessian_is_refused_with_names_and_values():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1000.0
    problem = make("int4-channel", (4, 4), 8, hessian=hessian)
    with pytest.raises(NumericsError, match="cannot be factorized") as caught:
        GPTQ().solve(problem)
    assert caught.value.where == "layers.0.0, layers.0.1"
    assert "0.1 to" in caught.value.what


def test_no_calibration_is_refused_by_name():
    problem = LayerProblem(
        ("visual.merger",), (torch.ones(2, 4),), spec("int4-channel"), RangeRule(), torch.float32
    )
    with pytest.raises(NumericsError) as caught:
        GPTQ().solve(problem)
    assert caught.value.where == "visual.merger"
    assert "rtn" in caught.value.remedy


def test_padded_tokens_equal_dropped_ones():
    x = correlated(300, 48, 6)
    counted = torch.rand(300, generator=torch.Generator().manual_seed(0)) > 0.3
    padded, dropped = Hessian(48), Hessian(48)
    noise = torch.where(counted[:, None], x, torch.full_like(x, 1e6))
    padded.update(noise, counted)
    dropped.update(x[counted])
    results: list[LayerResult] = [
        GPTQ().solve(make(hessian=record.result())) for record in (padded, dropped)
    ]
    assert torch.equal(results[0].weights[0].codes, results[1].weights[0].codes)


@pytest.mark.parametrize("weighting", ["pivot", "diagonal", "none"])
def test_scales_are_searched_with_each_weighting(weighting):
    problem = make("int3-g16", (32,), kind="mse", seed=7)
    result = GPTQ(scale_weighting=weighting).solve(problem)
    assert result.diagnostics.scale_weighting == weighting
    assert sum(result.losses) < 0.5 * sum(RTN().solve(problem).losses)


def test_weighting_by_pivots_is_what_suits_the_sweep():
    """Summed over several layers of correlated inputs; single ones may go either way."""
    totals = dict.fromkeys(["pivot", "diagonal", "none"], 0.0)
    for weighting in totals:
        for seed in range(6):
            problem = make("int3-g32", (64,), 64, kind="mse", seed=seed, tokens=1000)
            solver = GPTQ(scale_weighting=weighting)  # type: ignore[arg-type]
            totals[weighting] += solver.solve(problem).losses[0]
    assert totals["pivot"] < totals["none"]


def test_solving_leaves_the_problem_as_it_was():
    problem = make("int4-g16", (5, 3), kind="mse")
    before = [t.clone() for t in (*problem.weights, problem.hessian)]
    first = GPTQ().solve(problem)
    second = GPTQ().solve(problem)
    for old, new in zip(before, (*problem.weights, problem.hessian), strict=True):
        assert torch.equal(old, new)
    for one, two in zip(first.weights, second.weights, strict=True):
        assert torch.equal(one.codes, two.codes)
    assert first.diagnostics == second.diagnostics


def test_pivots_are_ordered_across_blocks():
    """More columns than are eliminated at once, against the definition in float64."""
    problem = make("int4-channel", (4,), 160, tokens=1000, seed=8)
    result = PLAIN.solve(problem).weights[0]
    damped = damp(problem.hessian, 0.1, "column")
    expected = textbook(problem.weights[0], result, damped, order_of(damped, "pivot"))
    assert torch.equal(result.spec.grid.read(result.codes).double(), expected)


def test_losses_of_rows_are_those_of_float64_beyond_a_block_of_columns():
    features = 2 * LOSS_BLOCK + 70
    hessian = moments(correlated(700, features, 1))
    error = torch.randn(5, features, generator=torch.Generator().manual_seed(2))
    exact = ((error.double() @ hessian.double()) * error.double()).sum(1)
    torch.testing.assert_close(row_losses(error, hessian), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["int4-g16", "int3-channel-asym", "int8-tensor", "fp8-b16"])
@pytest.mark.parametrize("passes", [0, 2])
def test_how_many_rows_are_solved_at_once_changes_no_code(name, passes, monkeypatch):
    problem = make(name, (20, 3, 14), seed=11)
    problem.hessian[5], problem.hessian[:, 5] = 0.0, 0.0
    whole = GPTQ(refine_passes=passes).solve(problem)
    monkeypatch.setattr(row_chunks, "CPU_ROWS", 6)
    parts = GPTQ(refine_passes=passes).solve(problem)
    for one, two in zip(whole.weights, parts.weights, strict=True):
        assert torch.equal(one.codes, two.codes)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for note in ("swept_loss", "refined_loss"):
        told = (getattr(one.diagnostics, note) for one in (parts, whole))
        assert next(told) == pytest.approx(next(told), rel=1e-5)


@pytest.mark.parametrize("damping", [0.1, 1e-4])
@pytest.mark.parametrize("tokens", [20, 1000])
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_the_loss_is_that_of_the_codes_however_it_was_measured(passes, tokens, damping):
    """Descent measures it on the way; what a Hessian of few tokens leaves is small beside it."""
    problem = make("int4-g16", (30, 9), 144, tokens=tokens, seed=12)
    result = GPTQ(damping=damping, refine_passes=passes).solve(problem)
    for weight, found, loss in zip(problem.weights, result.weights, result.losses, strict=True):
        assert loss == pytest.approx(loss_under(problem.hessian, weight, found), rel=1e-4)


# For each shape, by how much a solve raised the resident set; a small one has loaded all code.
_PEAKS = """
import sys, torch
from pathlib import Path
from prismquant.algorithms.problem import LayerProblem
from prismquant.algorithms.gptq import GPTQ
from prismquant.formats.spec import spec
from prismquant.memory import keep_heap_compact
from prismquant.numerics.ranges import RangeRule

def status(name):
    text = Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) * 1024

def took(n, rows):
    x = torch.randn(256, n)
    weight = torch.randn(rows, n)
    rule = RangeRule(kind="minmax")
    task = LayerProblem(("one",), (weight,), spec("int4-g32"), rule, torch.float32, x.T @ x)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = status("VmRSS")
    GPTQ(refine_passes=1).solve(task)
    return status("VmHWM") - before

keep_heap_compact()
took(64, 32)
print(*[took(*map(int, shape.split("x"))) for shape in sys.argv[1:]])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts pages as Linux does")
def test_a_solve_takes_the_memory_that_is_predicted():
    """In a process of its own, because the peak is the process's."""
    shapes = [(2048, 256), (512, 5000)]
    command = [sys.executable, "-c", _PEAKS, *(f"{n}x{rows}" for n, rows in shapes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for (features, rows), took in zip(shapes, done.stdout.split(), strict=True):
        predicted = peak_solve_bytes(features, rows)
        assert 0.4 * predicted < int(took) < predicted


def test_no_second_matrix_of_the_size_of_the_hessian_is_made():
    """The factor is made in its memory: a large layer needs less than that much beside it."""
    assert peak_solve_bytes(18944, 3584) < 0.5 * 4 * 18944**2


@pytest.mark.skipif(
    not products.supports(torch.device("cpu"), torch.bfloat16),
    reason="this processor does not multiply bfloat16",
)
@pytest.mark.parametrize("name", ["int4-g16", "int3-channel-asym", "fp8-g16"])
@pytest.mark.parametrize(
    "solver", [GPTQ(), PLAIN, GPTQ(order="activation", damping=0.01, damping_basis="mean")]
)
def test_products_of_rounded_factors_cost_next_to_nothing(name, solver):
    """And what is told of the loss stays that of the codes.

    A rounding that falls differently moves the loss of a few rows by up to two percent either way,
    so it is that of several problems together which must stay.
    """
    before, after = 0.0, 0.0
    for seed in range(13, 17):
        exact = make(name, (40, 24), 400, tokens=1200, seed=seed)
        known, found = solver.solve(exact), solver.solve(replace(exact, products=torch.bfloat16))
        pairs = list(zip(exact.weights, known.weights, found.weights, strict=True))
        assert any(not torch.equal(one.codes, two.codes) for _, one, two in pairs)
        losses = [loss_under(exact.hessian, weight, two) for weight, _, two in pairs]
        assert found.losses == pytest.approx(losses, rel=5e-3)
        assert found.baseline_losses == pytest.approx(known.baseline_losses, rel=5e-3)
        before += sum(loss_under(exact.hessian, weight, one) for weight, one, _ in pairs)
        after += sum(losses)
    assert after == pytest.approx(before, rel=1e-2)
