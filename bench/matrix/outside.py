"""Readers that need an environment of their own; each is started once for many checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.matrix.cells import Cell, compared, stopped

_ROOT = Path(__file__).parent.parent.parent
_PREFIXES = ("CompressedTensors", "ModelOpt", "Auto")
# What vLLM gives layers that are not quantized, and the cache.
_PLAIN = ("Unquantized", "KVCacheMethod")

Answers = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One checkpoint to read.

    Attributes:
        folder: Where it is.
        dense: The same weights in float32.
        layers: What the configuration calls each quantized layer, by its prefix on disk.
        remarks: The plan's.
    """

    folder: Path
    dense: Path
    layers: Mapping[str, str]
    remarks: tuple[str, ...]


def decompressed(python: str, jobs: Sequence[Job]) -> dict[Path, Cell]:
    """Weights as another version of compressed-tensors decompresses them."""
    answers = _asked([python, "-m", "bench.peers.decompress"], jobs)
    return {job.folder: _decompressed(answers.get(str(job.folder))) for job in jobs}


def gptqmodel(python: str, jobs: Sequence[Job]) -> dict[Path, Cell]:
    """Weights as GPTQModel dequantizes them."""
    answers = _asked([python, "-m", "bench.peers.gptqmodel_reader"], jobs)
    return {job.folder: _gptqmodel(answers.get(str(job.folder))) for job in jobs}


def vllm(python: str, path: str, folders: Sequence[Path], capability: str) -> Answers:
    """What vLLM's loader makes of checkpoints on a GPU of that capability, by folder."""
    script = str(_ROOT / "bench" / "vllm_loader.py")
    command = [python, script, "--json", "--capability", capability, *map(str, folders)]
    return {line["path"]: line for line in _lines(command, "", {"PYTHONPATH": path})}


def vllm_cell(answer: Mapping[str, Any] | None) -> Cell:
    """That answer as a cell: the scheme that was taken, or why none was."""
    if answer is None:
        return Cell("absent", "the loader gave no answer")
    if "error" in answer:
        return stopped(answer["error"])
    scheme = named(answer["schemes"]) or "floating point"
    if answer["missing"]:
        leaves = {name.rpartition(".")[2] for name in answer["missing"]}
        return Cell("stopped", f"{scheme}: no tensor for {', '.join(sorted(leaves))}")
    return Cell("ran", scheme)


def named(classes: Mapping[str, Any]) -> str:
    """Names of classes for quantized layers, short."""
    found = []
    for name in classes:
        if not any(plain in name for plain in _PLAIN):
            short = name.removesuffix("LinearMethod").removesuffix("LinearKernel")
            for prefix in _PREFIXES:
                short = short.removeprefix(prefix) or short
            found.append(short)
    return ", ".join(sorted(found))


def _decompressed(answer: Mapping[str, Any] | None) -> Cell:
    if answer is None:
        return Cell("absent", "no answer")
    if "error" in answer:
        return stopped(answer["error"])
    return compared(f"weights in {' and '.join(answer['dtypes'])}", answer["apart"])


def _gptqmodel(answer: Mapping[str, Any] | None) -> Cell:
    if answer is None:
        return Cell("absent", "no answer")
    if "error" in answer:
        return stopped(answer["error"])
    if not answer["layers"]:
        return Cell("differs", "no quantized layer was found")
    return compared(f"weights, {' and '.join(answer['classes'])}", answer["worst"])


def _asked(command: Sequence[str], jobs: Iterable[Job]) -> Answers:
    lines = [
        json.dumps({"folder": str(j.folder), "dense": str(j.dense), "layers": dict(j.layers)})
        for j in jobs
    ]
    if not lines:
        return {}
    return {line["folder"]: line for line in _lines(command, "\n".join(lines) + "\n", {})}


def _lines(command: Sequence[str], given: str, environment: Mapping[str, str]) -> list[Any]:
    """JSON lines that a command prints between others."""
    run = subprocess.run(
        list(command),
        input=given,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"')]
    if not found:
        raise SystemExit(f"{' '.join(command[:3])}: {run.stderr[-2000:]}")
    return found
