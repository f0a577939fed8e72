"""A choice of method: the better alternative wins, the same twice, and goes on after a break."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import prismquant as pq
from prismquant.data import read_samples
from prismquant.engine.setup import Silent
from prismquant.errors import DataError, PlanError, RecipeError, StorageError
from prismquant.models.bind import bind
from prismquant.models.outliers import add_outliers
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.presets import AUTOMATIC
from prismquant.recipe.schema import load_recipe, parse_recipe
from prismquant.report.method_choices import choice_table
from prismquant.run.method_choice import MethodTrial
from prismquant.run.record import RunRecord
from prismquant.search.choose_method import leads_clearly
from prismquant.search.held_out import ENOUGH_TEXT, FEWEST, hold_out
from prismquant.search.trial_blocks import spread_pairs, trial_recipes
from prismquant.storage import file_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from prismquant.recipe.schema import Recipe

_LLM = {"modality": "llm", "role": ["attn", "mlp"]}
SMOOTH: dict[str, Any] = {"name": "smoothed", "transforms": [{"name": "smoothquant"}]}
PLAIN: dict[str, Any] = {"name": "plain"}
IMPOSSIBLE: dict[str, Any] = {
    "name": "impossible",
    "transforms": [{"name": "rotation", "match": {"modality": "llm"}}] * 2,
}


def recipe(*alternatives: dict[str, Any], name: str = "mine") -> Recipe:
    rule = {
        "match": _LLM,
        "weights": "int8-channel",
        "activations": "int8-tensor",
        "weight_range": "minmax",
    }
    content = {"name": name, "rules": [rule], "choose": list(alternatives)}
    return parse_recipe(content, source="test")


class Listening(Silent):
    """Keeps remarks, and breaks off after so many trials."""

    def __init__(self, most: int | None = None) -> None:
        self.lines: list[str] = []
        self.most = most

    @property
    def tried(self) -> list[str]:
        return [line.split()[1] for line in self.lines if line.startswith("tried")]

    def remark(self, line: str) -> None:
        self.lines.append(line)

    def begin(self, steps: int) -> None:
        if self.most is not None and len(self.tried) >= self.most:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.samples(tmp_path_factory.mktemp("choice"), count=18)


@pytest.fixture(scope="module")
def spiky(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with activation outliers, which one scale for a whole input cannot hold."""
    folder = tmp_path_factory.mktemp("spiky") / "model"
    add_outliers(tiny("qwen2_vl"), folder, factor=256.0, channels=2, modality="llm")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def finished(spiky: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    pq.quantize(spiky, recipe(PLAIN, SMOOTH), out, data)
    return out


def test_the_alternative_that_copes_with_outliers_wins(finished: Path) -> None:
    record = RunRecord.from_dict(json.loads((finished / "prismquant/record.json").read_text()))
    assert record.choice is not None
    assert record.choice.chosen == {"model": "smoothed"}
    last = max(trial.round for trial in record.choice.trials)
    losses = {t.name: t.loss for t in record.choice.trials if t.round == last}
    assert losses["smoothed"] is not None
    assert losses["plain"] is not None
    assert losses["smoothed"] < losses["plain"]
    assert not {*record.choice.held_out} & {*record.choice.seen}
    assert len(record.choice.held_out) == 18 // 3
    assert "below that of plain" in record.choice.why["model"]
    assert RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_the_table_of_a_choice_has_every_trial(finished: Path) -> None:
    record = RunRecord.from_dict(json.loads((finished / "prismquant/record.json").read_text()))
    assert record.choice is not None
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(choice_table(record.choice))
    text = console.export_text()
    assert text.startswith("mine: smoothed was chosen, its held-out loss is ")
    assert text.count("chosen │") == 1
    for name in ("plain", "smoothed"):
        assert text.count(f"│ {name} ") == sum(t.name == name for t in record.choice.trials)


def test_the_order_of_alternatives_does_not_matter(
    spiky: Path, data: Path, tmp_path: Path, finished: Path
) -> None:
    out = tmp_path / "out"
    found = pq.quantize(spiky, recipe(SMOOTH, PLAIN), out, data)
    assert found.record.choice is not None
    assert found.record.choice.chosen == {"model": "smoothed"}
    assert digests(out) == digests(finished)


def test_the_result_is_that_of_the_ordinary_recipe(
    spiky: Path, data: Path, tmp_path: Path, finished: Path
) -> None:
    out = tmp_path / "out"
    pq.quantize(spiky, finished / "prismquant/recipe.yaml", out, data)
    assert digests(out) == digests(finished)
    assert not load_recipe(finished / "prismquant/recipe.yaml").choose
    plans = [(at / "prismquant/plan.json").read_text() for at in (out, finished)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("most", [0, 1, 2])
@pytest.mark.slow
def test_a_choice_that_is_cut_off_goes_on(
    spiky: Path, data: Path, tmp_path: Path, finished: Path, most: int
) -> None:
    out, asked = tmp_path / "out", recipe(PLAIN, SMOOTH)
    first, second = Listening(most), Listening()
    with pytest.raises(KeyboardInterrupt):
        pq.quantize(spiky, asked, out, data, reporter=first)
    found = pq.quantize(spiky, asked, out, data, reporter=second, resume=True)
    whole = RunRecord.from_dict(json.loads((finished / "prismquant/record.json").read_text()))
    assert found.record.choice is not None
    assert whole.choice is not None
    assert first.tried + second.tried == [trial.name for trial in whole.choice.trials]
    timeless = [
        replace(choice, trials=tuple(replace(t, seconds=0.0) for t in choice.trials))
        for choice in (found.record.choice, whole.choice)
    ]
    assert timeless[0] == timeless[1]
    assert digests(out) == digests(finished)


def test_a_finished_run_is_resumed_without_any_trial(
    spiky: Path, data: Path, tmp_path: Path
) -> None:
    out, asked, again = tmp_path / "out", recipe(PLAIN, SMOOTH), Listening()
    pq.quantize(spiky, asked, out, data)
    before = digests(out)
    result = pq.quantize(spiky, asked, out, data, reporter=again, resume=True)
    assert result.record.finished
    assert again.tried == []
    assert digests(out) == before


def test_another_choice_is_not_gone_on_with(spiky: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pq.quantize(spiky, recipe(PLAIN, SMOOTH), out, data, reporter=Listening(1))
    other = recipe(PLAIN, {"name": "corrected", "rules": [{"correction": "auto"}]})
    with pytest.raises(StorageError, match="the earlier choice of a method differs"):
        pq.quantize(spiky, other, out, data, resume=True)


def test_an_alternative_that_does_not_fit_is_left_out_and_told(
    spiky: Path, data: Path, tmp_path: Path
) -> None:
    listening = Listening()
    asked = recipe(IMPOSSIBLE, PLAIN)
    result = pq.quantize(spiky, asked, tmp_path / "out", data, reporter=listening)
    assert result.record.choice is not None
    assert result.record.choice.told == "plain"
    failed = [t for t in result.record.choice.trials if t.failure]
    assert [t.name for t in failed] == ["impossible"]
    assert "rotated twice" in failed[0].failure
    assert any(line.startswith("impossible is left out") for line in listening.lines)


def test_a_family_that_cannot_be_rotated_is_quantized_in_another_way(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Gemma 2 normalizes its residual stream on both sides; that is known before any trial."""
    (tmp_path / "book.txt").write_text("what is the colour of the red circle ? it is blue . " * 20)
    asked = recipe(PLAIN, {"name": "turned", "transforms": IMPOSSIBLE["transforms"][:1]}, SMOOTH)
    given = tiny("gemma2"), asked, tmp_path / "out", tmp_path / "book.txt"
    choice = pq.quantize(*given, seq_length=8).record.choice
    assert choice is not None
    failed = [trial for trial in choice.trials if trial.failure]
    assert [trial.name for trial in failed] == ["turned"]
    assert "describes no residual stream" in failed[0].failure
    assert choice.told != "turned"


def test_the_table_tells_the_first_finding_of_what_was_not_tried(finished: Path) -> None:
    record = RunRecord.from_dict(json.loads((finished / "prismquant/record.json").read_text()))
    assert record.choice is not None
    findings = [f"layers.*.{name}: rotated twice (8 layers)" for name in "qkvo"]
    failed = MethodTrial("impossible", 0, 0, failure="\n".join(findings))
    other = replace(failed, failure=f"{findings[0]}\nlayers.*.q: too wide")
    assert other.told_failure == f"{findings[0]}; and 1 more"
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(choice_table(replace(record.choice, trials=(failed, *record.choice.trials))))
    lines = [line for line in console.export_text().splitlines() if "impossible" in line]
    cells = [cell.strip() for cell in lines[0].strip("│").split("│")]
    assert cells[1:3] == ["not tried", "-"]
    assert cells[-1] == f"{findings[0]}; and 3 more like it"
    assert len(lines) == 1


def test_where_none_fits_all_reasons_are_told(spiky: Path, data: Path, tmp_path: Path) -> None:
    asked = recipe(IMPOSSIBLE, IMPOSSIBLE | {"name": "another"})
    with pytest.raises(PlanError, match=r"(?s)impossible: .*rotated twice.*another: "):
        pq.quantize(spiky, asked, tmp_path / "out", data)
    assert not (tmp_path / "out").exists()


def test_it_asks_for_samples_before_any_work(spiky: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="chooses among plain, smoothed by what they lose"):
        pq.quantize(spiky, recipe(PLAIN, SMOOTH), out)
    with pytest.raises(DataError, match=r"takes 8 calibration samples.*there are 7"):
        pq.quantize(spiky, recipe(PLAIN, SMOOTH), out, data, samples=7)
    assert not out.exists()


def test_a_folder_in_use_is_refused_before_any_trial(
    spiky: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    listening = Listening()
    with pytest.raises(StorageError, match="not empty"):
        pq.quantize(spiky, recipe(PLAIN, SMOOTH), tmp_path, data, reporter=listening)
    assert listening.lines == []


@pytest.mark.parametrize("count", [8, 9, 18])
def test_samples_are_split_evenly_over_kinds(data: Path, count: int) -> None:
    samples = read_samples(data)[:count]
    parts = hold_out(samples, 0)
    assert len(parts.held_out) == max(FEWEST, count // 3)
    assert {s.kind for s in parts.held_out} == {"text", "image", "video"}
    assert sorted(s.id for s in (*parts.held_out, *parts.rest)) == sorted(s.id for s in samples)
    assert hold_out(samples, 0) == parts


@pytest.mark.parametrize(
    ("other", "clear"),
    [((2.0, 2.1, 1.9), True), ((1.0, 5.0, 0.0), False), ((1.05, 1.06, 1.05), False)],
)
def test_a_clear_lead_ends_the_choice(other: Sequence[float], clear: bool) -> None:
    """It is large beside its noise, and beside the loss itself."""

    def trial(name: str, parts: Sequence[float]) -> MethodTrial:
        named = {str(number): part for number, part in enumerate(parts)}
        return MethodTrial(name, 0, 8, loss=math.fsum(parts), error=0.1, parts=named)

    assert leads_clearly([trial("a", (1.0, 1.0, 1.0)), trial("b", other)]) is clear
    assert not leads_clearly([trial("a", (1.0, 1.0, 1.0))])


def test_short_samples_are_held_out_up_to_a_third(tmp_path: Path) -> None:
    def split(count: int, words: int) -> int:
        turns = [{"role": "user", "content": "word " * words}]
        lines = [json.dumps({"id": str(n), "messages": turns}) for n in range(count)]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        return len(hold_out(read_samples(tmp_path / "data.jsonl"), 0).held_out)

    assert split(64, 10) == 21
    assert split(64, 1000) == 8
    assert split(64, ENOUGH_TEXT // 60 + 1) == 12
    assert split(10, 1) == FEWEST


@given(st.integers(1, 120), st.floats(0.05, 1.0), st.integers(1, 12))
def test_pairs_of_blocks_are_spread_over_a_tower(count: int, part: float, fewest: int) -> None:
    """Enough blocks, each in range and beside another one, with gaps that differ by little."""
    found = spread_pairs(count, part, fewest)
    assert list(found) == sorted({*found})
    assert {*found} <= set(range(count))
    assert len(found) >= min(count, fewest, part * count)
    assert all(n - 1 in found or n + 1 in found for n in found if count > 1)
    gaps = [b - a for a, b in pairwise(found[::2])] if len(found) < count else []
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_a_trial_quantizes_the_same_blocks_in_each_way(tiny: Callable[..., Path]) -> None:
    bound, loaded = bind(tiny("qwen2_vl")), load_recipe("auto-w4a8")
    whole = {one.name: loaded.chosen(one.name) for one in loaded.choose}
    found, complete = trial_recipes(whole, bound, 0.1, 2)
    blocks = [step.name for step in bound.steps if step.kind == "block" and "language" in step.name]
    if len(blocks) <= 2:
        assert complete
        return
    quantized = [{r.site.name for r in make_plan(one, bound).quantized} for one in found.values()]
    assert all(one == quantized[0] for one in quantized)
    assert (
        len({name for name in blocks if any(q.startswith(f"{name}.") for q in quantized[0])}) == 2
    )


def test_alternatives_about_single_blocks_are_tried_on_all_of_them(
    tiny: Callable[..., Path],
) -> None:
    bound = bind(tiny("qwen2_vl"))
    name = next(step.name for step in reversed(bound.steps) if step.kind == "block")
    last = {"name": "last", "transforms": [{"name": "smoothquant", "match": {"name": f"{name}.*"}}]}
    asked = recipe(PLAIN, last)
    whole = {one.name: asked.chosen(one.name) for one in asked.choose}
    found, complete = trial_recipes(whole, bound, 0.01, 1)
    assert complete
    assert {x: len(make_plan(one, bound).quantized) for x, one in found.items()}.keys() == {
        "plain",
        "last",
    }
    assert all(make_plan(one, bound).quantized for one in found.values())


def test_a_model_of_text_chooses_on_windows(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """All of their tokens count as answers; that logits are bounded behind the head is told."""
    (tmp_path / "book.txt").write_text("what is the colour of the red circle ? it is blue . " * 20)
    listening, asked = Listening(), recipe(PLAIN, SMOOTH)
    given = tiny("gemma2"), asked, tmp_path / "out", tmp_path / "book.txt"
    choice = pq.quantize(*given, seq_length=8, reporter=listening).record.choice
    assert choice is not None
    assert all(trial.kl is not None and [*trial.kl] == ["answer"] for trial in choice.trials)
    assert any("bounds what its head puts out" in line for line in listening.lines)


@pytest.mark.parametrize("name", AUTOMATIC)
def test_every_automatic_preset_fits_every_family(name: str, tiny_folder: Path) -> None:
    """Each alternative alone, and what it adds stands in what inspect says."""
    loaded, bound = load_recipe(name), bind(tiny_folder)
    plans = [make_plan(loaded.chosen(one.name), bound) for one in loaded.choose]
    formats = [[row.config.weights for row in plan.rows] for plan in plans]
    assert all(one == formats[0] for one in formats)
    told = pq.inspect(tiny_folder, name)
    assert told.rows == plans[0].rows
    assert any("leaves a choice, which needs calibration data" in line for line in told.remarks)
    assert all(any(one.name in line for line in told.remarks) for one in loaded.choose)


@pytest.mark.parametrize("name", AUTOMATIC)
def test_what_a_call_adds_comes_after_what_an_alternative_says(name: str) -> None:
    loaded = load_recipe(name).with_rules({"solver": "rtn"})
    for one in loaded.choose:
        assert loaded.chosen(one.name).rules[-1].solver == "rtn"
    assert load_recipe(parse_recipe(loaded.to_dict(), source="again")) == loaded


def test_a_choice_is_checked_like_the_rest_of_a_recipe(tiny: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="one alternative leaves no choice"):
        recipe(PLAIN)
    with pytest.raises(RecipeError, match="two alternatives have one name"):
        recipe(PLAIN, PLAIN)
    with pytest.raises(RecipeError, match="did you mean 'transforms'"):
        recipe(PLAIN, {"name": "odd", "transform": []})
    with pytest.raises(PlanError, match="leaves a choice among plain, smoothed"):
        make_plan(recipe(PLAIN, SMOOTH), bind(tiny("qwen2_vl")))
