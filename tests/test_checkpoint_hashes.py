"""Two reports of checkpoint hashes are equal only where every file is."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest

from prismquant.recipe.presets import PRESETS

if TYPE_CHECKING:
    from pathlib import Path

tool = pytest.importorskip("tools.checkpoint_hashes", reason="runs in the source tree only")

REPORT: dict[str, Any] = {
    "package": "/old",
    "torch": "2",
    "machine": "x86_64",
    "inputs": {"m": {"calibration": "1"}},
    "runs": {"m": {"w4a16": {"model.safetensors": "2"}, "fp8": {"error": "no"}}},
}


def compare(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> int:
    for name, report in (("old", old), ("new", new)):
        (folder / name).write_text(json.dumps(report))
    status: int = tool.main(["--compare", str(folder / "old"), str(folder / "new")])
    return status


def test_equal_reports_of_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, REPORT, REPORT | {"package": "/new"}) == 0
    assert capsys.readouterr().out == "2 runs, 1 of them refused; 0 differences\n"


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (("runs", "m", "w4a16", "model.safetensors"), "3", "m, w4a16: model.safetensors: 2 -> 3"),
        (("runs", "m", "w4a16"), {}, "m, w4a16: model.safetensors: 2 -> absent"),
        (("runs", "m", "w4a8"), {"config.json": "4"}, "m, w4a8: config.json: absent -> 4"),
        (("runs", "n"), {"w4a16": {"a": "5"}}, "n, w4a16: a: absent -> 5"),
        (("inputs", "m", "calibration"), "6", "m: input calibration: 1 -> 6"),
        (("torch",), "3", "torch: 2 -> 3"),
    ],
)
def test_every_difference_is_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: tuple[str, ...],
    value: Any,
    line: str,
) -> None:
    new = copy.deepcopy(REPORT)
    *folders, name = place
    target = new
    for folder in folders:
        target = target[folder]
    target[name] = value
    assert compare(tmp_path, REPORT, new) == 1
    assert capsys.readouterr().out.splitlines()[0] == line


def test_nothing_compared_is_no_success(tmp_path: Path) -> None:
    nothing = REPORT | {"runs": {}}
    assert compare(tmp_path, nothing, nothing) == 1


def test_hashes_are_of_shards_and_configuration(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "README.md"):
        (tmp_path / name).write_text("abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert tool.hash_files(tmp_path) == {"model.safetensors": digest, "config.json": digest}


def test_every_case_is_of_a_preset_and_has_a_name_of_its_own() -> None:
    assert {case.preset for case in tool.CASES} <= set(PRESETS)
    assert len({case.name for case in tool.CASES}) == len(tool.CASES)
