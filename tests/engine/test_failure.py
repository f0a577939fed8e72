"""A layer that cannot be solved: it stops with its figures, or is rounded to nearest and marked."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prismquant as pq
from prismquant import cli
from prismquant.algorithms.gptq import GPTQ
from prismquant.algorithms.problem import LayerProblem, LayerResult
from prismquant.algorithms.rtn import RTN
from prismquant.diagnostics.failed_layers import failed_layers, failure_lines
from prismquant.diagnostics.solver_diagnostics import Failure, RTNDiagnostics
from prismquant.engine.calls import StepCall
from prismquant.engine.collectives import Task, solve_all
from prismquant.engine.failure import Guarded
from prismquant.engine.group import GroupSettings, LayerGroup
from prismquant.engine.setup import Silent
from prismquant.errors import DataError, NumericsError, PrismQuantError, RecipeError
from prismquant.export.load_quantized import load_model
from prismquant.formats.spec import spec
from prismquant.models.bind import bind
from prismquant.numerics.ranges import RangeRule
from prismquant.opening import read_json
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import PlanRow, problem_groups
from prismquant.recipe.resolve import resolve
from prismquant.recipe.schema import load_recipe
from prismquant.report.plan_summary import PlanSummary
from prismquant.report.plans import layer_table, run_table
from prismquant.report.run_files import RunFiles
from prismquant.shards import ShardReader
from prismquant.statistics.hessian import Hessian
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from prismquant.diagnostics.step_record import LayerRecord, StepRecord

LLM = "model.language_model.layers"
UP = f"{LLM}.0.mlp.up_proj"
IN = 128
WEIGHTS = {"match": {"modality": "llm", "role": ["attn", "mlp"]}, "weights": "int4-g32"}
GROUPED = {"solver": "rtn", "options": {"scale_weighting": "group"}, "weight_range": "mse"}
bound = functools.cache(bind)


# What a solver is asked


def a_problem(name: str = "int4-g32", rows: Sequence[int] = (6, 5), **parts: Any) -> LayerProblem:
    generator = torch.Generator().manual_seed(3)
    weights = tuple(torch.randn(count, 64, generator=generator) for count in rows)
    names = tuple(f"layers.0.{index}" for index in range(len(rows)))
    rule = parts.pop("rule", RangeRule("minmax"))
    return LayerProblem(names, weights, spec(name), rule, torch.float32, **parts)


def no_hessian() -> Tensor:
    """Symmetric, finite, of positive diagonal, but far from positive definite."""
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1e4
    return hessian


def test_what_cannot_be_factorized_stops_with_its_figures_and_the_way_out() -> None:
    problem = a_problem(hessian=no_hessian(), tokens=320.0)
    with pytest.raises(NumericsError) as caught:
        Guarded(GPTQ(), "stop").solve(problem)
    assert caught.value.where == "layers.0.0, layers.0.1"
    for figure in ("64 columns", "over 320 tokens", "damping 0.1 to 10", "from 1 to 1"):
        assert figure in caught.value.what
    assert "check the calibration data" in str(caught.value.remedy)
    assert "on_failure: rtn (--on-failure rtn)" in str(caught.value.remedy)


@pytest.mark.parametrize("hessian", [None, no_hessian()])
@settings(max_examples=15)
@given(
    name=st.sampled_from(["int4-g32", "int3-g32-asym", "int8-channel", "fp8-channel", "nvfp4"]),
    kind=st.sampled_from(["minmax", "mse", "percentile"]),
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_what_falls_back_is_rounded_to_nearest_in_its_own_format(
    hessian: Tensor | None, name: str, kind: Any, rows: list[int]
) -> None:
    """The codes and scales of RTN; the losses are those of the weights, in float64."""
    problem = a_problem(name, rows, rule=RangeRule(kind), hessian=hessian)
    result = Guarded(GPTQ(), "rtn").solve(problem)
    expected = RTN().solve(replace(problem, hessian=None))
    for ours, theirs in zip(result.weights, expected.weights, strict=True):
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scale, theirs.scale)
    for weight, ours, loss in zip(problem.weights, result.weights, result.losses, strict=True):
        error = weight.double() - ours.dequantize(torch.float32).double()
        assert loss == pytest.approx(float(error.square().sum()), rel=1e-5)
    assert result.losses == result.baseline_losses
    why = "cannot be factorized" if hessian is not None else "none has reached this layer"
    assert result.failure is not None
    assert why in result.failure.why
    assert result.failure.wanted == "gptq"


def test_rounding_that_needs_a_hessian_falls_back_to_rounding_that_does_not() -> None:
    problem = a_problem(rule=RangeRule("mse"))
    guarded = Guarded(RTN("group"), "rtn")
    assert guarded.statistics == ("hessian",)
    result = guarded.solve(problem)
    plain = RTN().solve(problem)
    assert torch.equal(result.weights[0].codes, plain.weights[0].codes)
    assert result.failure is not None
    assert (result.failure.wanted, result.diagnostics) == ("rtn", RTNDiagnostics("none"))
    with pytest.raises(NumericsError, match="without calibration data") as caught:
        Guarded(RTN("group"), "stop").solve(problem)
    assert "on_failure: rtn" in str(caught.value.remedy)


@pytest.mark.parametrize("on_failure", ["stop", "rtn"])
def test_what_can_be_solved_is_solved_as_ever(on_failure: Any) -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    problem = a_problem(hessian=x.T @ x / 200)
    result, expected = Guarded(GPTQ(), on_failure).solve(problem), GPTQ().solve(problem)
    assert torch.equal(result.weights[0].codes, expected.weights[0].codes)
    assert result.diagnostics == expected.diagnostics
    assert result.failure is None


# What layers of one input are given


@pytest.fixture(scope="module")
def row(tiny: Callable[..., Path]) -> Callable[..., PlanRow]:
    """``row(rule)``: the row of an up projection under one rule."""

    def get(**rule: Any) -> PlanRow:
        patch = {"match": {"role": "patch_embed"}, "activations": "none", "outputs": "none"}
        recipe = load_recipe({"rules": [{"weights": "int4-g32"} | rule, patch]})
        plan = make_plan(recipe, bound(tiny("qwen2_vl")))
        return next(row for row in plan.rows if row.site.name == UP)

    return get


def a_group(row: PlanRow, weight: Tensor | None = None) -> LayerGroup:
    layer = nn.Linear(IN, 256, bias=False).requires_grad_(False)
    values = torch.randn(256, IN, generator=torch.Generator().manual_seed(0))
    layer.weight.copy_(values if weight is None else weight)
    settings = GroupSettings(torch.device("cpu"), torch.float32, True, 1.0)
    return LayerGroup([row], [layer], settings, lambda _: layer.weight.detach())


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(seed))


CALL = StepCall((), {}, None, None, lambda _: None)


def outcome(group: LayerGroup) -> tuple[LayerProblem, LayerResult, LayerRecord]:
    problem = group.problem()
    result = group.solver.solve(problem)
    ((_, record),) = group.solved(result)
    return problem, result, record


def assert_rounded(group: LayerGroup, why: str, wanted: str) -> None:
    """Not solved but rounded, and said so."""
    problem, result, record = outcome(group)
    assert problem.hessian is None
    expected = RTN().solve(problem)
    assert torch.equal(result.weights[0].codes, expected.weights[0].codes)
    assert record.solver == "rtn"
    assert record.failure is not None
    assert why in record.failure.why
    assert record.failure.wanted == wanted


@pytest.mark.parametrize("rule", [{"solver": "gptq"}, GROUPED, {"correction": "auto"}])
def test_a_layer_that_no_token_reaches(row: Callable[..., PlanRow], rule: dict[str, Any]) -> None:
    with pytest.raises(NumericsError, match="no calibration token reached this layer") as caught:
        outcome(a_group(row(**rule)))
    assert caught.value.where == UP
    assert "add samples" in str(caught.value.remedy)
    assert "on_failure: rtn" in str(caught.value.remedy)
    group = a_group(row(on_failure="rtn", **rule))
    assert_rounded(group, "no calibration token reached this layer", rule.get("solver", "gptq"))


@pytest.mark.parametrize("rule", [{"solver": "gptq"}, GROUPED, {"correction": "auto"}])
def test_an_input_that_is_not_finite(row: Callable[..., PlanRow], rule: dict[str, Any]) -> None:
    """What had come before is not used either: a layer is solved on all its tokens or on none."""
    bad = tokens(4, 9)
    bad[1, 5], bad[2, 6] = float("nan"), float("inf")
    group = a_group(row(**rule))
    wanted = tokens(60) if "correction" in rule else None
    group.observe(tokens(60), CALL, "moments", wanted)
    with pytest.raises(NumericsError) as caught:
        group.observe(bad, CALL, "moments", None if wanted is None else bad)
    assert caught.value.where == f"input of {UP}"
    finite = bad[torch.isfinite(bad)]
    for figure in (
        f"1 NaN and 1 infinite of {4 * IN} values",
        f"the finite ones from {float(finite.min()):.4g} to {float(finite.max()):.4g}",
        "the first is nan at index [1, 5]",
        "60 tokens had come before",
    ):
        assert figure in caught.value.what
    group = a_group(row(on_failure="rtn", **rule))
    for x in (tokens(60), bad, tokens(60)):
        group.observe(x, CALL, "moments", None if wanted is None else x)
    assert_rounded(group, "input: the input holds 1 NaN", rule.get("solver", "gptq"))


def test_moments_that_leave_float32(row: Callable[..., PlanRow]) -> None:
    """Every input is finite, and so is every output: a run that falls back here goes on."""
    x = tokens(40).sign() * 1e19
    group = a_group(row())
    group.observe(x, CALL, "moments")
    group.observe(x, CALL, "moments")
    with pytest.raises(NumericsError, match="the Hessian over 80 tokens holds") as caught:
        outcome(group)
    assert caught.value.where == UP
    assert "on_failure: rtn" in str(caught.value.remedy)
    group = a_group(row(on_failure="rtn"))
    group.observe(x, CALL, "moments")
    group.observe(x, CALL, "moments")
    assert_rounded(group, "the Hessian over 80 tokens holds", "gptq")


def test_a_correction_that_comes_out_as_nonsense(row: Callable[..., PlanRow]) -> None:
    """The float model's states may be what is not finite; the weights are then left as they are."""
    for rule in ({}, {"on_failure": "rtn"}):
        group = a_group(row(correction={"strength": 1.0, "damping": 0.1}, **rule))
        group.observe(tokens(200), CALL, "moments", tokens(200) * float("inf"))
        if rule:
            assert_rounded(group, "the corrected weights are not finite", "gptq")
            continue
        with pytest.raises(NumericsError, match="corrected weights are not finite") as caught:
            outcome(group)
        assert caught.value.where == UP


@pytest.mark.parametrize("on_failure", ["stop", "rtn"])
@pytest.mark.parametrize("solver", ["gptq", "rtn"])
def test_a_damaged_weight_always_stops(
    row: Callable[..., PlanRow], on_failure: str, solver: str
) -> None:
    weight = torch.full((256, IN), 0.5)
    weight[3, 4], weight[3, 5], weight[9, 1] = float("nan"), float("inf"), -2.0
    group = a_group(row(on_failure=on_failure, solver=solver), weight)
    group.observe(tokens(60), CALL, "moments")
    with pytest.raises(NumericsError, match="2 values that are NaN or infinite") as caught:
        outcome(group)
    assert caught.value.where == UP
    figures = f"1 NaN and 1 infinite of {256 * IN} values, the finite ones from -2 to 0.5"
    assert figures in caught.value.what
    assert "on_failure" not in str(caught.value.remedy)


@pytest.mark.parametrize("on_failure", ["stop", "rtn"])
@pytest.mark.parametrize("solver", ["gptq", "rtn"])
@pytest.mark.parametrize("side", ["activations", "outputs"])
def test_a_static_range_that_no_token_reaches_always_stops(
    row: Callable[..., PlanRow], on_failure: str, solver: str, side: str
) -> None:
    rule = {side: "int8-tensor", "on_failure": on_failure, "solver": solver}
    with pytest.raises(NumericsError, match=r"so its static (in|out)put has no scale") as caught:
        outcome(a_group(row(**rule)))
    assert caught.value.where == UP
    assert "cannot help a static range" in str(caught.value.remedy)


# Several ranks


class Meeting:
    """Ranks that are threads: the same exchanges, without processes.

    Args:
        size: How many there are.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=300)
        self.slots: list[Any] = [None] * size

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        """What each rank's work returns; a rank that fails wakes the others."""

        def guarded(rank: int) -> Any:
            try:
                with torch.no_grad():
                    return work(Seat(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, range(self.size)))


@dataclass(frozen=True)
class Seat:
    """One rank of a meeting."""

    meeting: Meeting
    rank: int
    device: str = "cpu"

    @property
    def size(self) -> int:
        return self.meeting.size

    def _exchange(self, value: Any) -> list[Any]:
        self.meeting.slots[self.rank] = value
        self.meeting.barrier.wait()
        found = list(self.meeting.slots)
        self.meeting.barrier.wait()
        return found

    def sum_(self, x: Tensor) -> None:
        x.copy_(sum(self._exchange(x.clone()), torch.zeros_like(x)))

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        return self._exchange({name: tensor.clone() for name, tensor in tensors.items()})

    def gather_json(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self._exchange(json.dumps(value))]


@pytest.mark.parametrize("rule", [{"solver": "gptq"}, GROUPED, {"correction": "auto"}])
@pytest.mark.parametrize("why", ["1 NaN and 0 infinite", "no calibration token"])
def test_all_ranks_do_without_moments_where_one_has_lost_them_or_none_has_any(
    row: Callable[..., PlanRow], rule: dict[str, Any], why: str
) -> None:
    found = row(on_failure="rtn", **rule)

    def work(ranks: Seat) -> tuple[LayerRecord, Tensor]:
        group = a_group(found)
        x = tokens(50, ranks.rank)
        if ranks.rank == 1:
            x[7, 7] = float("nan")
        if "NaN" in why:
            group.observe(x, CALL, "moments", x if "correction" in rule else None)
        group.share("moments", ranks)
        (result,) = solve_all([Task(group.solver, group.problem())], ranks)
        ((_, record),) = group.solved(result)
        return record, result.weights[0].codes

    (one, codes), *others = Meeting(3).run(work)
    assert one.solver == "rtn"
    assert one.failure is not None
    assert why in one.failure.why
    for record, theirs in others:
        assert record == one
        assert torch.equal(theirs, codes)


@pytest.mark.parametrize("count", [1, 4])
def test_what_a_rank_cannot_solve_is_rounded_for_all(count: int) -> None:
    """Whether problems are dealt out or cut into parts; and the others are solved."""
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    sound = a_problem(hessian=x.T @ x / 200)
    problems = [a_problem(hessian=no_hessian()), *[sound] * (count - 1)]
    tasks = [Task(Guarded(GPTQ(), "rtn"), problem) for problem in problems]
    alone = [task.solver.solve(task.problem) for task in tasks]
    # Ranks are processes, each with moments of its own.
    for results in Meeting(3).run(lambda ranks: solve_all(copy.deepcopy(tasks), ranks)):
        for result, expected in zip(results, alone, strict=True):
            told, known = asdict(result.diagnostics), asdict(expected.diagnostics)
            assert told == pytest.approx(known)
            assert result.failure == expected.failure
            for ours, theirs in zip(result.weights, expected.weights, strict=True):
                assert torch.equal(ours.codes, theirs.codes)


def test_a_layer_of_which_one_rank_fails_at_its_part_has_one_method() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    problem = a_problem(hessian=x.T @ x / 200)

    def work(ranks: Seat) -> LayerResult:
        solver = GPTQ() if ranks.rank else Refusing()
        return solve_all([Task(Guarded(solver, "rtn"), problem)], ranks)[0]

    expected = RTN().solve(problem)
    for result in Meeting(2).run(work):
        assert result.failure == Failure("not on this machine", "refusing")
        for ours, theirs in zip(result.weights, expected.weights, strict=True):
            assert torch.equal(ours.codes, theirs.codes)


class Refusing:
    """A solver that never succeeds."""

    name = "refusing"
    statistics = ("hessian",)

    def solve(self, problem: LayerProblem) -> LayerResult:
        raise NumericsError("not on this machine", where=problem.title)


# What a recipe says


@settings(max_examples=30)
@given(said=st.lists(st.sampled_from([None, "stop", "rtn"]), min_size=1, max_size=5))
def test_the_last_rule_that_says_it_wins(said: list[str | None]) -> None:
    rules = [{"weights": "int4-g32"} | ({"on_failure": s} if s else {}) for s in said]
    config = resolve(load_recipe({"rules": rules}), modality="llm", role="mlp.up", name="a").config
    assert config.on_failure == next((s for s in reversed(said) if s), "stop")


def test_anything_else_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"rules\[0\].on_failure: Input should be 'stop' or"):
        load_recipe({"rules": [{"on_failure": "skip"}]})


def test_the_plan_says_it_and_keeps_layers_apart(tiny: Callable[..., Path]) -> None:
    """In plan.json always; in the table where it is not the default and something can fail."""
    folder = tiny("qwen2_vl")
    query = {"match": {"name": "*.0.*q_proj"}, "on_failure": "rtn"}
    plain = {"match": {"name": "*.1.mlp.*"}, "solver": "rtn", "on_failure": "rtn"}
    plan = pq.inspect(folder, {"rules": [WEIGHTS, query, plain]})
    written = plan.to_dict()["rows"]
    told = {row["site"]["name"]: row["config"]["on_failure"] for row in written}
    assert told[f"{LLM}.0.self_attn.q_proj"] == "rtn"
    assert told[f"{LLM}.0.self_attn.k_proj"] == "stop"
    assert told["lm_head"] == "stop"
    query_key_value = tuple(f"{LLM}.0.self_attn.{letter}_proj" for letter in "qkv")
    rows = [row for row in plan.quantized if row.site.name in query_key_value]
    assert [len(group) for group in problem_groups(rows)] == [1, 2]
    methods = list(layer_table(PlanSummary.from_dict(plan.to_dict())).columns[6].cells)
    assert [str(method) for method in methods if "or" in str(method)] == ["gptq, or rtn"]
    assert plan.fingerprint() != pq.inspect(folder, {"rules": [WEIGHTS, plain]}).fingerprint()


# Runs


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and a picture."""
    return tiny_vlm.samples(tmp_path_factory.mktemp("few"), kinds=("text", "image"), count=2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.samples(tmp_path_factory.mktemp("texts"), kinds=("text",), count=2)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments of one block's attention output and up projection are no Hessian."""
    result = Hessian.result

    def damaged(record: Hessian, *, consume: bool = False) -> Tensor:
        found = result(record, consume=consume)
        if record.name in {f"{LLM}.0.self_attn.o_proj", f"{LLM}.0.mlp.gate_proj"}:
            found[0, 1] = found[1, 0] = 1e6
        return found

    monkeypatch.setattr(Hessian, "result", damaged)


FAILING = {f"{LLM}.0.self_attn.o_proj", f"{LLM}.0.mlp.gate_proj", UP}


def a_recipe(on_failure: str, *rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {"rules": [WEIGHTS, *rules, {"on_failure": on_failure}], "name": "tried"}
    return body | {"calibration": {"batch_size": 2}} | more


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All that a reader of the checkpoint sees; the record also says how long it took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("record.json", "recipe.yaml")
    }


def layers_of(result: pq.api.Result) -> dict[str, LayerRecord]:
    return {layer.name: layer for step in result.record.steps for layer in step.layers}


@pytest.mark.usefixtures("broken")
def test_a_run_stops_at_the_layer_that_fails(
    tiny: Callable[..., Path], few: Path, tmp_path: Path
) -> None:
    with pytest.raises(NumericsError, match="cannot be factorized in 6 attempts") as caught:
        pq.quantize(tiny("qwen2_vl"), a_recipe("stop"), tmp_path / "out", few)
    assert caught.value.where == f"{LLM}.0.self_attn.o_proj"
    assert "tokens" in caught.value.what
    assert "on_failure: rtn" in str(caught.value.remedy)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.usefixtures("broken")
def test_a_run_that_falls_back_says_so_everywhere(
    tiny: Callable[..., Path], few: Path, tmp_path: Path
) -> None:
    """Record, notes, table and plan; the layers are stored as RTN would have them."""
    folder, out = tiny("qwen2_vl"), tmp_path / "out"
    result = pq.quantize(folder, a_recipe("rtn"), out, few)
    layers = layers_of(result)
    assert {name for name, layer in layers.items() if layer.failure} == FAILING
    for name, layer in layers.items():
        assert layer.solver == ("rtn" if name in FAILING else "gptq")
        assert (layer.failure.wanted if layer.failure else "") == (
            "gptq" if name in FAILING else ""
        )
    told = [note for note in result.notes if "rounded to nearest" in note]
    assert len(told) == 1
    assert told[0].startswith("3 layers rounded to nearest in place of being solved: ")
    assert "cannot be factorized" in told[0]
    assert "3 of 7 layers failed" in "".join(
        map(str, run_table(RunFiles.read(out)).columns[5].cells)
    )
    rows = read_json(out / "prismquant" / "plan.json")["rows"]
    assert {row["config"]["on_failure"] for row in rows if row["config"]["weights"]} == {"rtn"}
    stored = read_json(out / "prismquant" / "record.json")
    assert "cannot be factorized" in str(stored["steps"])
    rounding = a_recipe("stop", {"solver": "rtn"})
    pq.quantize(folder, rounding, tmp_path / "rtn")
    mine, nearest = (load_model(path).state_dict() for path in (out, tmp_path / "rtn"))
    for name in layers:
        same = torch.equal(mine[f"{name}.weight"], nearest[f"{name}.weight"])
        assert same == (name in FAILING)


class Stopping(Silent):
    """Ends a run after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def finish(self, record: StepRecord) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("tuner", [None, "autoround"])
def test_a_resumed_run_falls_back_to_the_same_bytes(
    tiny: Callable[..., Path], few: Path, tmp_path: Path, tuner: str | None
) -> None:
    """A step that fell back before the break keeps its mark."""
    folder = tiny("qwen2_vl")
    quick = {"tuner": tuner, "tuner_options": {"iterations": 4, "settle": 0}} if tuner else None
    recipe = a_recipe("rtn", *([quick] if quick else []))
    whole = pq.quantize(folder, recipe, tmp_path / "whole", few)
    with pytest.raises(KeyboardInterrupt):
        # The patch embedding, two blocks and the merger come before the first block of text.
        pq.quantize(folder, recipe, tmp_path / "cut", few, reporter=Stopping(5))
    resumed = pq.quantize(folder, recipe, tmp_path / "cut", few, resume=True)
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
    assert failure_lines(resumed.record.steps) == failure_lines(whole.record.steps) != ()
    again = pq.quantize(folder, recipe, tmp_path / "cut", few, resume=True)
    assert again.notes == failure_lines(whole.record.steps)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("tuner", ["autoround", "zeroquant"])
def test_a_tuner_leaves_layers_alone_that_fell_back(
    tiny: Callable[..., Path], few: Path, tmp_path: Path, tuner: str
) -> None:
    """They are rounded to nearest, as their mark says; the rest of the block is tuned."""
    folder = tiny("qwen2_vl")
    rule = {"tuner": tuner, "tuner_options": {"iterations": 4, "settle": 0}}
    result = pq.quantize(folder, a_recipe("rtn", rule), tmp_path / "out", few)
    for name, layer in layers_of(result).items():
        assert (layer.tuning is not None) == (name not in FAILING)
    pq.quantize(folder, a_recipe("stop", {"solver": "rtn"}), tmp_path / "rtn")
    mine, nearest = (load_model(tmp_path / name).state_dict() for name in ("out", "rtn"))
    for name in FAILING:
        assert torch.equal(mine[f"{name}.weight"], nearest[f"{name}.weight"])


# A tower that no sample reaches


@pytest.mark.parametrize("rule", [GROUPED, {"correction": "auto"}], ids=["rtn", "gptq"])
def test_a_tower_that_no_sample_reaches(
    tiny: Callable[..., Path], texts: Path, tmp_path: Path, rule: dict[str, Any]
) -> None:
    """Refused before anything is computed; or rounded, while the language model is solved."""
    folder, out = tiny("qwen2_vl"), tmp_path / "out"
    weights = {"match": {"modality": ["vision", "llm"], "role": ["attn", "mlp"]}}
    body = {"rules": [weights | {"weights": "int4-g32"} | rule]}
    with pytest.raises(DataError, match="needs vision samples") as caught:
        pq.quantize(folder, body, out, texts)
    assert "on_failure: rtn" in str(caught.value.remedy)
    assert not out.exists()
    result = pq.quantize(folder, load_recipe(body).with_rules({"on_failure": "rtn"}), out, texts)
    assert result.record.finished
    for row in result.plan.quantized:
        layer = layers_of(result)[row.site.name]
        if row.site.modality == "vision":
            assert layer.failure == Failure(
                "no calibration token reached this layer", row.config.solver
            )
            assert layer.solver == "rtn"
        else:
            assert layer.failure is None
    assert len(result.notes) == 1
    assert load_model(out) is not None


@pytest.mark.parametrize(
    "rule",
    [{"activations": "int8-tensor"}, {"outputs": "int8-tensor"}, {"tuner": "autoround"}],
    ids=["input", "output", "tuner"],
)
def test_what_cannot_do_without_samples_is_refused_whatever_the_option(
    tiny: Callable[..., Path], texts: Path, tmp_path: Path, rule: dict[str, Any]
) -> None:
    weights = {"match": {"modality": "vision", "role": ["attn", "mlp"]}, "weights": "int4-g32"}
    body = {"rules": [weights | rule | {"on_failure": "rtn"}]}
    with pytest.raises(DataError, match="needs vision samples"):
        pq.quantize(tiny("qwen2_vl"), body, tmp_path / "out", texts)
    assert not (tmp_path / "out").exists()


# Inputs and weights that are not finite


def damaged(source: Path, target: Path, name: str) -> Path:
    """A copy of a checkpoint with a NaN in one tensor."""
    shutil.copytree(source, target)
    reader = ShardReader(target)
    tensors = {key: reader.read(key) for key in reader.names}
    tensors[name].view(-1)[7] = float("nan")
    write_tensors(target / "model.safetensors", tensors)
    return target


def refused(*call: Any) -> PrismQuantError:
    with pytest.raises(NumericsError) as caught:
        pq.quantize(*call)
    return caught.value


@pytest.mark.parametrize("activations", ["none", "int8-token", "int8-tensor"])
def test_an_input_with_nan_is_followed_by_an_output_with_nan(
    tiny: Callable[..., Path], few: Path, tmp_path: Path, activations: str
) -> None:
    """With the option the layers fall back, and then the step stops and names the first of them."""
    norm = "model.layers.1.post_attention_layernorm.weight"
    folder = damaged(tiny("qwen2_vl"), tmp_path / "model", norm)
    inputs = {"activations": activations}
    error = refused(folder, a_recipe("stop", inputs), tmp_path / "stop", few)
    assert error.where == f"input of {LLM}.1.mlp.gate_proj"
    assert "NaN and 0 infinite of" in error.what
    assert "the finite ones from" in error.what
    error = refused(folder, a_recipe("rtn", inputs), tmp_path / "rtn", few)
    if activations == "int8-tensor":
        assert error.where == f"input of {LLM}.1.mlp.gate_proj"
        return
    assert error.where == f"{LLM}.1"
    assert f"failed before, first {LLM}.1.mlp.gate_proj: input: " in error.what


def test_a_head_whose_input_has_nan_can_fall_back(
    tiny: Callable[..., Path], few: Path, tmp_path: Path
) -> None:
    """Nothing comes after it."""
    folder = damaged(tiny("qwen2_vl"), tmp_path / "model", "model.norm.weight")
    rule = {"match": {"role": "lm_head"}, "weights": "int4-g32"}
    recipe = load_recipe({"rules": [rule]})
    assert refused(folder, recipe, tmp_path / "stop", few).where == "input of lm_head"
    recipe = recipe.with_rules({"on_failure": "rtn"})
    result = pq.quantize(folder, recipe, tmp_path / "rtn", few)
    assert list(failed_layers(layers_of(result).values())) == ["lm_head"]


@pytest.mark.parametrize("on_failure", ["stop", "rtn"])
def test_a_weight_with_nan_stops_every_run(
    tiny: Callable[..., Path], few: Path, tmp_path: Path, on_failure: str
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = damaged(tiny("qwen2_vl"), tmp_path / "model", name)
    error = refused(folder, a_recipe(on_failure), tmp_path / "out", few)
    assert error.where == UP
    assert "the weight holds 1 values that are NaN or infinite: 1 NaN" in error.what


# The command line


@pytest.fixture
def prismquant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """``prismquant(*arguments)``: exit status, stdout and stderr."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prismquant", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.mark.usefixtures("broken")
def test_the_command_line_has_the_option_and_tells_what_it_did(
    prismquant: Callable[..., tuple[int, str, str]],
    tiny: Callable[..., Path],
    few: Path,
    tmp_path: Path,
) -> None:
    folder, recipe = tiny("qwen2_vl"), tmp_path / "recipe.yaml"
    recipe.write_text(load_recipe(a_recipe("stop")).to_yaml())
    given = ("quantize", folder, "--recipe", recipe, "--calib", few, "--out")
    status, _, err = prismquant(*given, tmp_path / "stop")
    assert status == 1
    assert f"where: {LLM}.0.self_attn.o_proj" in err
    assert "--on-failure rtn" in err
    status, _, err = prismquant(*given, tmp_path / "rtn", "--on-failure", "rtn")
    assert status == 0
    assert "7 layers (3 failed: rounded to nearest)" in err
    assert "3 of 7 layers failed" in err
    assert "note: 3 layers rounded to nearest" in err.replace("\n", " ")
    status, out, _ = prismquant(*given, tmp_path / "json", "--on-failure", "rtn", "--json")
    assert status == 0
    said = json.loads(out)
    assert set(said["failed"]) == FAILING
    layers = [layer for step in said["record"]["steps"] for layer in step["layers"]]
    assert {layer["name"] for layer in layers if layer["failure"]} == FAILING
    status, out, _ = prismquant("inspect", folder, "--recipe", recipe, "--on-failure", "rtn")
    assert (status, "gptq, or rtn" in out) == (0, True)
    status, out, _ = prismquant("inspect", folder, "--recipe", recipe)
    assert (status, "or rtn" in out) == (0, False)
    assert prismquant(*given, tmp_path / "no", "--on-failure", "nearest")[0] == 2
