"""Solvers by name, options checked strictly, and problems that are refused before any work."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from prismquant import algorithms
from prismquant.algorithms.gptq import GPTQ
from prismquant.algorithms.layer_scales import choose_scales, decode
from prismquant.algorithms.methods import SOLVERS, build_solver
from prismquant.algorithms.problem import LayerProblem, ProblemShape, row_losses
from prismquant.algorithms.protocols import WeightSolver
from prismquant.algorithms.rtn import RTN
from prismquant.diagnostics.solver_diagnostics import GPTQDiagnostics, RTNDiagnostics
from prismquant.errors import FormatError, NumericsError, RecipeError
from prismquant.formats.spec import spec
from prismquant.numerics.ranges import RangeRule


def problem(**changes):
    torch.manual_seed(0)
    parts = {
        "names": ("q", "k"),
        "weights": (torch.randn(6, 8), torch.randn(4, 8)),
        "spec": spec("int4-channel"),
        "range_rule": RangeRule(),
        "scale_dtype": torch.float32,
        "hessian": torch.eye(8),
    }
    return LayerProblem(**(parts | changes))


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_name_builds_a_frozen_solver_that_solves(name):
    solver = build_solver(name)
    assert solver.name == name
    assert dataclasses.is_dataclass(solver)
    first = dataclasses.fields(solver)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(solver, first, getattr(solver, first))
    result = solver.solve(problem())
    assert [tuple(w.shape) for w in result.weights] == [(6, 8), (4, 8)]
    assert len(result.losses) == len(result.baseline_losses) == 2


def test_options_reach_the_fields():
    assert build_solver("gptq", {"damping": 1, "order": "activation"}) == GPTQ(
        damping=1.0, order="activation"
    )
    assert build_solver("rtn", {"scale_weighting": "diagonal"}) == RTN("diagonal")
    assert isinstance(build_solver("gptq", {"damping": 1}).damping, float)


def test_an_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean 'gptq'"):
        build_solver("gtpq")


def test_an_unknown_option_is_refused_with_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean 'damping'"):
        build_solver("gptq", {"dampening": 0.1})
    with pytest.raises(RecipeError, match="no option 'name'"):
        build_solver("gptq", {"name": "rtn"})


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 12.5},
        {"block_size": True},
        {"block_size": 0},
        {"damping": "much"},
        {"damping": -0.1},
        {"damping": float("nan")},
        {"damping": 11.0},
        {"order": "random"},
        {"damping_basis": None},
        {"refine_passes": -1},
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_bounds_is_refused(options):
    with pytest.raises(RecipeError) as caught:
        build_solver("gptq", options)
    assert next(iter(options)) in str(caught.value)


def test_only_a_solver_that_reads_the_hessian_asks_for_it():
    assert build_solver("gptq").statistics == ("hessian",)
    assert build_solver("rtn").statistics == ()
    assert build_solver("rtn", {"scale_weighting": "diagonal"}).statistics == ("hessian",)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"names": ("q",)}, "1 names"),
        ({"names": (), "weights": ()}, "0 names"),
        ({"weights": (torch.ones(6, 8), torch.ones(4, 9))}, "one in"),
        ({"weights": (torch.ones(6, 8), torch.ones(8))}, "one in"),
        ({"weights": (torch.ones(6, 8), torch.ones(0, 8))}, "one in"),
        ({"weights": (torch.ones(6, 8), torch.ones(4, 8).bfloat16())}, "float32"),
        ({"spec": spec("int8-token")}, "activations"),
        ({"spec": spec("int4-g3")}, "group size 3"),
        ({"hessian": torch.eye(7)}, "Hessian"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, word):
    with pytest.raises(FormatError, match=word):
        problem(**changes)


def test_numbers_that_are_not_finite_are_refused_by_layer():
    weights = (torch.ones(6, 8), torch.ones(4, 8))
    weights[1][2, 3] = float("nan")
    with pytest.raises(NumericsError) as caught:
        problem(weights=weights)
    assert caught.value.where == "k"
    hessian = torch.eye(8)
    hessian[0, 1] = float("inf")
    with pytest.raises(NumericsError) as caught:
        problem(hessian=hessian)
    assert caught.value.where == "q, k"
    with pytest.raises(NumericsError, match="never negative"):
        problem(hessian=-torch.eye(8))


def test_the_loss_is_the_error_of_the_layers_output():
    """trace(E H E^T) is the mean over tokens of |E x|^2."""
    torch.manual_seed(1)
    x, error = torch.randn(100, 8).double(), torch.randn(5, 8).double()
    losses = row_losses(error.float(), (x.T @ x / 100).float())
    direct = (x @ error.T).square().mean(0)
    torch.testing.assert_close(losses, direct, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        row_losses(error.float(), None), error.square().sum(1), rtol=1e-6, atol=0
    )


def test_importance_of_any_magnitude_gives_the_same_scales():
    """Only its ratios count, also where squares of it would leave float32."""
    importance = torch.rand(8)
    one = problem(range_rule=RangeRule("mse"))
    expected = choose_scales(one, importance)
    for factor in (2.0**-100, 2.0**100):
        for scales, same in zip(choose_scales(one, importance * factor), expected, strict=True):
            assert torch.equal(scales.scale, same.scale)
    assert decode(torch.ones(6, 8, dtype=torch.int8), expected[0], one.spec).dtype == torch.float32


# What a solver declares


@pytest.mark.parametrize(
    ("name", "options", "statistics"),
    [
        ("gptq", {}, ("hessian",)),
        ("rtn", {}, ()),
        ("rtn", {"scale_weighting": "group"}, ("hessian",)),
    ],
)
def test_a_solver_declares_statistics_cost_and_peak(name, options, statistics):
    solver = build_solver(name, options)
    assert solver.statistics == statistics
    small, large = ProblemShape(64, 100), ProblemShape(128, 300)
    assert 0 < solver.cost(small) < solver.cost(large)
    assert 0 < solver.peak_bytes(small) < solver.peak_bytes(large)


def test_diagnostics_of_row_shards_merge_as_the_solver_says():
    how = (0.1, 1, "float32", "pivot", "none", "torch", 3)
    parts = [GPTQDiagnostics(*how, 2.0, 1.5, 1), GPTQDiagnostics(*how, 3.0, 2.5, 0)]
    assert build_solver("gptq").merge(parts) == GPTQDiagnostics(*how, 5.0, 4.0, 1)
    assert build_solver("gptq").merge(parts[:1]) == parts[0]
    # Shards that fell back are of another method.
    assert build_solver("gptq").merge([RTNDiagnostics()] * 2) == RTNDiagnostics()
    assert build_solver("rtn").merge([RTNDiagnostics("group")] * 2) == RTNDiagnostics("group")


def test_only_a_solver_that_takes_weights_by_themselves_says_so():
    assert isinstance(build_solver("rtn"), WeightSolver)
    assert not isinstance(build_solver("gptq"), WeightSolver)


def test_nothing_above_algorithms_names_a_solver():
    """Forecast, exchange among ranks, groups and runs without data go by what a solver declares."""
    engine = Path(algorithms.__file__).parents[1] / "engine"
    for path in engine.glob("*.py"):
        imported = re.findall(r"prismquant\.algorithms\.(\w+)", path.read_text())
        assert not {"gptq", "rtn", "awq", "smoothquant"} & set(imported), path.name
