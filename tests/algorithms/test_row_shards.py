"""Problems cut by rows and joined again give what the whole gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import LayerProblem
from prismquant.algorithms.row_shards import joined, problem_of, row_shards
from prismquant.distributed import Alone
from prismquant.engine.collectives import Task, _owners, _packed, _unpacked, solve_all
from prismquant.formats.spec import spec
from prismquant.numerics.ranges import RangeRule

IN = 64
FORMATS = ("int4-g32", "int8-channel", "int4-tensor", "nvfp4", "mxfp4", "int4-g32-asym")


def problem(form: str, rows: tuple[int, ...] = (40, 24, 7), seed: int = 0) -> LayerProblem:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    return LayerProblem(
        names=tuple(f"layer{n}" for n in range(len(rows))),
        weights=tuple(torch.randn(count, IN, generator=generator) for count in rows),
        spec=spec(form),
        range_rule=RangeRule("minmax"),
        scale_dtype=torch.bfloat16,
        hessian=x.T @ x / len(x),
    )


@given(
    rows=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    parts=st.integers(1, 7),
    form=st.sampled_from(FORMATS),
)
def test_every_row_is_in_one_part_and_parts_are_even(
    rows: list[int], parts: int, form: str
) -> None:
    whole = problem(form, tuple(rows))
    shares = row_shards(whole, parts)
    assert len(shares) == parts
    flat = [cut for share in shares for cut in share]
    for layer, count in enumerate(rows):
        mine = [cut for cut in flat if cut.layer == layer]
        assert [cut.start for cut in mine] == [0, *(cut.stop for cut in mine[:-1])]
        assert mine[-1].stop == count
        assert all(cut.start < cut.stop for cut in mine)
    if whole.spec.granularity != "tensor":
        sizes = [sum(cut.stop - cut.start for cut in share) for share in shares]
        assert max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("form", FORMATS)
def test_parts_give_the_codes_of_the_whole(form: str, solver: str, parts: int) -> None:
    method = build_solver(solver, {})
    whole = method.solve(problem(form))
    fresh = problem(form)
    shares = row_shards(fresh, parts)
    results = [method.solve(problem_of(problem(form), rows)) if rows else None for rows in shares]
    found = joined(method, fresh, shares, results)
    for mine, theirs in zip(found.weights, whole.weights, strict=True):
        assert torch.equal(mine.codes, theirs.codes)
        assert torch.equal(mine.scale.float(), theirs.scale.float())
        assert torch.equal(mine.dequantize(), theirs.dequantize())
    assert found.losses == pytest.approx(whole.losses, rel=1e-4)
    assert found.baseline_losses == pytest.approx(whole.baseline_losses, rel=1e-4)
    assert type(found.diagnostics) is type(whole.diagnostics)
    for name in ("damping", "nearest_rows", "dead_columns"):
        told = (getattr(one.diagnostics, name, None) for one in (found, whole))
        assert len(set(told)) == 1


@pytest.mark.parametrize("form", FORMATS)
def test_a_result_survives_the_journey(form: str) -> None:
    whole = problem(form)
    result = build_solver("gptq", {}).solve(problem(form))
    back = _unpacked(_packed(result), whole.spec, torch.device("cpu"))
    assert (back.losses, back.baseline_losses) == (result.losses, result.baseline_losses)
    assert back.diagnostics == result.diagnostics
    for mine, theirs in zip(back.weights, result.weights, strict=True):
        assert torch.equal(mine.dequantize(), theirs.dequantize())


def test_owners_have_about_the_same_to_do() -> None:
    assert _owners([5.0, 3.0, 3.0, 1.0], 2) == [0, 1, 1, 0]
    assert sorted(_owners([1.0] * 6, 3)) == [0, 0, 1, 1, 2, 2]


def test_alone_everything_is_solved_here() -> None:
    tasks = [Task(build_solver("rtn", {}), problem(form)) for form in FORMATS[:2]]
    results = solve_all(tasks, Alone())
    assert [len(result.weights) for result in results] == [3, 3]
