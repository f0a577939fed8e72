"""Folders are layers: the contract of pyproject.toml holds, and it would notice a breach."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "pyproject.toml"

pytestmark = pytest.mark.skipif(not CONFIG.is_file(), reason="runs in the source tree only")


def settings() -> dict[str, Any]:
    section: dict[str, Any] = tomllib.loads(CONFIG.read_text())["tool"]["importlinter"]
    return section


def layers() -> list[str]:
    """All members of the contract of layers, highest first."""
    contract = next(c for c in settings()["contracts"] if c["type"] == "layers")
    return [name.strip() for line in contract["layers"] for name in line.split("|")]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_contracts_hold() -> None:
    pytest.importorskip("importlinter")
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("numerics/grids.py", "import prismquant.formats.spec", "Folders are layers"),
        ("recipe/schema.py", "from prismquant.plan import plan", "Folders are layers"),
        ("models/outliers.py", "import prismquant.cli", "Folders are layers"),
        # An import within a function counts as well.
        ("outputs.py", "def f():\n    import prismquant.api", "Folders are layers"),
        ("algorithms/rtn.py", "from prismquant.algorithms.gptq import GPTQ", "Algorithms never"),
        ("runtime/linear.py", "import transformers", "Nothing below models"),
        ("formats/packed.py", "import safetensors", "Numerics and formats know no files"),
        ("report/plans.py", "import prismquant.engine.run", "Reports are made of files"),
        ("report/tables.py", "def f():\n    import torch", "Reports need no torch"),
        ("models/names.py", "import pydantic", "Loading needs nothing"),
        # A new folder must be given its place.
        ("attic/__init__.py", "", "Folders are layers"),
    ],
)
def test_a_breach_is_noticed(tmp_path: Path, module: str, line: str, contract: str) -> None:
    """In a copy of the package, one import is added where it must not be."""
    pytest.importorskip("importlinter")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    package = tmp_path / "prismquant"
    shutil.copytree(ROOT / "prismquant", package, ignore=ignored)
    shutil.copy(CONFIG, tmp_path)
    path = package / module
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    if module.startswith("attic"):
        assert "attic" in done.stdout
    else:
        assert len(broken) == 1
        assert broken[0].startswith(contract)


def test_every_folder_and_module_has_its_layer() -> None:
    """Neither a part of the package that the contract does not know, nor a layer that is gone."""
    package = ROOT / "prismquant"
    parts = {path.stem for path in package.glob("*.py") if path.stem != "__init__"}
    parts |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(layers()) == parts
    assert len(layers()) == len(parts)


def test_no_folder_of_python_files_lacks_its_init() -> None:
    """Import-linter would not see it."""
    package = ROOT / "prismquant"
    folders = {path.parent for path in package.rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_every_algorithm_is_named_in_the_contract_of_independence() -> None:
    shared = {"__init__", "block_descent", "block_problem", "edge_scale", "latent_weight"}
    shared |= {"layer_scales", "methods", "output_error", "problem", "protocols", "row_shards"}
    shared |= {"model_outline", "smooth_edge"}
    folder = ROOT / "prismquant" / "algorithms"
    files = {path.stem for path in folder.glob("*.py")} - shared
    files |= {path.parent.name for path in folder.glob("*/__init__.py")}
    contract = next(c for c in settings()["contracts"] if c["type"] == "independence")
    assert {name.rpartition(".")[2] for name in contract["modules"]} == files


def test_every_layer_below_models_is_forbidden_to_know_transformers() -> None:
    contract = next(c for c in settings()["contracts"] if c["name"].startswith("Nothing below"))
    below = layers()[layers().index("models") + 1 :]
    assert {f"prismquant.{name}" for name in below} <= set(contract["source_modules"])
    assert "transformers" in contract["forbidden_modules"]
