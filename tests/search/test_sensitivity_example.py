"""The documented mapping, W4A8 in narrow integers, from an example that is run as it is."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import prismquant as pq
from prismquant.check import check
from prismquant.search.sensitivity_file import read_sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT = Path(__file__).parents[2] / "examples" / "sensitivity_qwen3_vl.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="runs in the source tree only")


@pytest.mark.slow
def test_the_example_ranks_units_and_makes_the_checkpoint(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = tiny("qwen3_vl"), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), str(calibration_file), str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    told = capsys.readouterr().out
    assert "llm, gradient: 8 units" in told
    assert "all, kl_div: 27 units" in told
    ranking = json.loads((out / "sensitivity.json").read_text())
    for coverage, modalities in (("llm", {"llm"}), ("all", {"vision", "projector", "llm"})):
        for method in ("gradient", "kl_div"):
            found = read_sensitivity(out / f"{coverage}-{method}.json")
            chosen = [unit for unit in found.units if len(unit.options) > 1]
            assert {unit.modality for unit in chosen} == modalities
            assert "lm_head" not in {unit.name for unit in chosen}
            assert set(ranking[coverage][method]) == {unit.name for unit in chosen}
            (choice,) = found.formats.values()
            wanted = {"bits": 4, "granularity": "channel", "symmetric": True, "narrow": True}
            assert wanted.items() <= dict(choice.weights or {}).items()
            wanted = {"bits": 8, "granularity": "token", "dynamic": True, "narrow": True}
            assert wanted.items() <= dict(choice.activations or {}).items()
            for pattern in ("vpm", "resampler.*"):
                assert f"--disable {pattern!r} names no layer" in found.notes
    config = json.loads((out / "w4a8" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"]
    assert check(out / "w4a8", "transformers").ok
    measured = pq.measure(out / "w4a8", calibration_file, reference=folder)
    assert measured.overall.divergence["answer"].kl < 1


@pytest.mark.parametrize(
    ("worse", "better"), [("nvfp4", "nvfp4a16"), ("mxfp4", "mxfp4a16"), ("mxfp6", "mxfp8+none")]
)
@pytest.mark.parametrize("method", ["fisher", pytest.param("kl_div", marks=pytest.mark.slow)])
def test_formats_of_new_devices_are_analyzed_anywhere(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    worse: str,
    better: str,
    method: str,
) -> None:
    found = pq.analyze(
        tiny("qwen3_vl"), [worse, better], tmp_path / "s.json", calibration_file, method=method
    )
    assert {unit.modality for unit in found.units} == {"vision", "projector", "llm"}
    losses = {
        name: sum(
            option.scores["text"].loss
            for unit in found.units
            for option in unit.options
            if option.format == name
        )
        for name in (worse, better)
    }
    assert losses[worse] > losses[better] > 0
