"""A run that is killed at any moment, however often, ends with the bytes of one that was not.

The real command line, SIGKILL, and ``--resume``, over and over: at random times, and right before
each single thing that a run asks of the file system (making, flushing, renaming, deleting a file).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from prismquant.opening import read_json
from prismquant.recipe.schema import Recipe, load_recipe
from prismquant.run.directory import RunDirectory
from prismquant.storage import file_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

CALIBRATION = {"samples": 3, "batch_size": 2}
# Each brings a state of its own across a break: float twins, ranges, tuned codes, moved scale.
RECIPES: dict[str, Callable[[], Recipe]] = {
    "no data": lambda: load_recipe("w8a8").with_rules({"solver": "rtn"}),
    "both chains": lambda: (
        load_recipe("w4a8-static")
        .with_rules({"weight_range": "minmax", "correction": "auto"})
        .with_calibration(**CALIBRATION)
    ),
    "tuner": lambda: (
        load_recipe("w4a8-static")
        .with_rules(
            {
                "weight_range": "minmax",
                "tuner": "autoround",
                "tuner_options": {"iterations": 2, "settle": 1},
            }
        )
        .with_calibration(**CALIBRATION)
    ),
    "transforms": lambda: load_recipe(
        {
            "rules": [
                {"weights": "int4-g32", "weight_range": "minmax", "activations": "int8-tensor"},
                {"match": {"role": "patch_embed"}, "activations": "none"},
                {"match": {"modality": "llm"}, "correction": "auto"},
            ],
            "transforms": [
                {"name": "rotation", "options": {"online": True}},
                {"name": "smoothquant", "options": {"search": False}},
            ],
            "calibration": CALIBRATION,
        }
    ),
}


class Warm:
    """Runs of the command line in children of one process that has imported everything."""

    def __init__(self, model: Path, data: Path, folder: Path) -> None:
        self.model, self.data, self.folder = model, data, folder
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "warm_process.py"), str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._answer() == "ready\n"
        self.whole: dict[str, tuple[dict[str, str], dict[str, Any]]] = {}

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def run(self, kind: str, out: Path, *, resume: bool = True, **moment: Any) -> dict[str, Any]:
        """One run of a recipe; killed at a moment, if one is given."""
        path = self.folder / f"{kind}.yaml"
        path.write_text(RECIPES[kind]().to_yaml())
        command = ["quantize", self.model, "--recipe", path, "--calib", self.data, "--out", out]
        arguments = [str(part) for part in command] + ["--resume"] * resume
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"run": arguments, **moment}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._answer())
        assert answer["killed"] or answer["status"] == 0, answer["said"]
        return answer

    def uninterrupted(self, kind: str) -> tuple[dict[str, str], dict[str, Any]]:
        """Files of a run that nothing disturbs, and how long it takes, by recipe."""
        if kind not in self.whole:
            out = self.folder / f"whole {kind}"
            answer = self.run(kind, out, resume=False)
            assert not answer["killed"]
            self.whole[kind] = files_of(out), answer
        return self.whole[kind]


@pytest.fixture(scope="module")
def warm(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Warm]:
    folder = tmp_path_factory.mktemp("warm")
    process = Warm(tiny("qwen2_vl", llm_blocks=4), calibration_file, folder)
    yield process
    process.process.communicate()


def files_of(folder: Path) -> dict[str, str]:
    """Checksums of all files but the record, which says when and how long."""
    return {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "record.json"
    }


def assert_nothing_is_claimed_that_is_not_there(out: Path) -> None:
    """What a killed run leaves: claimed shards are whole, and config.json only when all are."""
    directory = RunDirectory(out)
    steps = directory.load().steps if directory.record_path.exists() else ()
    for step in steps:
        assert file_digest(out / step.shard) == step.sha256
    if (out / "config.json").exists():
        index = read_json(out / "model.safetensors.index.json")
        assert all((out / shard).is_file() for shard in index["weight_map"].values())


def assert_ends_the_same(warm: Warm, kind: str, out: Path) -> None:
    assert not warm.run(kind, out)["killed"]
    assert files_of(out) == warm.uninterrupted(kind)[0]
    record = RunDirectory(out).load()
    assert record.finished
    assert {step.shard for step in record.steps} | record.files.keys() == {
        name for name in files_of(out) if not name.startswith("prismquant")
    }


def kill_again_and_again(warm: Warm, kind: str, out: Path, times: int, seed: int) -> int:
    """Random moments, each a step or two further; returns how many of them hit a run at work."""
    chance = random.Random(f"{kind} {seed}")
    _, whole = warm.uninterrupted(kind)
    # A life makes its files from the lock to the claim of a step or two, and computes meanwhile.
    first, last = 5, 28
    pause = whole["seconds"] * 3 / whole["events"]
    hits = 0
    for _ in range(times):
        moment = {"at": chance.randint(first, last), "then": chance.uniform(0, pause)}
        hits += warm.run(kind, out, **moment)["killed"]
        assert_nothing_is_claimed_that_is_not_there(out)
    return hits


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(warm: Warm, tmp_path: Path) -> None:
    """Both chains, static inputs: all is on disk or made again."""
    out = tmp_path / "out"
    assert kill_again_and_again(warm, "both chains", out, times=5, seed=0) > 2
    assert len(RunDirectory(out).load().restarts) > 1
    assert_ends_the_same(warm, "both chains", out)


def test_killed_between_any_two_file_operations_it_ends_with_the_same_bytes(
    warm: Warm, tmp_path: Path
) -> None:
    """A few of the moments: the first, in a step, between a shard and its claim, in the end."""
    out = tmp_path / "out"
    for at in (1, 40, 13, 30, 70):
        assert warm.run("no data", out, at=at)["killed"]
        assert_nothing_is_claimed_that_is_not_there(out)
    assert_ends_the_same(warm, "no data", out)


def test_killed_in_the_last_writes_it_ends_with_the_same_bytes(warm: Warm, tmp_path: Path) -> None:
    """While the index, the copies and config.json are written, and before the run is finished."""
    events = warm.uninterrupted("no data")[1]["events"]
    out = tmp_path / "out"
    assert warm.run("no data", out, at=events - 8)["killed"]
    record = RunDirectory(out).load()
    assert len(record.steps) == len({step.shard for step in record.steps}) > 0
    assert not record.finished
    assert_ends_the_same(warm, "no data", out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECIPES)
def test_killed_forty_times_it_ends_with_the_same_bytes(
    warm: Warm, tmp_path: Path, kind: str
) -> None:
    """Ten kills of each of four runs; a run that gets through all the same is not killed again."""
    hits = restarts = 0
    for number in range(4):
        out = tmp_path / f"out{number}"
        hits += kill_again_and_again(warm, kind, out, times=10, seed=number)
        restarts += len(RunDirectory(out).load().restarts)
        assert_ends_the_same(warm, kind, out)
    assert hits >= 30
    assert restarts >= 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no data", "both chains"])
def test_killed_at_each_file_operation_it_ends_with_the_same_bytes(
    warm: Warm, tmp_path: Path, kind: str
) -> None:
    """All of them with the fast recipe, each sixth with the other."""
    events = warm.uninterrupted(kind)[1]["events"]
    assert events > 100
    for at in range(0, events, 1 if kind == "no data" else 6):
        out = tmp_path / f"out{at}"
        assert warm.run(kind, out, at=at)["killed"]
        assert_nothing_is_claimed_that_is_not_there(out)
        assert_ends_the_same(warm, kind, out)


def test_a_killed_run_leaves_no_lock_that_holds(warm: Warm, tmp_path: Path) -> None:
    """Its file is there, naming a process that is not; the next run takes it over."""
    out = tmp_path / "out"
    assert warm.run("no data", out, at=60)["killed"]
    left = json.loads((out / "prismquant" / "lock").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(left["pid"], signal.SIG_DFL)
    assert_ends_the_same(warm, "no data", out)
    assert not (out / "prismquant" / "lock").exists()
