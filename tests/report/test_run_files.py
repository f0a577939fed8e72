"""A report is made of plan.json and record.json: no torch, no model, and no guess."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import prismquant as pq
from prismquant.errors import StorageError
from prismquant.report import plans
from prismquant.report.plan_summary import PlanSummary
from prismquant.report.run_files import RunFiles

if TYPE_CHECKING:
    from collections.abc import Callable

RULE = {"match": {"modality": "llm", "role": ["attn", "mlp"]}, "weights": "int4-g32"}
RECIPE = {
    "rules": [RULE | {"solver": "rtn", "activations": "int8-token"}],
    "transforms": [{"name": "rotation", "match": {"modality": "llm"}}],
}


@pytest.fixture(scope="module")
def run(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> pq.Result:
    return pq.quantize(tiny("qwen2_vl"), RECIPE, tmp_path_factory.mktemp("run") / "out")


def test_what_is_read_is_what_was_done(run: pq.Result) -> None:
    files = RunFiles.read(run.folder)
    assert files.record == run.record
    assert files.plan == PlanSummary.from_dict(run.plan.to_dict())
    rows = {row.site.name: row for row in run.plan.rows}
    assert [layer.name for layer in files.plan.layers] == list(rows)
    for layer in files.plan.layers:
        row = rows[layer.name]
        assert layer.quantized == row.quantized
        assert layer.weights == row.config.describe().partition(",")[0]
        assert (layer.modality, layer.stored_bytes) == (row.site.modality, row.stored_bytes)
    assert files.plan.total_bytes == run.plan.total_bytes


def test_the_line_on_memory_says_where_states_waited(run: pq.Result) -> None:
    line = plans.memory_line(RunFiles.read(run.folder).record)
    assert str(run.record.memory["placement"]) in line
    assert "passes" in line


def test_a_report_is_made_without_torch(run: pq.Result) -> None:
    """In a process of its own: every module of the folder is imported, every table is made."""
    package = Path(plans.__file__).parent
    modules = sorted(f"prismquant.report.{path.stem}" for path in package.glob("[!_]*.py"))
    code = f"""
import importlib, sys
from pathlib import Path
for name in {["prismquant.report", *modules]!r}:
    importlib.import_module(name)
from prismquant.report import plans
from prismquant.report.run_files import RunFiles
files = RunFiles.read(Path({str(run.folder)!r}))
plans.layer_table(files.plan), plans.totals_table(files.plan), plans.transform_table(files.plan)
plans.run_table(files), plans.memory_line(files.record), plans.token_lines(files)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("torch", "transformers")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert done.stdout == "[]\n", done.stderr


def write(folder: Path, name: str, content: Any) -> None:
    (folder / "prismquant").mkdir(parents=True, exist_ok=True)
    (folder / "prismquant" / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: plan.update(version=0), "plan of version 0 cannot be read"),
        (lambda plan: plan.pop("rows"), "the plan is damaged: KeyError: 'rows'"),
        (lambda plan: plan["rows"][0].pop("site"), "the plan is damaged: KeyError: 'site'"),
        (lambda plan: plan.update(totals=[]), "the plan is damaged"),
        (lambda plan: plan["rows"][-2]["config"]["weights"].update(bits=77), "the plan is damaged"),
    ],
)
def test_a_damaged_plan_is_refused(
    run: pq.Result, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    plan = json.loads(json.dumps(run.plan.to_dict()))
    change(plan)
    write(tmp_path, "plan.json", plan)
    write(tmp_path, "record.json", run.record.to_dict())
    with pytest.raises(StorageError, match=said):
        RunFiles.read(tmp_path)


def test_what_is_missing_is_named(run: pq.Result, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"plan.json is missing"):
        RunFiles.read(tmp_path)
    write(tmp_path, "plan.json", run.plan.to_dict())
    with pytest.raises(StorageError, match=r"record.json is missing"):
        RunFiles.read(tmp_path)
    (tmp_path / "prismquant" / "record.json").write_text("{")
    with pytest.raises(StorageError, match=r"record.json is not valid JSON"):
        RunFiles.read(tmp_path)
