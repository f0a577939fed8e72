"""The run directory: what it refuses, what it keeps, and that a resumed run ends the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch

import prismquant as pq
from prismquant.diagnostics.edge_diagnostics import AWQChoice, EdgeDiagnostics
from prismquant.diagnostics.kv_diagnostics import KeyBias, KVDiagnostics
from prismquant.diagnostics.solver_diagnostics import (
    CorrectionDiagnostics,
    Failure,
    GPTQDiagnostics,
    RTNDiagnostics,
    StaticInputRange,
)
from prismquant.diagnostics.step_record import EdgeRecord, LayerRecord, StepRecord
from prismquant.diagnostics.translation import TranslatedSetting, Translation
from prismquant.diagnostics.tuning_diagnostics import TuningDiagnostics
from prismquant.engine.setup import Silent
from prismquant.errors import StorageError
from prismquant.export.compressed_tensors.writer import CheckpointWriter
from prismquant.models.bind import bind
from prismquant.opening import read_json
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import Plan
from prismquant.recipe.schema import Recipe, load_recipe
from prismquant.run.directory import RunDirectory
from prismquant.run.identity import FileStamp, Identity
from prismquant.run.record import RECORD_VERSION, RestartRecord, RunRecord
from prismquant.shards import ShardReader
from prismquant.statistics.tokens import Tokens
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IDENTITY = Identity(
    plan="p",
    files={"model.safetensors": FileStamp(10, 5, 3, "m")},
    samples=("a", "b", "c"),
    inputs="d",
    arithmetic="cpu torch.float32",
    versions={"prismquant": "0.1.0", "torch": "2"},
)
RECORD = RunRecord(
    identity=IDENTITY,
    model="source",
    calibration="calibration.jsonl",
    samples={"text": 1, "image": 2},
    environment={"torch": "2"},
)
SHARDS = ("a.safetensors", "b.safetensors", "c.safetensors")
LEFTOVER = ".model-00001.0123456789abcdef.prismquant-tmp"
STEP = StepRecord(
    "model.layers.0",
    "model-00001-of-00002.safetensors",
    1.5,
    (
        LayerRecord(
            "model.layers.0.up",
            0.25,
            0.5,
            GPTQDiagnostics(0.01, 1, "float32", "pivot", "none", "torch", 0, 0.5, 0.25, 0),
            input_range=StaticInputRange(-1.5, 2.5, {"text": (-1.5, 0.5)}),
            correction=CorrectionDiagnostics(0.5, 0.25),
            split_columns=(3,),
            tuning=TuningDiagnostics("autoround", 0.5),
        ),
        LayerRecord(
            "model.layers.0.down", 1.5, 2.5, RTNDiagnostics(), failure=Failure("no token", "gptq")
        ),
    ),
    (
        EdgeRecord(
            "model.layers.0.norm",
            ("model.layers.0.up",),
            "awq",
            EdgeDiagnostics(AWQChoice(0.5, True), "no gain"),
        ),
    ),
    KVDiagnostics(Tokens(text=3), 1.5, 2.5, KeyBias(0.5, 0.25, 0.75)),
)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("w8a8").with_rules({"solver": "rtn"})


@pytest.fixture(scope="module")
def plan(tiny: Callable[..., Path], recipe: Recipe) -> Plan:
    return make_plan(recipe, bind(tiny("qwen2_vl")))


def record_text(**changes: Any) -> str:
    """A run record with some entries replaced or added."""
    return json.dumps(RECORD.to_dict() | changes)


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything a reader of the checkpoint sees; what says when and how long is left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "record.json"
    }


def assert_unfinished_and_clean(folder: Path) -> None:
    """No temporary file, no config.json, and every step that is claimed has its whole shard."""
    names = [path.name for path in folder.rglob("*")]
    assert not [name for name in names if name.endswith("tmp")]
    assert "config.json" not in names
    record = RunDirectory(folder).load()
    assert not record.finished
    for step in record.steps:
        ShardReader(folder, files=[step.shard])


# The directory by itself


def test_a_record_survives_being_written(tmp_path: Path) -> None:
    record = replace(
        RECORD,
        steps=(STEP, replace(STEP, name="other", layers=(), size=12, sha256="00")),
        finished=True,
        restarts=(RestartRecord("2026-01-01T00:00:00Z", 1, ("damaged", "threads")),),
        files={"config.json": "00"},
        translation=Translation(
            "toy", "toy.yaml", changed=(TranslatedSetting("a.b", "[1]", "rules[0]", "why", "near"),)
        ),
    )
    directory = RunDirectory(tmp_path)
    directory.save(record)
    assert directory.load() == record
    assert RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert read_json(directory.record_path)["version"] == RECORD_VERSION


def test_a_new_run_writes_its_provenance_first(tmp_path: Path, plan: Plan, recipe: Recipe) -> None:
    out = tmp_path / "deep" / "out"
    assert RunDirectory(out).begin(RECORD, plan, recipe, resume=False) == RECORD
    assert load_recipe(out / "prismquant" / "recipe.yaml") == recipe
    assert read_json(out / "prismquant" / "plan.json") == json.loads(json.dumps(plan.to_dict()))
    assert RunDirectory(out).load() == RECORD


def test_an_empty_folder_is_taken(tmp_path: Path, plan: Plan, recipe: Recipe) -> None:
    RunDirectory(tmp_path).begin(RECORD, plan, recipe, resume=False)
    assert RunDirectory(tmp_path).load() == RECORD


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "name", ["notes.txt", "deep/model.safetensors", ".hidden", ".notes.tmp", "prismquant/plan.json"]
)
def test_a_folder_that_holds_files_is_refused_and_left_as_it_is(
    tmp_path: Path, plan: Plan, recipe: Recipe, name: str, resume: bool
) -> None:
    """Also with --resume: there is nothing to go on with."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(StorageError, match=f"is not empty: it holds {name}") as caught:
        RunDirectory(tmp_path).begin(RECORD, plan, recipe, resume=resume)
    assert caught.value.where == str(tmp_path)
    assert "--resume" not in str(caught.value.remedy)
    assert files_of(tmp_path) == {name: b"mine"}


def test_a_file_in_the_place_of_the_folder_is_refused(
    tmp_path: Path, plan: Plan, recipe: Recipe
) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StorageError, match="exists"):
        RunDirectory(tmp_path / "out").begin(RECORD, plan, recipe, resume=False)


def test_an_earlier_run_is_not_overwritten_without_resume(
    tmp_path: Path, plan: Plan, recipe: Recipe
) -> None:
    begun(tmp_path, plan, recipe, "a.safetensors")
    with pytest.raises(StorageError, match="not empty") as caught:
        RunDirectory(tmp_path).begin(RECORD, plan, recipe, resume=False)
    assert "--resume" in str(caught.value.remedy)


def test_a_run_that_finished_no_step_does_not_block_the_next(
    tmp_path: Path, plan: Plan, recipe: Recipe
) -> None:
    """Of another recipe, say, as the first one took too much memory; what waited on disk goes."""
    begun(tmp_path, plan, recipe)
    with RunDirectory(tmp_path).activation_store(0, "disk", "units") as states:
        held = states.keep(torch.ones(1 << 16))
        (tmp_path / "prismquant" / LEFTOVER).write_text("half")
        changed = replace(RECORD, identity=replace(IDENTITY, plan="q"))
        with pytest.raises(StorageError, match="differs"):
            RunDirectory(tmp_path).begin(changed, plan, recipe, resume=True)
        with RunDirectory(tmp_path).claimed(resume=False):
            RunDirectory(tmp_path).begin(changed, plan, recipe, resume=False)
    del held
    assert RunDirectory(tmp_path).load() == changed
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        *("plan.json", "recipe.yaml", "record.json")
    ]
    (tmp_path / "model.safetensors").write_text("not ours")
    with pytest.raises(StorageError, match=r"not empty: it holds model\.safetensors"):
        RunDirectory(tmp_path).require_free(resume=False)


def begun(folder: Path, plan: Plan, recipe: Recipe, *shards: str) -> RunRecord:
    """A run with a finished step for each shard."""
    directory = RunDirectory(folder)
    record = directory.begin(RECORD, plan, recipe, resume=False)
    for number, shard in enumerate(shards):
        write_tensors(folder / shard, {"w": torch.full((number + 1,), float(number))})
        record = directory.add(record, replace(STEP, name=f"step {number}", shard=shard), 7)
    return record


def test_a_step_is_claimed_with_its_checksum(tmp_path: Path, plan: Plan, recipe: Recipe) -> None:
    record = begun(tmp_path, plan, recipe, "a.safetensors", "b.safetensors")
    assert RunDirectory(tmp_path).load() == record
    for step in record.steps:
        content = (tmp_path / step.shard).read_bytes()
        assert (step.size, step.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (record.seconds, record.peak_memory_bytes) == (3.0, 7)


def test_resuming_goes_on_with_the_earlier_record(
    tmp_path: Path, plan: Plan, recipe: Recipe
) -> None:
    earlier = begun(tmp_path, plan, recipe, STEP.shard)
    leftover = tmp_path / LEFTOVER
    leftover.write_text("a killed process left this")
    again = replace(RECORD, model="moved", environment={"torch": "3"})
    resumed = RunDirectory(tmp_path).begin(again, plan, recipe, resume=True)
    assert replace(resumed, restarts=()) == earlier
    assert [(restart.kept, restart.notes) for restart in resumed.restarts] == [(1, ())]
    assert RunDirectory(tmp_path).load() == resumed
    assert not leftover.exists()


def test_what_may_change_rounding_is_told_and_not_refused(
    tmp_path: Path, plan: Plan, recipe: Recipe
) -> None:
    RunDirectory(tmp_path).begin(
        replace(RECORD, environment={"threads": "1", "cpu": "AVX2"}), plan, recipe, resume=False
    )
    now = replace(RECORD, environment={"threads": "2", "cpu": "AVX2"})
    resumed = RunDirectory(tmp_path).begin(now, plan, recipe, resume=True)
    (note,) = resumed.restarts[0].notes
    assert note.startswith("threads 1 -> 2: sums may be rounded otherwise")


@pytest.mark.parametrize(
    ("had", "now", "told"),
    [([2, 2], 2, None), ([2, 1], 1, "threads 2, 1 -> 1"), ([1, 2, 2, 1], 1, "threads 1, 2, 1 ->")],
)
def test_threads_that_changed_on_the_way_are_told_of(
    tmp_path: Path, plan: Plan, recipe: Recipe, had: list[int], now: int, told: str | None
) -> None:
    """What is carried forward again is computed with one number: that of the last step."""
    directory = RunDirectory(tmp_path)
    record = directory.begin(
        replace(RECORD, environment={"threads": "2"}), plan, recipe, resume=False
    )
    for number, threads in enumerate(had):
        shard = f"{number}.safetensors"
        write_tensors(tmp_path / shard, {"w": torch.ones(1)})
        step = replace(STEP, name=f"step {number}", shard=shard, threads=threads)
        record = directory.add(record, step, 7)
    assert record.threads[-1] == now
    again = replace(RECORD, environment={"threads": str(now)})
    (restart,) = directory.begin(again, plan, recipe, resume=True).restarts
    assert [note.startswith(told or "?") for note in restart.notes] == ([True] if told else [])


@pytest.mark.parametrize("damage", ["is gone", "bytes instead of", "has changed"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_damaged_step_and_those_after_it_are_done_again(
    tmp_path: Path, plan: Plan, recipe: Recipe, number: int, damage: str
) -> None:
    """What was before it is kept; the record says what was found."""
    earlier = begun(tmp_path, plan, recipe, *SHARDS)
    path = tmp_path / SHARDS[number]
    content = path.read_bytes()
    if damage == "is gone":
        path.unlink()
    else:
        whole = damage == "has changed"
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) * whole)
    resumed = RunDirectory(tmp_path).begin(RECORD, plan, recipe, resume=True)
    assert resumed.steps == earlier.steps[:number]
    assert resumed.seconds == 1.5 * number
    assert RunDirectory(tmp_path).load() == resumed
    (note,) = resumed.restarts[0].notes
    assert damage in note
    assert note.startswith(SHARDS[number])
    after = {0: "with the 2 after it", 1: "with the 1 after it", 2: "again"}[number]
    assert note.endswith(after)


def test_a_finished_run_that_was_damaged_is_no_model_until_it_is_whole(
    tmp_path: Path, plan: Plan, recipe: Recipe
) -> None:
    record = begun(tmp_path, plan, recipe, *SHARDS)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    directory = RunDirectory(tmp_path)
    record = directory.finish(record, ["config.json", "tokenizer.json"])
    assert record.files.keys() == {"config.json", "tokenizer.json"}
    assert directory.begin(RECORD, plan, recipe, resume=True) == record
    (tmp_path / "tokenizer.json").write_text("{ }")
    resumed = directory.begin(RECORD, plan, recipe, resume=True)
    assert (resumed.finished, resumed.steps, resumed.files) == (False, record.steps, {})
    assert "tokenizer.json has changed: the last files are" in resumed.restarts[0].notes[0]
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("text", ["{", "", "[]", '{"rows": 3}'])
def test_a_damaged_plan_or_recipe_file_is_written_again(
    tmp_path: Path, plan: Plan, recipe: Recipe, text: str
) -> None:
    begun(tmp_path, plan, recipe)
    whole = files_of(tmp_path)
    (tmp_path / "prismquant" / "plan.json").write_text(text)
    (tmp_path / "prismquant" / "recipe.yaml").write_text("rules: {")
    RunDirectory(tmp_path).begin(RECORD, plan, recipe, resume=True)
    assert files_of(tmp_path) == whole


@pytest.mark.parametrize("left", [[], ["record.json"], ["record.json", "plan.json"]])
def test_a_run_that_was_killed_at_its_very_start_can_be_resumed(
    tmp_path: Path, plan: Plan, recipe: Recipe, left: list[str]
) -> None:
    """Whatever of the first three files was there already."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    RunDirectory(whole).begin(RECORD, plan, recipe, resume=False)
    (out / "prismquant").mkdir(parents=True)
    (out / "prismquant" / LEFTOVER).write_text("{")
    for name in left:
        shutil.copy(whole / "prismquant" / name, out / "prismquant")
    record = RunDirectory(out).begin(RECORD, plan, recipe, resume=True)
    assert replace(record, restarts=()) == RECORD
    assert files_of(out) == files_of(whole)


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "plan": ({"plan": "other"}, "recipe: it gives another plan"),
    "model": (
        {"files": {"model.safetensors": FileStamp(10, 5, 3, "other")}},
        "model: shard model.safetensors has changed",
    ),
    "samples": ({"samples": ("a", "b", "x")}, "calibration: 1 of 3 samples differ"),
    "arithmetic": ({"arithmetic": "cuda"}, "arithmetic: cpu torch.float32 -> cuda"),
    "version": (
        {"versions": {"prismquant": "0.2.0", "torch": "2"}},
        "code version: prismquant 0.1.0 -> 0.2.0",
    ),
}


@pytest.mark.parametrize("key", OTHER)
def test_a_run_of_something_else_is_not_resumed(
    tmp_path: Path, plan: Plan, recipe: Recipe, key: str
) -> None:
    directory = RunDirectory(tmp_path)
    directory.begin(RECORD, plan, recipe, resume=False)
    before = files_of(tmp_path)
    changes, told = OTHER[key]
    other = replace(RECORD, identity=replace(IDENTITY, **changes))
    with pytest.raises(StorageError, match="cannot resume: the earlier run differs") as caught:
        directory.begin(other, plan, recipe, resume=True)
    assert told in caught.value.what
    assert directory.load() == RECORD
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not valid JSON"),
        ("[]", "version None cannot be read"),
        ("{}", "version None cannot be read"),
        ('{"version": 99}', "version 99 cannot be read"),
        ('{"version": 3}', "version 3 cannot be read"),
        ('{"version": true}', "version True cannot be read"),
        (record_text(x=1), "the run record is damaged: x: "),
    ],
)
def test_a_damaged_record_is_an_error(
    tmp_path: Path, plan: Plan, recipe: Recipe, text: str, what: str
) -> None:
    directory = RunDirectory(tmp_path)
    directory.begin(RECORD, plan, recipe, resume=False)
    directory.record_path.write_text(text)
    with pytest.raises(StorageError, match=what) as caught:
        directory.begin(RECORD, plan, recipe, resume=True)
    assert str(directory.record_path) in str(caught.value)
    assert "start again without --resume" in str(caught.value.remedy)


FULL = replace(
    RECORD,
    steps=(STEP,),
    memory={"budget_bytes": 5, "placement": "halted"},
    restarts=(RestartRecord("2026-01-01T00:00:00Z", 1, ("damaged",)),),
    files={"config.json": "00"},
)


def mutations(value: Any) -> Iterator[Any]:
    """A JSON value with one thing in it replaced by one of another type, left out, or added."""
    yield from (other for other in (None, True, 5, 1.5, "x", [], {}, [5], {"a": 5}, {"a": None}))
    if isinstance(value, dict):
        yield value | {"unknown": 1}
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: changed} for changed in mutations(inner))
    if isinstance(value, list):
        for place, inner in enumerate(value):
            yield from ([*value[:place], c, *value[place + 1 :]] for c in mutations(inner))


def holds(whole: Any, part: Any) -> bool:
    """Whether a JSON value is another, but for entries of objects that it lacks."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and holds(whole[key], value) for key, value in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(whole) == len(part) and all(map(holds, whole, part))
    return bool(whole == part) and isinstance(whole, bool) == isinstance(part, bool)


def test_a_record_is_read_exactly_or_refused() -> None:
    """No mutation raises anything but an error that says where, or is read as another value."""
    refused, read = [], 0
    for content in mutations(json.loads(json.dumps(FULL.to_dict()))):
        try:
            record = RunRecord.from_dict(content)
        except StorageError as error:
            refused.append(error.what)
        else:
            assert holds(json.loads(json.dumps(record.to_dict())), content)
            read += 1
    assert len(refused) > 5 * read > 0
    kinds = "the run record is damaged: ", "run record of version"
    assert [what for what in refused if not what.startswith(kinds)] == []


@pytest.mark.parametrize("name", ["../a.safetensors", "/a", "", "a/../../b", "a\0b"])
def test_a_record_claims_no_file_outside_of_its_folder(name: str) -> None:
    for changed in (
        replace(FULL, steps=(replace(STEP, shard=name),)),
        replace(FULL, files={name: "00"}),
    ):
        with pytest.raises(StorageError, match="is no file of the folder"):
            RunRecord.from_dict(changed.to_dict())


INSIDE = ("prismquant/record.json", "prismquant/plan.json", "prismquant/recipe.yaml")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", [*INSIDE, SHARDS[1], ".hidden"])
def test_what_no_run_has_written_is_refused_with_what_to_delete(
    tmp_path: Path, plan: Plan, recipe: Recipe, name: str, kind: str
) -> None:
    """In the place of a file of the run, or beside it; nothing is read through it or deleted."""
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    begun(out, plan, recipe, *SHARDS)
    path = out / name
    theirs.write_bytes(path.read_bytes() if path.exists() else b"theirs")
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(theirs)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    if (name, kind) == (".hidden", "folder"):
        RunDirectory(out).begin(RECORD, plan, recipe, resume=True)
        return
    before = theirs.read_bytes()
    what = {"link": "a link", "pipe": "no regular file", "folder": "a folder"}[kind]
    with (
        pytest.raises(StorageError, match=rf"{name} \({what}\)") as caught,
        RunDirectory(out).claimed(resume=True),
    ):
        pass
    assert "delete it" in str(caught.value.remedy)
    assert os.path.lexists(path)
    assert theirs.read_bytes() == before


def test_provenance_is_that_of_the_run(tmp_path: Path, plan: Plan, recipe: Recipe) -> None:
    """A stranger's recipe and plan, each whole in itself, do not stay in a resumed folder."""
    begun(tmp_path, plan, recipe, *SHARDS)
    whole = files_of(tmp_path)
    (tmp_path / "prismquant" / "recipe.yaml").write_text(load_recipe("w4a16").to_yaml())
    other = json.dumps(plan.to_dict() | {"architecture": "another"})
    (tmp_path / "prismquant" / "plan.json").write_text(other)
    changed = replace(RECORD, identity=replace(IDENTITY, plan="q"))
    with pytest.raises(StorageError) as caught:
        RunDirectory(tmp_path).begin(changed, plan, recipe, resume=True)
    assert "plan.json of the earlier run cannot be read" in caught.value.what
    RunDirectory(tmp_path).begin(RECORD, plan, recipe, resume=True)
    assert files_of(tmp_path) == whole


def test_a_folder_in_the_place_of_a_last_file_is_told_before_any_work(tmp_path: Path) -> None:
    """Other folders do not count as long as they hold nothing."""
    (tmp_path / "lost+found").mkdir()
    RunDirectory(tmp_path).require_free(resume=False)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(StorageError, match=r"it holds config\.json \(a folder\)"):
        RunDirectory(tmp_path).require_free(resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_disk_that_is_too_full_is_told_before_any_work(
    tmp_path: Path, plan: Plan, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """Shards that are there already count when a run is resumed."""
    there = 0
    if resume:
        there = begun(tmp_path, plan, recipe, "a.safetensors").steps[0].size
    free = 5 << 20
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    directory = RunDirectory(tmp_path)
    directory.require_space(free + there)
    with pytest.raises(StorageError, match=r"another 7\.0 MiB, but only 5\.0 MiB are free") as e:
        directory.require_space((7 << 20) + there)
    assert "free space or choose another --out" in str(e.value.remedy)


# Interrupted runs


class StopAt(Silent):
    """Presses Ctrl-C at the n-th thing that the run tells."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def stage(self, step: str, what: str) -> None:
        """Count down, then interrupt."""
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def finish(self, record: StepRecord) -> None:
        """The moment after a step counts as well."""
        self.stage(record.name, "finish")


class Count(Silent):
    """How many moments a run has."""

    def __init__(self) -> None:
        self.moments = 0

    def stage(self, step: str, what: str) -> None:
        """Count."""
        self.moments += 1

    def finish(self, record: StepRecord) -> None:
        """Count."""
        self.moments += 1


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "w4a8-static-all": ("qwen2_vl", "w4a8-static-all", {}),
    "deepstack": ("qwen3_vl", "w4a16-all", {}),
    "float propagation": ("qwen2_5_vl", "w4a8-static-all", {"block_sequential": False}),
    "float inputs, not sequential": (
        "video_llama_3",
        "w4a8-all",
        {"quantized_inputs": False, "layer_sequential": False},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_is_clean_and_resumes_to_the_same_bytes(
    kind: str, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Ctrl-C once near the beginning, once in the middle, once near the end of one run."""
    family, preset, calibration = KINDS[kind]
    settings = {"batch_size": 4, "samples": 4} | calibration
    recipe = load_recipe(preset).with_rules({"weight_range": "minmax"})
    recipe = recipe.with_calibration(**settings)
    assert_resumes_to_the_same_bytes(tiny(family), recipe, calibration_file, tmp_path)


def assert_resumes_to_the_same_bytes(
    folder: Path, recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    count = Count()
    given = folder, recipe
    pq.quantize(*given, whole, data, reporter=count)
    finished = 0
    for number, moment in enumerate((count.moments // 5, count.moments // 2, count.moments // 3)):
        with pytest.raises(KeyboardInterrupt):
            pq.quantize(*given, out, data, resume=number > 0, reporter=StopAt(moment))
        assert_unfinished_and_clean(out)
        steps = len(RunDirectory(out).load().steps)
        assert steps >= finished
        finished = steps
    assert finished > 0
    result = pq.quantize(*given, out, data, resume=True)
    assert result.record.finished
    mine, theirs = files_of(out), files_of(whole)
    assert mine.keys() == theirs.keys()
    assert not [name for name in mine if mine[name] != theirs[name]]
    uninterrupted = RunDirectory(whole).load()
    for step, expected in zip(result.record.steps, uninterrupted.steps, strict=True):
        assert replace(step, seconds=0.0) == replace(expected, seconds=0.0)


# Some readers of an edge stay in floating point: what becomes of them must be resumed as well.
TRANSFORMED: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = {
    "all at once": (
        "video_llama_3",
        [
            {"weights": "int4-g16", "activations": "int8-tensor", "weight_range": "minmax"},
            {"match": {"role": "patch_embed"}, "activations": "none"},
            {"correction": "auto"},
            {"match": {"modality": "llm", "role": "mlp"}, "tuner": "autoround"},
            {"tuner_options": {"iterations": 2, "settle": 1}},
        ],
        [
            {"name": "rotation", "options": {"online": True}},
            {"name": "smoothquant", "options": {"search": False}},
            {"name": "split", "match": {"role": "mlp.down"}, "options": {"threshold": 1.01}},
        ],
    ),
    "scale into layers in float": (
        "qwen2_vl",
        [
            {"match": {"role": ["mlp", "attn.qkv", "projector"]}, "weights": "int4-g32"},
            {"match": {"role": "mlp.up", "modality": "vision"}, "skip": True},
            {"match": {"role": "mlp.up", "name": "*layers.0*"}, "tuner": "none"},
        ],
        [{"name": "smoothquant", "options": {"search": False}}],
    ),
}


@pytest.mark.parametrize("kind", TRANSFORMED)
@pytest.mark.slow
def test_a_run_with_transforms_resumes_to_the_same_bytes(
    kind: str, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Scale that was moved, float states, tuned codes: all of it is on disk or made again.

    In bfloat16 what is stored has fewer digits than what is computed with.
    """
    family, rules, transforms = TRANSFORMED[kind]
    calibration = {"batch_size": 2, "samples": 4}
    recipe = load_recipe({"rules": rules, "transforms": transforms, "calibration": calibration})
    folder = tiny(family, dtype=torch.bfloat16)
    assert_resumes_to_the_same_bytes(folder, recipe, calibration_file, tmp_path)


def test_finished_steps_are_not_done_again(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe("w4a16").with_calibration(samples=2)
    given = tiny("qwen2_vl"), recipe, tmp_path, calibration_file
    with pytest.raises(KeyboardInterrupt):
        pq.quantize(*given, reporter=StopAt(14))
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    steps = RunDirectory(tmp_path).load().steps
    assert len(shards) == len(steps) > 0
    result = pq.quantize(*given, resume=True)
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert result.record.steps[: len(steps)] == steps


def test_resuming_a_finished_run_changes_nothing(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe("w8a8").with_rules({"solver": "rtn"})
    first = pq.quantize(tiny("qwen2_vl"), recipe, tmp_path)
    before = files_of(tmp_path)
    assert pq.quantize(tiny("qwen2_vl"), recipe, tmp_path, resume=True).record == first.record
    assert files_of(tmp_path) == before


def test_a_run_that_ended_before_its_last_files_is_completed(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the index is written; all steps are there."""
    from prismquant.export.compressed_tensors import writer

    recipe = load_recipe("w8a8").with_rules({"solver": "rtn"})
    pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "whole")

    def full(*_: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_json", full)
        with pytest.raises(StorageError, match="disk is full"):
            pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "out")
    assert_unfinished_and_clean(tmp_path / "out")
    count = Count()
    pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "out", resume=True, reporter=count)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert count.moments == 0


def test_files_of_others_are_told_and_stay_out_of_the_record(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They appear between a run that broke off and the one that goes on with it."""
    recipe, out = load_recipe("w8a8").with_rules({"solver": "rtn"}), tmp_path / "out"
    whole = pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "whole")
    assert whole.notes == ()

    def full(*_: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "finish", full)
        with pytest.raises(StorageError, match="disk is full"):
            pq.quantize(tiny("qwen2_vl"), recipe, out)
    (out / "deep").mkdir()
    mine = {"notes.txt": b"mine", "extra.safetensors": b"", "deep/config.json": b"{}"}
    for name, content in mine.items():
        (out / name).write_bytes(content)
    for _ in range(2):
        result = pq.quantize(tiny("qwen2_vl"), recipe, out, resume=True)
        assert result.record.files == whole.record.files
        assert f"has not written lie in its folder: {', '.join(sorted(mine))}" in result.notes[-1]
    (out / "notes.txt").unlink()
    assert pq.quantize(tiny("qwen2_vl"), recipe, out, resume=True).record == result.record
    assert files_of(out).items() >= {n: c for n, c in mine.items() if n != "notes.txt"}.items()


@pytest.mark.parametrize("number", [3, -1])
def test_a_finished_checkpoint_that_was_damaged_is_mended(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, number: int
) -> None:
    """A step's shard, and the one of tensors that belong to no step."""
    recipe = load_recipe("w4a8-static").with_calibration(samples=3, batch_size=2)
    given = tiny("qwen2_vl"), recipe, tmp_path, calibration_file
    pq.quantize(*given)
    whole = files_of(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[number]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    result = pq.quantize(*given, resume=True)
    (note,) = result.notes
    assert note.startswith(f"{shard.name} has changed")
    assert ("done again" if number == 3 else "last files are written again") in note
    assert result.record.restarts[0].notes == result.notes
    assert files_of(tmp_path) == whole
    assert pq.quantize(*given, resume=True).record == result.record


def test_other_arguments_are_refused_by_what_differs(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Another recipe, other weights of the same shapes, other samples."""
    recipe = load_recipe("w4a8-static").with_calibration(samples=4)
    given = tiny("qwen2_vl"), recipe, tmp_path / "out", calibration_file
    with pytest.raises(KeyboardInterrupt):
        pq.quantize(*given, reporter=StopAt(14))
    other_data = tiny_vlm.samples(tmp_path / "data", count=4, seed=9)
    other_model = tiny("qwen2_vl", seed=1)
    finer = recipe.with_rules({"options": {"damping": 0.1}})
    wider = recipe.with_rules({"match": {"role": "mlp.down"}, "weights": "int8-channel"})
    name = "model.language_model.layers.0.mlp.down_proj"
    for position, changed, told in (
        (1, finer, "recipe: .*options.damping .* -> 0.1"),
        (1, wider, rf"recipe: {name} and 1 other: weights int4 .* -> int8 channel"),
        (1, recipe.with_calibration(samples=3), "samples 4 -> 3\n.*3 samples instead of 4, 0 of"),
        (0, other_model, r"model: shard model.safetensors has changed\n"),
        (3, other_data, rf"calibration: . of 4 samples differ\n.*calibration is {other_data}, was"),
    ):
        arguments: list[Any] = list(given)
        arguments[position] = changed
        with pytest.raises(StorageError, match="cannot resume") as caught:
            pq.quantize(*arguments, resume=True)
        assert re.search(told, str(caught.value)), str(caught.value)
    assert pq.quantize(*given, resume=True).record.finished


@pytest.fixture(scope="module")
def deep(tiny: Callable[..., Path]) -> Path:
    """Enough blocks for a signal to arrive before the last."""
    return tiny("qwen2_vl", llm_blocks=8)


@pytest.fixture(scope="module")
def signalled_recipe() -> Recipe:
    recipe = load_recipe("w4a8-static").with_rules({"weight_range": "minmax"}, name="signalled")
    return recipe.with_calibration(samples=3, batch_size=2)


@pytest.fixture(scope="module")
def uninterrupted(
    deep: Path,
    signalled_recipe: Recipe,
    calibration_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted")
    pq.quantize(deep, signalled_recipe, out, calibration_file)
    return files_of(out)


# The signal 9 leaves no time to clean up: what it leaves is cleaned by the next run.
@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(signal.SIGINT, id="interrupted", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, id="killed"),
    ],
)
def test_a_process_that_is_stopped_can_be_resumed(
    deep: Path,
    signalled_recipe: Recipe,
    uninterrupted: dict[str, bytes],
    calibration_file: Path,
    tmp_path: Path,
    sent: signal.Signals,
) -> None:
    """The real command line, with a real signal after the third shard."""
    out = tmp_path / "out"
    (tmp_path / "recipe.yaml").write_text(signalled_recipe.to_yaml())
    # A shell may have told its background children to ignore Ctrl-C.
    code = (
        "import runpy, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "runpy.run_module('prismquant', run_name='__main__')\n"
    )
    flags = ["--recipe", tmp_path / "recipe.yaml", "--calib", calibration_file, "--out", out]
    command = [sys.executable, "-c", code, "quantize", deep, *flags]
    process = subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while len(list(out.glob("model-*.safetensors"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=300)
    assert stdout == ""
    assert not (out / "config.json").exists()
    if sent == signal.SIGINT:
        assert process.returncode == 1
        assert re.search("stopped; finished steps are kept.*--resume", stderr.replace("\n", " "))
        assert "Traceback" not in stderr
        assert_unfinished_and_clean(out)
    (out / LEFTOVER).write_text("half a shard")
    assert 0 < len(RunDirectory(out).load().steps) < 13
    result = pq.quantize(deep, signalled_recipe, out, calibration_file, resume=True)
    assert result.record.finished
    assert files_of(out) == uninterrupted
