"""``prismquant analyze``: what it prints, its exit status, and a real kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., tuple[int, str, str]]


def words(folder: Path, out: Path, calibration: Path, *more: Any) -> list[str]:
    given = ["analyze", folder, "--calib", calibration, "--out", out, "--threads", "1"]
    return [str(word) for word in [*given, "--method", "kl_div", "--solver", "rtn", *more]]


def test_tables_go_to_stdout_and_progress_to_stderr(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    more = ("--formats", "w8a8", "--formats", "int4-g32,kv:fp8", "--disable", "*lm_head*")
    more = (*more, "--disable", "vpm", "--modalities", "llm", "--weight", "text=1")
    status, out, err = run(*words(tiny("qwen2_vl"), tmp_path / "s.json", calibration_file, *more))
    assert status == 0
    assert "9 units" in out
    assert "model.language_model.layers.0.mlp.down_proj" in out
    assert f"written: {tmp_path / 's.json'}" in out
    assert "note: --disable 'vpm' names no layer" in err
    assert "left alone: lm_head: disabled" in err
    shown = re.search(r"kv_cache: loss: kv:fp8 (\S+) ", err)
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["weights"] == {"answer": 0.0, "text": 1.0, "image": 0.0, "video": 0.0}
    assert list(found["formats"]) == ["w8a8", "int4-g32", "kv:fp8"]
    # By the weights that were given.
    score = found["units"][-1]["options"][1]["scores"]["text"]["loss"]
    assert shown is not None
    assert float(shown[1]) == pytest.approx(score, rel=0.01)


def test_json_is_what_is_written(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    more = ("--formats", "int4-g32", "--modalities", "llm", "--json")
    given = words(tiny("qwen2_vl"), tmp_path / "s.json", calibration_file, *more)
    status, out, _ = run(*given)
    assert status == 0
    written = json.loads((tmp_path / "s.json").read_text())
    assert json.loads(out) == written
    status, out, err = run(*given, "--resume")
    assert status == 0
    assert json.loads((tmp_path / "s.json").read_text()) == written
    anew = "nothing was there that --resume could go on with: it begins anew"
    assert json.loads(out)["notes"] == [*written["notes"], anew]
    assert f"note: {anew}" in err


def test_wrong_words_end_with_status_2(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    given = words(tiny("qwen2_vl"), tmp_path / "s.json", calibration_file)
    for more, said in (
        (["--formats", "int4-g12x8"], "did you mean 'int4-g128'"),
        (["--formats", "w4a8", "--weight", "anwser=1"], "did you mean 'answer'"),
        ([], "--formats"),
    ):
        status, out, err = run(*given, *more)
        assert (status, out) == (2, "")
        assert said in err
    assert not list(tmp_path.iterdir())


# An analysis that is sent a signal as soon as it has kept its first unit.
STOPPED = """
import os, signal, sys
from prismquant.cli import main
from prismquant.search.partial_scores import PartialScores

number, add = int(sys.argv.pop(1)), PartialScores.add

def add_and_stop(self, *given):
    add(self, *given)
    os.kill(os.getpid(), number)

PartialScores.add = add_and_stop
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
main()
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_killed_analysis_goes_on_to_the_same_bytes(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "s.json"
    more = ("--formats", "int4-g32,w8a8,int3-g32,int8-channel")
    given = words(tiny("qwen3_vl"), out, calibration_file, *more)
    command = [sys.executable, "-c", STOPPED, str(int(number)), *given]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    told = process.stderr
    assert process.returncode != 0
    assert not out.exists()
    if number == signal.SIGINT:
        assert "finished units are kept, `--resume` goes on after them" in told
    assert run(*given, "--resume")[0] == 0
    first = out.read_bytes()
    assert run(*given)[0] == 0
    assert out.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kl_div", "fisher"])
def test_several_ranks_find_what_one_finds(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, method: str
) -> None:
    """Three ranks of two samples each, of which one sees texts alone."""
    more = ("--formats", "w8a8,int4-g32,kv:int8", "--batch-size", "1", "--method", method)
    more = (*more, "--solver", "gptq")
    folder = tiny("qwen3_vl")
    assert run(*words(folder, tmp_path / "one.json", calibration_file, *more))[0] == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node=3", "-m", "prismquant"]
    given = words(folder, tmp_path / "three.json", calibration_file, *more)
    done = subprocess.run(
        [*launch, *given], capture_output=True, text=True, timeout=300, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1
    one, three = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "three"))
    assert one["identity"] == three["identity"]
    assert one["calibration"] == three["calibration"]
    for unit, twin in zip(one["units"], three["units"], strict=True):
        for option, other in zip(unit["options"], twin["options"], strict=True):
            for kind, score in option["scores"].items():
                wanted = pytest.approx(score["loss"], rel=1e-3, abs=1e-9)
                assert other["scores"][kind]["loss"] == wanted, (unit["name"], option["format"])
