"""A trial's loss is that of the checkpoint which the same recipe and samples would give."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm

import prismquant as pq
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.engine.memory_forecast import enough_gib
from prismquant.engine.placement import placements
from prismquant.engine.streamed_model import StreamedModel
from prismquant.errors import BudgetError, NumericsError, PlanError, PrismQuantError
from prismquant.evaluate.fidelity import evaluate_model
from prismquant.memory import resident_bytes
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.quantization import prepare
from prismquant.recipe.schema import parse_recipe
from prismquant.report.method_choices import choice_table
from prismquant.run.directory import RunDirectory
from prismquant.run.method_choice import MethodTrial, told_parts
from prismquant.search import choose_method, method_trials
from prismquant.search.analysis_request import DEFAULT_WEIGHTS
from prismquant.search.choose_method import ROUNDS
from prismquant.search.method_trials import Ask, TrialRuns
from prismquant.search.model_parts import one_for_all, parts_of
from prismquant.search.repair import measured
from prismquant.search.trial_blocks import trial_recipes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from prismquant.plan.plan import Plan
    from prismquant.recipe.schema import Recipe
    from prismquant.run.method_choice import MethodChoice

LLM = {"modality": "llm", "role": ["attn", "mlp"]}
TOWER = {"modality": ["vision", "projector"], "role": ["attn", "mlp"]}
ROTATED = {"name": "rotated", "transforms": [{"name": "rotation", "match": {"modality": "llm"}}]}
SMOOTHED = {
    "name": "smoothed",
    "rules": [{"correction": "auto"}],
    "transforms": [{"name": "smoothquant"}],
}


def recipe(*alternatives: dict[str, Any], where: tuple[dict[str, Any], ...] = (LLM,)) -> Recipe:
    rules = [
        {"match": match, "weights": "int4-channel", "activations": "int8-token"} for match in where
    ]
    body = {"name": "mine", "rules": rules, "choose": list(alternatives)}
    return parse_recipe(body, source="test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.samples(tmp_path_factory.mktemp("trials"), count=8)


def loss_of_run(
    folder: Path, ordinary: Recipe, data: Path, choice: MethodChoice, trial: MethodTrial, out: Path
) -> dict[str, float]:
    """Parts of the loss by sample, of a checkpoint that is written, loaded and evaluated."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    own = [row for row in rows if row["id"] in choice.seen]
    assert len(own) == trial.samples
    few = data.with_name("few.jsonl")
    few.write_text("\n".join(json.dumps(row) for row in own))
    pq.quantize(folder, ordinary, out, few)
    model, _ = pq.load(out)
    held_out = [sample for sample in read_samples(data) if sample.id in choice.held_out]
    batches = make_batches(
        held_out,
        load_processor(folder),
        batch_size=3,
        vision_token_ids=bind(folder).vision_token_ids,
    )
    found = evaluate_model(model, batches, load_float(folder))
    parts = measured(found.outcomes, DEFAULT_WEIGHTS).parts
    return {name.partition(": ")[2]: part for name, part in parts.items()}


def lowest(choice: MethodChoice, part: str) -> str:
    """What loses least in a part, in the last round that it was tried in."""
    tried = [trial for trial in choice.trials if trial.part == part]
    last = [trial for trial in tried if trial.round == max(one.round for one in tried)]
    return min(last, key=lambda trial: trial.loss or 0.0).name


@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("qwen2_vl", (LLM,)),
        pytest.param("qwen3_vl", (LLM, TOWER), marks=pytest.mark.slow),
        pytest.param("video_llama_3", (LLM,), marks=pytest.mark.slow),
    ],
)
def test_a_trial_measures_what_its_checkpoint_loses(
    tiny: Callable[..., Path],
    data: Path,
    tmp_path: Path,
    family: str,
    where: tuple[dict[str, Any], ...],
) -> None:
    folder, asked = tiny(family), recipe(ROTATED, SMOOTHED, where=where)
    choice = pq.quantize(folder, asked, tmp_path / "out", data).record.choice
    assert choice is not None
    parts = parts_of(asked, ["rotated", "smoothed"], bind(folder))
    assert [*parts] == (["model"] if len(where) == 1 else ["vision", "llm"])
    best = {part: lowest(choice, part) for part in parts}
    parts.setdefault("model", {name: asked.chosen(name) for name in ("rotated", "smoothed")})
    parts["model"] |= {told_parts(best): asked.combined(best)} if len(best) > 1 else {}
    for number, trial in enumerate(t for t in choice.trials if t.round == 0):
        whole = parts[trial.part]
        shown, _ = trial_recipes(whole, bind(folder), ROUNDS[0].blocks, ROUNDS[0].fewest_blocks)
        out = tmp_path / str(number)
        expected = loss_of_run(folder, shown[trial.name], data, choice, trial, out)
        assert trial.parts is not None
        assert trial.parts == pytest.approx(expected, rel=2e-3, abs=1e-9)
        assert trial.loss == pytest.approx(sum(expected.values()), rel=1e-3)


# Losses of each alternative in the tower, in the language model, and in both.
LOSSES = {"rotated": (1.0, 3.0, 4.0), "smoothed": (2.0, 1.0, 2.5)}


@pytest.mark.parametrize(
    ("together", "chosen"),
    [
        (2.0, {"vision": "rotated", "llm": "smoothed"}),
        (3.0, {"model": "smoothed"}),
        (None, {"model": "smoothed"}),
    ],
)
def test_two_choices_are_tried_together_against_one_for_all(
    tiny: Callable[..., Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    together: float | None,
    chosen: dict[str, str],
) -> None:
    """Once; the single alternative is the one with the least sum. Where it fails, it is not taken.

    Sums of losses are 4 and 3; the first two lose 2, or more, or fail.
    """

    def made_up(_: TrialRuns, ask: Ask) -> MethodTrial:
        column = ["vision", "llm", "model"].index(ask.part)
        loss = LOSSES[ask.name][column] if ask.name in LOSSES else together
        if loss is None:
            return MethodTrial(ask.name, ask.round, 4, part=ask.part, failure="it cannot be")
        parts = {"a": 0.4 * loss, "b": 0.6 * loss}
        return MethodTrial(ask.name, ask.round, 4, ask.part, loss, 0.1, {"answer": loss}, parts)

    monkeypatch.setattr(TrialRuns, "run", made_up)
    asked = recipe({**ROTATED, "rules": [{"solver": "rtn"}]}, SMOOTHED, where=(LLM, TOWER))
    record = pq.quantize(tiny("qwen2_vl"), asked, tmp_path / "out", data).record
    assert record.choice is not None
    whole = [trial for trial in record.choice.trials if trial.part == "model"]
    assert [trial.name for trial in whole] == ["vision: rotated, llm: smoothed", "smoothed"]
    assert record.choice.chosen == chosen
    if together == 2.0:
        assert "together its held-out loss is 2, 0.5" in record.choice.why["model"]
    table = choice_table(record.choice)
    assert [str(cell) for cell in table.columns[-1].cells].count("chosen") == (
        3 if together == 2.0 else 1
    )


def test_one_alternative_for_both_parts_is_not_tried_again() -> None:
    asked = recipe(ROTATED, SMOOTHED, where=(LLM, TOWER))
    trials = [
        MethodTrial(name, 0, 4, part, loss)
        for name, *losses in (("rotated", 1.0, 1.0), ("smoothed", 2.0, 2.0))
        for part, loss in zip(("vision", "llm"), losses, strict=True)
    ]
    chosen = {"vision": "rotated", "llm": "rotated"}
    assert one_for_all(asked, chosen, ["rotated", "smoothed"], trials) is None
    mixed = {"vision": "smoothed", "llm": "rotated"}
    assert one_for_all(asked, mixed, ["rotated", "smoothed"], trials) == "rotated"


@pytest.mark.slow
def test_a_choice_in_little_memory_is_the_same(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds; states wait on disk, no logits are kept, one unit at a time has weights."""
    folder, asked = tiny("qwen2_vl", llm_blocks=6), recipe(ROTATED, SMOOTHED)
    monkeypatch.setattr(choose_method, "CLEAR_ERRORS", 1e9)
    whole = pq.quantize(folder, asked, tmp_path / "whole", data).record.choice
    monkeypatch.setattr(prepare, "placements", lambda *given: placements(*given)[-1:])
    monkeypatch.setattr(method_trials, "MOST_LOGITS", 0)
    loaded: Counter[str] = Counter()
    most: list[int] = []
    load = StreamedModel.loaded

    @contextlib.contextmanager
    def counted(model: StreamedModel, names: Sequence[str]) -> Iterator[None]:
        units = [name for name in names if ".layers." in name or ".blocks." in name]
        loaded.update(units)
        most.append(len(+loaded))
        with load(model, names):
            yield
        loaded.subtract(units)

    monkeypatch.setattr(StreamedModel, "loaded", counted)
    lean = pq.quantize(folder, asked, tmp_path / "lean", data).record.choice
    assert max(most) == 1
    assert whole is not None
    assert lean is not None
    timeless = [[replace(t, seconds=0.0) for t in one.trials] for one in (whole, lean)]
    assert timeless[0] == timeless[1]
    assert [t.round for t in whole.trials] == [0, 0, 1, 1]
    assert not list((tmp_path / "lean").rglob("states*"))


def test_a_budget_that_no_trial_keeps_is_told(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any trial; and with what it says is needed, the choice is made."""
    # What a long process holds by then is another matter, but never less than it does hold.
    held = max(2**30, resident_bytes())
    for module in (prepare, choose_method):
        monkeypatch.setattr(module, "resident_bytes", lambda: held)
    folder, asked, out = tiny("qwen2_vl"), recipe(ROTATED, SMOOTHED), tmp_path / "o"
    with pytest.raises(BudgetError, match=r"too small to choose among rotated, smoothed") as told:
        pq.quantize(folder, asked, out, data, memory_budget=held + 2**27)
    needed = told.value.needed
    assert enough_gib(needed) in str(told.value.remedy)
    assert json.loads((out / "prismquant/choice/trials.json").read_text())["trials"] == []
    choice = pq.quantize(folder, asked, out, data, memory_budget=needed, resume=True).record.choice
    assert choice is not None
    assert all(trial.loss is not None for trial in choice.trials)


def test_an_alternative_that_lacks_memory_has_not_failed(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the run; what is tried before is kept, and it is tried again with more."""
    folder, asked, out = tiny("qwen2_vl"), recipe(ROTATED, SMOOTHED), tmp_path / "o"
    forecast = method_trials.forecast_memory
    plenty = 2**36

    def dear(plan: Plan, *given: Any, **named: Any) -> Any:
        if plan.edges:
            raise BudgetError("a memory budget is too small", needed=plenty + 1)
        return forecast(plan, *given, **named)

    monkeypatch.setattr(method_trials, "forecast_memory", dear)
    with pytest.raises(BudgetError, match=r"64\.\d\d GiB are needed for all of them") as told:
        pq.quantize(folder, asked, out, data, memory_budget=plenty)
    assert "smoothed needs" in told.value.what
    assert "rotated needs" not in told.value.what
    assert "take a recipe without smoothed" in str(told.value.remedy)
    # What no forecast has seen.
    monkeypatch.setattr(TrialRuns, "require_memory", lambda *_: None)
    with pytest.raises(BudgetError):
        pq.quantize(folder, asked, out, data, memory_budget=plenty, resume=True)
    kept = json.loads((out / "prismquant/choice/trials.json").read_text())["trials"]
    assert [(trial["name"], trial["failure"]) for trial in kept] == [("rotated", "")]
    monkeypatch.undo()
    choice = pq.quantize(folder, asked, out, data, resume=True).record.choice
    assert choice is not None
    assert {trial.name for trial in choice.trials} == {"rotated", "smoothed"}
    assert all(trial.loss is not None for trial in choice.trials)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (NumericsError("a pivot is not positive", where="x", remedy="on_failure: rtn"), "on_f"),
        (PlanError("it cannot be"), "take a recipe with another method"),
    ],
)
def test_where_all_fail_the_remedy_is_that_of_the_failures(
    tiny: Callable[..., Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: PrismQuantError,
    remedy: str,
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(TrialRuns, "_sums", fail)
    with pytest.raises(PlanError, match="all alternatives of the recipe failed") as told:
        pq.quantize(tiny("qwen2_vl"), recipe(ROTATED, SMOOTHED), tmp_path / "o", data)
    assert str(told.value.remedy).startswith(remedy)


@pytest.mark.slow
def test_several_ranks_choose_what_one_does(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """The samples held out are dealt, too: a rank may have none of a kind."""
    folder, asked = tiny("qwen2_vl"), recipe(ROTATED, SMOOTHED).with_calibration(batch_size=2)
    one = pq.quantize(folder, asked, tmp_path / "one", data).record.choice
    (tmp_path / "recipe.yaml").write_text(asked.to_yaml())
    out = tmp_path / "several"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line += ["-m", "prismquant", "quantize", str(folder), "--calib", str(data)]
    line += ["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=500, env=os.environ)
    assert done.returncode == 0, done.stderr
    record = RunDirectory(out).load()
    assert one is not None
    assert record.choice is not None
    assert record.environment["ranks"] == "2"
    assert (record.choice.chosen, record.choice.held_out) == (one.chosen, one.held_out)
    for own, other in zip(record.choice.trials, one.trials, strict=True):
        assert (own.name, own.round, own.samples) == (other.name, other.round, other.samples)
        assert own.parts == pytest.approx(other.parts, rel=1e-3)
