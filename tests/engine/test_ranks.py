"""Several processes give what one gives, and the loss of one is no loss of what was done."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import prismquant as pq
from prismquant.data import read_samples
from prismquant.distributed import Alone, ProcessGroup, joined
from prismquant.engine.collectives import require_sharable, share_of
from prismquant.errors import DataError, PlanError
from prismquant.models.bind import bind
from prismquant.plan.make_plan import make_plan
from prismquant.run.directory import RunDirectory
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable


def command(ranks: int, model: Path, recipe: Path, data: Path, out: Path, *more: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={ranks}", "-m", "prismquant", "quantize"]
    flags = ["--recipe", recipe, "--calib", data, "--out", out, *more]
    return [str(part) for part in [*torchrun, model, *flags]]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def differing(one: Path, other: Path) -> dict[str, float]:
    """Tensors that differ, and the share of their entries that do."""
    first, second = ShardReader(one), ShardReader(other)
    assert first.names == second.names
    pairs = ((name, first.read(name), second.read(name)) for name in sorted(first.names))
    return {
        name: float((x.to(torch.float32) != y.to(torch.float32)).float().mean())
        for name, x, y in pairs
        if not torch.equal(x, y)
    }


def static_recipe(**calibration: Any) -> pq.Recipe:
    """Static ranges and moments of every layer; nothing that is searched on a sample of tokens."""
    recipe = pq.load_recipe("w4a8-static-all").without_transforms()
    return recipe.with_calibration(**({"batch_size": 1} | calibration))


def alone(folder: Path, recipe: pq.Recipe, data: Path, out: Path) -> Path:
    pq.quantize(folder, recipe, out, data)
    return out


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_give_the_codes_of_one(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, ranks: int
) -> None:
    """Six batches, of texts, pictures and clips; some ranks see no picture at all.

    To the bit: extremes and histograms merge exactly, and sums of moments are kept to so many
    digits that their order is not seen in their means.
    """
    folder, recipe = tiny("qwen2_vl"), static_recipe()
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    whole = alone(folder, recipe, calibration_file, tmp_path / "one")
    out = tmp_path / "several"
    line = command(ranks, folder, tmp_path / "recipe.yaml", calibration_file, out)
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("written: ") == 1
    assert differing(whole, out) == {}
    record, expected = RunDirectory(out).load(), RunDirectory(whole).load()
    assert record.finished
    assert record.environment["ranks"] == str(ranks)
    assert record.identity == expected.identity
    for step, other in zip(record.steps, expected.steps, strict=True):
        for layer, twin in zip(step.layers, other.layers, strict=True):
            assert (layer.name, layer.tokens) == (twin.name, twin.tokens)
            assert layer.tokens
            assert layer.loss == pytest.approx(twin.loss, rel=1e-5)


@pytest.mark.slow
def test_a_lost_rank_ends_the_run_and_leaves_a_folder_to_resume(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """One process is killed after the second shard; the run goes on in a single process."""
    folder, recipe = tiny("qwen2_vl", llm_blocks=4), static_recipe(samples=4)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    out = tmp_path / "several"
    line = command(2, folder, tmp_path / "recipe.yaml", calibration_file, out)
    process = subprocess.Popen(
        line, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while len(list(out.glob("model-*.safetensors"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(rank_process(process.pid, 1), signal.SIGKILL)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode != 0
    # Either the exchange fails first, or torchrun stops the others.
    assert re.search(r"another rank is gone|stopped; finished steps are kept", stderr), stderr
    assert "--resume" in stderr
    assert not (out / "config.json").exists()
    assert len(RunDirectory(out).load().steps) >= 1
    result = pq.quantize(folder, recipe, out, calibration_file, resume=True)
    assert result.record.finished
    whole = alone(folder, recipe, calibration_file, tmp_path / "one")
    assert differing(whole, out) == {}


def rank_process(parent: int, rank: int) -> int:
    """The process that torchrun started for a rank."""
    for folder in Path("/proc").iterdir():
        try:
            ids = (folder / "status").read_text()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if f"PPid:\t{parent}\n" in ids and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError("the rank has no process")


def test_batches_are_dealt_whole_and_all_of_them(calibration_file: Path) -> None:
    samples = read_samples(calibration_file)
    for size in (1, 2, 3):
        for batch in (1, 2):
            shares = [
                share_of(samples, batch, ProcessGroup(rank, size, "cuda:0")) for rank in range(size)
            ]
            assert sorted(s.id for share in shares for s in share) == sorted(s.id for s in samples)
            first = [share[:batch] for share in shares]
            assert [s.id for group in first for s in group] == [
                s.id for s in samples[: batch * size]
            ]
    assert share_of([], 4, Alone()) == []
    with pytest.raises(DataError, match=r"2 batches, too few for 3 ranks"):
        share_of(samples, 3, ProcessGroup(0, 3, "cuda:0"))


@pytest.mark.parametrize(
    ("preset", "rules", "reason"),
    [
        ("fp8", {"solver": "rtn"}, "no calibration data"),
        ("w8a8-static-all", {"activation_range": "ema"}, "moving average"),
        ("w4a16", {"tuner": "autoround"}, "autoround"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tiny: Callable[..., Path], preset: str, rules: dict[str, Any], reason: str
) -> None:
    recipe = pq.load_recipe(preset).with_rules(rules)
    with pytest.raises(PlanError, match=reason):
        require_sharable(make_plan(recipe, bind(tiny("qwen2_vl"))))


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
        assert ranks.gather_json({"a": 1}) == [{"a": 1}]
        x = torch.ones(3)
        ranks.sum_(x)
        assert torch.equal(x, torch.ones(3))
        assert torch.equal(ranks.gather({"x": x})[0]["x"], x)
