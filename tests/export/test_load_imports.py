"""Loading a checkpoint imports what reads and runs it, and nothing that quantizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import prismquant as pq

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_MODULES = 39
QUANTIZING = {"engine", "plan", "recipe", "data", "algorithms", "statistics", "run", "search"}
PROBE = """
import json, sys
import prismquant
prismquant.load(sys.argv[1])
print(json.dumps([name for name in sys.modules if name.split(".")[0] == "prismquant"]))
"""


def imported_by_load(folder: Path) -> list[str]:
    """Modules of the package in a fresh process that has loaded a checkpoint."""
    paths = [str(Path(pq.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "recipe", ["w4a16", *(pytest.param(one, marks=pytest.mark.slow) for one in ("w4a8", "fp8-kv"))]
)
def test_load_imports_little_and_nothing_that_quantizes(
    recipe: str, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "out", calibration_file, solver="rtn")
    modules = imported_by_load(tmp_path / "out")
    needless = [name for name in modules if set(name.split(".")[1:2]) & QUANTIZING]
    assert not needless
    if recipe == "w4a16":  # no quantized inputs, and no quantized cache
        assert len(modules) <= MOST_MODULES, modules
