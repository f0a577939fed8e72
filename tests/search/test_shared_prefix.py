"""Trials that share what they run alike lose, bit for bit, what trials made apart lose."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm

import prismquant as pq
from prismquant.engine.walk import Unit
from prismquant.models.bind import bind
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.schema import parse_recipe
from prismquant.search import choose_method
from prismquant.search.shared_prefix import SharedPrefix, touched_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prismquant.run.method_choice import MethodChoice

LLM = {"modality": "llm", "role": ["attn", "mlp"]}
TOWER = {"modality": ["vision", "projector"], "role": ["attn", "mlp"]}
ALTERNATIVES: list[dict[str, Any]] = [
    {"name": "plain", "rules": [{"correction": "auto"}]},
    {"name": "rotated", "transforms": [{"name": "rotation", "match": {"modality": "llm"}}]},
    {"name": "smoothed", "transforms": [{"name": "smoothquant"}]},
    {"name": "awq", "rules": [{"correction": "auto"}], "transforms": [{"name": "awq"}]},
]


def recipe_of(where: list[dict[str, Any]], order: list[int]) -> Any:
    rules = [{"match": match, "weights": "int4-channel"} for match in where]
    choose = [ALTERNATIVES[number] for number in order]
    return parse_recipe({"name": "mine", "rules": rules, "choose": choose}, source="test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.samples(tmp_path_factory.mktemp("prefix"), count=12)


@pytest.mark.parametrize(
    ("family", "where", "order"),
    [
        pytest.param("qwen2_vl", [LLM], [0, 1, 2, 3], marks=pytest.mark.slow),
        pytest.param("qwen2_vl", [LLM], [1, 3, 0], marks=pytest.mark.slow),
        pytest.param("qwen3_vl", [LLM, TOWER], [0, 1, 3], marks=pytest.mark.slow),
        pytest.param("video_llama_3", [LLM], [2, 1, 0], marks=pytest.mark.slow),
        ("llama", [LLM], [1, 0, 3]),
    ],
)
def test_trials_that_share_lose_what_they_lose_apart(
    tiny: Callable[..., Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    where: list[dict[str, Any]],
    order: list[int],
) -> None:
    """Two rounds, some blocks in the first; rotated or not, tried first or last."""
    blocks = {} if family == "llama" else {"llm_blocks": 7}
    folder, asked = tiny(family, **blocks), recipe_of(where, order)
    given: dict[str, Any] = {}
    if family == "llama":
        data = tmp_path / "book.txt"
        data.write_text("what is the colour of the red circle ? it is blue . " * 30)
        given["seq_length"] = 8
    monkeypatch.setattr(choose_method, "CLEAR_ERRORS", 1e9)
    forwards: list[Counter[str]] = []
    loaded = Unit.loaded

    @contextlib.contextmanager
    def counted(unit: Unit) -> Iterator[None]:
        forwards[-1][unit.name] += 1
        with loaded(unit):
            yield

    monkeypatch.setattr(Unit, "loaded", counted)

    def choice(out: str) -> MethodChoice:
        forwards.append(Counter())
        found = pq.quantize(folder, asked, tmp_path / out, data, **given).record.choice
        assert found is not None
        return replace(found, trials=tuple(replace(t, seconds=0.0) for t in found.trials))

    together = choice("together")
    monkeypatch.setattr(SharedPrefix, "look", lambda *_: None)
    apart = choice("apart")
    assert together == apart
    assert all(trial.loss is not None for trial in together.trials)
    first = bind(folder).steps[0].name
    if family != "llama":
        assert forwards[0][first] < forwards[1][first]
    assert forwards[0].total() <= forwards[1].total()


def test_texts_alone_do_not_pass_the_vision_tower(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "what colour ?"}, {"role": "assistant", "content": "blue"}]
    rows = [json.dumps({"id": str(number), "messages": turns}) for number in range(9)]
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(rows))
    folder, asked = tiny("qwen2_vl"), recipe_of([LLM], [1, 0, 3])
    losses = []
    for out in ("together", "apart"):
        choice = pq.quantize(folder, asked, tmp_path / out, data).record.choice
        assert choice is not None
        losses.append({trial.name: trial.parts for trial in choice.trials})
        monkeypatch.setattr(SharedPrefix, "look", lambda *_: None)
    assert losses[0] == losses[1]
    assert [*losses[0]] == ["rotated", "plain", "awq"]


def test_a_budget_leaves_no_room_for_states_between_trials(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: Unit) -> Any:
        raise AssertionError("states are kept that no forecast has seen")

    monkeypatch.setattr(Unit, "start", never)
    asked = recipe_of([LLM], [0, 1])
    choice = pq.quantize(
        tiny("qwen2_vl"), asked, tmp_path / "o", data, memory_budget=2**36
    ).record.choice
    assert choice is not None


def test_a_plan_touches_what_it_changes(tiny: Callable[..., Path]) -> None:
    bound, asked = bind(tiny("qwen2_vl")), recipe_of([LLM], [0, 1, 2, 3])
    touched = {
        one.name: touched_steps(make_plan(asked.chosen(one.name), bound), bound)
        for one in asked.choose
    }
    language = {s.index for s in bound.steps if s.modality == "llm" and s.kind == "block"}
    projectors = {step.index for step in bound.steps if step.modality == "projector"}
    assert touched["plain"] == touched["smoothed"] == language
    assert touched["rotated"] >= {-1, *language, *projectors}
    assert not touched["rotated"] & {s.index for s in bound.steps if s.modality == "vision"}
