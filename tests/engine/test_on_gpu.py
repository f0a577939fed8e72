"""Runs on a CUDA device: the placement changes no byte, and a CPU chooses nearly the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import prismquant as pq
from prismquant.engine.activation_store import OnHost
from prismquant.engine.placement import placements
from prismquant.export.load_quantized import load_model
from prismquant.quantization import prepare

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_placement_is_not_seen_in_the_result(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    recipe = pq.load_recipe("w4a8-static").with_calibration(samples=4, batch_size=2)
    given = {"calibration": calibration_file, "device": "cuda", "dtype": "float32"}
    pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "fast", **given)  # type: ignore[arg-type]
    monkeypatch.setattr(prepare, "placements", lambda *where: placements(*where)[number:])
    pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "lean", **given)  # type: ignore[arg-type]
    for path in (tmp_path / "fast").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "lean" / path.name).read_bytes()


@pytest.mark.gpu
def test_a_cpu_chooses_nearly_the_same_weights(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Products are summed in another order, so single codes may differ, and what they stand for."""
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        given = {"calibration": calibration_file, "device": device, "dtype": "float32"}
        pq.quantize(tiny("qwen2_5_vl"), "w4a16", out, **given)  # type: ignore[arg-type]
        found.append(load_model(out).state_dict())
    for name, value in found[0].items():
        apart = (value - found[1][name]).norm() / value.norm().clamp_min(1e-9)
        assert apart < 0.02, name


@pytest.mark.gpu
def test_what_waits_on_the_host_comes_back_to_its_device() -> None:
    x = torch.randn(1 << 15, device="cuda")
    waiting = OnHost().keep({"x": (x, "text"), "small": x[:4].clone()})
    back = waiting()
    assert back["x"][0].device == x.device
    assert torch.equal(back["x"][0], x)
    assert back["x"][1] == "text"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_asking_for_a_gpu_where_there_is_none_fails() -> None:
    """A run of such tests in which none ran has shown nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(Path(__file__))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "no test for a GPU ran" in done.stdout
