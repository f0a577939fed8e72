"""The verdicts of the rules beside those of vLLM's own loader, where it is installed.

Set ``PRISMQUANT_VLLM`` to the folder that ``bench/vllm_loader.py`` describes, and run
``pytest -m slow tests/check/test_check_vllm.py``. All checkpoints of the other tests are shown to
vLLM: as they are, and with what is wrong with them.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from check_cases import CASES, TAKEN_BY_THE_LIBRARY
from checkpoint_drafts import MADE, drafted, written

import prismquant as pq
from prismquant.check import check
from prismquant.recipe.schema import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

ENVIRONMENT = os.environ.get("PRISMQUANT_VLLM", "")
BLACKWELL = "10.0"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ENVIRONMENT, reason="PRISMQUANT_VLLM does not name an environment"),
]

# vLLM loads these, and then computes with what was never written, or with numbers of another kind:
# it looks for tensors by the fused layer, copies any dtype, and trusts scales.
LAX = {
    *("tensors.missing", "tensors.dtype", "tensors.plain-shape", "tensors.scalar"),
    *("kv.missing-biased", "kv.uncalibrated-biased", "kv.shape", "kv.value"),
    *("modelopt.tensors", "modelopt.shape", "packed.tensors", "packed.shape"),
    *("tensors.scale", "tensors.finite", "tensors.told-shape"),
    # It passes over what it does not look for.
    *("config.type", "config.misspelt", "config.group-key", "packed.keys", "modelopt.types"),
}
# vLLM refuses these on this GPU, without a package that is not there, or for a reason of which the
# report says that it was not looked into.
BEYOND = {
    "vllm.w4a8-fp8",
    "vllm.odd-bits",
    "vllm.asymmetric-int8",
    "config.method",
    "model.unknown",
}


def verdicts(folders: list[Path], *options: str) -> dict[str, dict[str, Any]]:
    """What vLLM says of checkpoints, by folder."""
    script = Path(__file__).parents[2] / "bench" / "vllm_loader.py"
    python = Path(ENVIRONMENT) / "venv" / "bin" / "python"
    run = subprocess.run(
        [python, script, "--json", *options, *folders],
        env={**os.environ, "PYTHONPATH": ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {line["path"]: line for line in lines}


@pytest.fixture(scope="module")
def sources(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every checkpoint that a case begins with, of a family that vLLM has."""
    root = tmp_path_factory.mktemp("sources")
    found: dict[str, Path] = {}
    for case in CASES:
        key = f"{case.family}-{case.base}"
        if key in found or case.family == "video_llama_3":
            continue
        source = tiny(case.family, dtype=torch.bfloat16)
        if case.base == "float":
            found[key] = source
        elif case.base in MADE:
            draft = drafted(source, root / key)
            MADE[case.base](draft)
            found[key] = written(draft)
        else:
            recipe = load_recipe(case.base).with_rules({"solver": "rtn"})
            pq.quantize(source, recipe, root / key, calibration_file)
            found[key] = root / key
    return found


def disagreements(folders: list[Path]) -> dict[str, str]:
    """Folder -> what the rules and vLLM say, where they differ and are not expected to."""
    found: dict[str, str] = {}
    said = verdicts(folders, "--capability", BLACKWELL)
    assert len(said) == len(folders)
    for folder in folders:
        report, theirs = check(folder, "vllm"), said[str(folder)]
        rules = {finding.rule for finding in report.findings}
        errors = {finding.rule for finding in report.errors}
        excused = errors <= LAX if theirs["ok"] else bool(rules & BEYOND)
        if report.ok != theirs["ok"] and not excused:
            found[folder.name] = f"rules: {sorted(errors)}; vLLM: {theirs.get('error', 'accepted')}"
    return found


def test_vllm_accepts_what_has_no_error(sources: dict[str, Path]) -> None:
    assert not disagreements(list(sources.values()))


def test_vllm_refuses_what_has_an_error(sources: dict[str, Path], tmp_path: Path) -> None:
    folders = []
    for number, case in enumerate(CASES):
        fair = case.target in (None, "vllm") and case.edit not in TAKEN_BY_THE_LIBRARY
        if case.family != "video_llama_3" and fair:
            draft = drafted(
                sources[f"{case.family}-{case.base}"], tmp_path / f"{number}-{case.rule}"
            )
            case.edit(draft)
            folders.append(written(draft))
    assert not disagreements(folders)


def test_vllm_splits_layers_over_two_processes_where_the_rules_say_so(
    sources: dict[str, Path],
) -> None:
    folders = [sources[f"qwen2_vl-{name}"] for name in ("w4a16", "w8a8-all", "nvfp4", "fp8")]
    for folder, theirs in verdicts(
        folders, "--tensor-parallel", "2", "--capability", BLACKWELL
    ).items():
        notes = [f.what for f in check(folder, "vllm").findings if "of 2 does not" in f.what]
        assert bool(notes) == (not theirs["ok"]), (folder, notes, theirs)


def test_vllm_runs_w4a8_as_w4a16(sources: dict[str, Path]) -> None:
    """What the rule ``vllm.w4a8`` warns of: a kernel that leaves inputs in 16 bits."""
    folder = sources["qwen2_vl-w4a8"]
    assert "vllm.w4a8" in {finding.rule for finding in check(folder, "vllm").findings}
    for capability, kernel in {
        "8.0": "MarlinLinearKernel",
        "9.0": "MacheteLinearKernel",
        "10.0": "MarlinLinearKernel",
    }.items():
        (said,) = verdicts([folder], "--capability", capability).values()
        assert set(said["kernels"]) == {kernel}
