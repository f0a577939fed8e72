"""Every number format, in every export, by every reader: what is equal, refused, or not testable.

    python -m bench.formats_matrix --out docs/format-matrix.md \\
        [--vllm-python PATH --vllm-path DIR]           (see bench/vllm_loader.py)
        [--gptqmodel-python PATH]                      (see bench/peers/gptqmodel_reader.py)
        [--compressed-tensors-017-python PATH]         (see bench/peers/decompress.py)

Small random models of every family are quantized in each format, rounded to nearest, exported in
each format and read by each reader; a cell says what came of it, nothing is known beforehand.
Readers whose environment is not given are left out. Tables go to --out, progress to stderr, and all
cells as one JSON line to stdout. The exit status is 1 if anything differs that was read.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.matrix import outside, readers, table
from bench.matrix.cases import Case, cases
from bench.matrix.cells import Cell, foretold, refused, stopped
from prismquant.api import export, quantize
from prismquant.check import Severity, check
from prismquant.errors import PrismQuantError
from prismquant.export.compressed_tensors.stored import open_checkpoint
from prismquant.plan.bit_layout import DENSE

sys.path.append("tests")
import tiny_vlm

# Wide enough for blocks of 128 in every layer, keys and values too, and for kernels' tiles.
WIDTHS = {"HIDDEN": 256, "INTERMEDIATE": 512, "HEADS": 8, "KV_HEADS": 4}
EXPORTS = ("dense", "modelopt", "gptq", "awq", "gguf")
BLACKWELL = "10.0"
CAPABILITIES = ("8.0", "8.9", "9.0", BLACKWELL)
# vLLM's kernels are the same for all families; they are listed for this one.
KERNELS_OF = "qwen2_5_vl"

Cells = dict[str, Cell]
Rows = dict[str, Cells]


def main() -> int:
    """Fill the matrix, and write it."""
    options = arguments()
    torch.set_num_threads(1)
    for name, width in WIDTHS.items():
        setattr(tiny_vlm, name, width)
    chosen = [c for c in cases() if any(fnmatch.fnmatch(c.name, p) for p in options.cases)]
    matrix, kernels, verdicts = reused(options.reuse)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        data = tiny_vlm.samples(Path(work) / "data", count=3)
        for family in options.families:
            done = matrix.setdefault(family, {})
            left = [case for case in chosen if case.name not in done]
            if not left:
                continue
            folder = Path(work) / family
            place = tiny_vlm.build(family, folder / "source", dtype=torch.bfloat16, llm_blocks=1)
            source = readers.Source(family, place, data)
            jobs = {}
            for number, case in enumerate(left):
                told = f"{family} {number + 1}/{len(left)} {case.name}"
                print(f"{time.monotonic() - started:6.0f} s  {told}", file=sys.stderr, flush=True)
                cells, job = inside(source, case, folder, data)
                done[case.name] = cells
                jobs[case.name] = job
            print(f"{family}: readers outside", file=sys.stderr, flush=True)
            answers = read_outside(options, done, jobs)
            verdicts += disagreements(family, done, jobs, answers)
            if options.vllm_python and family == options.kernels_of:
                kernels |= kernels_by_gpu(options, jobs)
            shutil.rmtree(folder)
    matrix = {family: matrix[family] for family in options.families}
    differing = [
        f"{family}: {name}: {column}: {cell.what} ({cell.apart})"
        for family, rows in matrix.items()
        for name, cells in rows.items()
        for column, cell in cells.items()
        if cell.verdict == "differs"
    ]
    if options.out is not None:
        options.out.write_text(page(chosen, matrix, kernels, verdicts), encoding="utf-8")
    print(json.dumps(as_json(matrix, kernels, verdicts, differing)))
    return int(bool(differing))


def reused(files: Sequence[Path]) -> tuple[dict[str, Rows], dict[str, dict[str, str]], list[str]]:
    """Cells, kernels and verdicts of earlier runs, so that a long one can be done in parts."""
    matrix: dict[str, Rows] = {}
    kernels: dict[str, dict[str, str]] = {}
    verdicts: list[str] = []
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
        for family, rows in found["cells"].items():
            matrix.setdefault(family, {}).update(
                {
                    name: {column: Cell(**cell) for column, cell in cells.items()}
                    for name, cells in rows.items()
                }
            )
        kernels |= found["kernels"]
        verdicts += found["check_disagrees"]
    return matrix, kernels, verdicts


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=tiny_vlm.FAMILIES)
    parser.add_argument("--cases", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--vllm-python", help="of the environment with vLLM's files")
    parser.add_argument("--vllm-path", default="", help="folder that holds vllm/")
    parser.add_argument("--gptqmodel-python")
    parser.add_argument("--compressed-tensors-017-python", dest="older_python")
    parser.add_argument("--kernels-of", default=KERNELS_OF, help="family for vLLM's kernels")
    parser.add_argument("--work", help="folder for temporary files")
    parser.add_argument("--reuse", type=Path, nargs="+", default=[], help="earlier JSON lines")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def inside(
    source: readers.Source, case: Case, folder: Path, data: Path
) -> tuple[Cells, dict[str, outside.Job]]:
    """Quantize, export, and read with what runs here.

    Returns:
        The cells, and by export what readers outside can read.
    """
    out, cells = folder / case.folder, Cells()
    try:
        plan = quantize(source.folder, case.recipe(), out / "run", data).plan
    except PrismQuantError as error:
        return {"load": refused(error)}, {}
    cells["bytes"] = readers.attempted(readers.sizes, plan, out / "run")
    written = out / "compressed-tensors"
    if any(row.layout != DENSE for row in plan.quantized) or plan.kv_cache is not None:
        export(out / "run", "compressed-tensors", written)
    else:
        shutil.copytree(out / "run", written)
    try:
        cells["load"], model, logits = readers.own(source, plan, written)
    except Exception as error:
        return cells | {"load": stopped(f"{type(error).__name__}: {error}")}, {}
    theirs = readers.attempted(readers.transformers, source, written, logits)
    cells["transformers"] = foretold(theirs, plan.remarks)
    ready = exported(out, cells)
    for name, read, given in (
        ("dense", readers.dense, (out / "dense", model)),
        ("gguf", readers.gguf, (source, plan, out / "gguf", model)),
        ("modelopt", readers.modelopt, (source, plan, out / "modelopt", model)),
    ):
        if name in ready:
            cells[name] = readers.attempted(read, *given)
    layers = {layer.prefix: layer.called for layer in open_checkpoint(written).quantized}
    return cells, {
        name: outside.Job(out / name, out / "dense", layers, plan.remarks)
        for name in ("compressed-tensors", *ready)
    }


def exported(out: Path, cells: Cells) -> list[str]:
    """Write what can be written; what cannot has its cells."""
    ready = []
    for name in EXPORTS:
        options = {"dtype": torch.float32} if name == "dense" else None
        try:
            export(out / "run", name, out / name, options=options)
        except PrismQuantError as error:
            cells[name] = refused(error)
            if f"{name}-vllm" in table.COLUMNS:
                cells[f"{name}-vllm"] = cells[name]
        except Exception as error:  # a refusal has its reasons, anything else is a fault of ours
            cells[name] = Cell("differs", f"PrismQuant fails: {type(error).__name__}: {error}")
        else:
            ready.append(name)
    return ready


def read_outside(
    options: argparse.Namespace, rows: Rows, jobs: dict[str, dict[str, outside.Job]]
) -> outside.Answers:
    """Fill the cells of readers with an environment of their own.

    Returns:
        vLLM's answers by folder.
    """

    def of(*names: str) -> Iterator[tuple[str, str, outside.Job]]:
        for case, made in jobs.items():
            yield from ((case, name, made[name]) for name in names if name in made)

    plain = [(case, job) for case, _, job in of("compressed-tensors")]
    if options.older_python:
        told = outside.decompressed(options.older_python, [j for _, j in plain if j.layers])
        for case, job in plain:
            nothing = Cell("absent", "all weights are stored in floating point")
            rows[case]["decompress"] = told.get(job.folder, nothing)
    if options.gptqmodel_python:
        integers = list(of("gptq", "awq"))
        told = outside.gptqmodel(options.gptqmodel_python, [job for _, _, job in integers])
        for case, name, job in integers:
            rows[case][name] = told[job.folder]
    if not options.vllm_python:
        return {}
    found = list(of("compressed-tensors", "modelopt", "gptq", "awq"))
    given = (options.vllm_python, options.vllm_path)
    answers = outside.vllm(*given, [job.folder for _, _, job in found], BLACKWELL)
    for case, name, job in found:
        column = "vllm" if name == "compressed-tensors" else f"{name}-vllm"
        cell = outside.vllm_cell(answers.get(str(job.folder)))
        rows[case][column] = foretold(cell, job.remarks) if column == "vllm" else cell
    return answers


def disagreements(
    family: str,
    rows: Rows,
    jobs: dict[str, dict[str, outside.Job]],
    answers: outside.Answers,
) -> list[str]:
    """Where ``prismquant check`` says other than the readers."""
    found: list[str] = []
    for case, made in jobs.items():
        for name, job in made.items():
            if str(job.folder) in answers:
                column = "vllm" if name == "compressed-tensors" else f"{name}-vllm"
                found += _disagreement(f"{family}: {case}", column, "vllm", job, rows[case])
        if "compressed-tensors" in made:
            job = made["compressed-tensors"]
            found += _disagreement(
                f"{family}: {case}", "transformers", "transformers", job, rows[case]
            )
    return found


def _disagreement(
    where: str, column: str, reader: str, job: outside.Job, cells: Cells
) -> Iterator[str]:
    report, cell = check(job.folder, reader), cells[column]
    # What is told as a warning is told.
    warned = cell.verdict == "stopped" and any(
        finding.severity is Severity.WARNING and finding.rule.startswith(f"{reader}.")
        for finding in report.findings
    )
    if cell.verdict != "foretold" and report.ok != (cell.verdict == "ran") and not warned:
        said = ", ".join(sorted({finding.rule for finding in report.errors})) or "fine"
        yield f"{where}: {column}: check says {said}; the reader: {cell.verdict}: {cell.what}"


def kernels_by_gpu(
    options: argparse.Namespace, jobs: dict[str, dict[str, outside.Job]]
) -> dict[str, dict[str, str]]:
    """Schemes and kernels that vLLM takes, for checkpoints as they are written."""
    folders = {
        case: made["compressed-tensors"].folder
        for case, made in jobs.items()
        if "compressed-tensors" in made
    }
    found: dict[str, dict[str, str]] = {case: {} for case in folders}
    for capability in CAPABILITIES:
        given = (options.vllm_python, options.vllm_path, list(folders.values()))
        answers = outside.vllm(*given, capability)
        for case, folder in folders.items():
            answer = answers.get(str(folder))
            cell = outside.vllm_cell(answer)
            kernel = outside.named(answer["kernels"]) if answer and "kernels" in answer else ""
            told = f"{cell.what}: {kernel}" if kernel else cell.what
            found[case][capability] = told if cell.verdict == "ran" else "✗"
    return found


def page(
    chosen: Sequence[Case],
    matrix: dict[str, Rows],
    kernels: dict[str, dict[str, str]],
    verdicts: Sequence[str],
) -> str:
    """The whole page."""
    groups: dict[str, list[str]] = {}
    for case in chosen:
        groups.setdefault(case.group, []).append(case.name)
    parts = [
        "# Formats, exports and readers\n",
        f"Written by `python -m bench.formats_matrix`: {len(chosen)} recipes, "
        f"{len(matrix)} families ({', '.join(matrix)}), rounded to nearest. Every cell was run; "
        f"transformers {version('transformers')} with compressed-tensors "
        f"{version('compressed-tensors')}, gguf {version('gguf')}.\n",
        LEGEND,
        "## Totals\n",
        table.totals_table(matrix),
        "## Cells\n",
        table.rendered(matrix, groups),
    ]
    if kernels:
        parts += ["## What vLLM takes, by GPU\n", KERNELS, table.kernels_table(kernels)]
    parts += ["## Where `prismquant check` and a reader disagree\n"]
    parts += ["\n".join(f"- {line}" for line in verdicts) + "\n" if verdicts else "Nowhere.\n"]
    return "\n".join(parts)


LEGEND = """\
| | |
|---|---|
| `=` | read, and equal to the last bit; where it is logits, exactly equal |
| `2e-07` | read, and equal but for that: logits, relative to the largest |
| a name | vLLM's loader takes every tensor, under that scheme; it computes nothing here |
| `!` | not read as it is meant, for a reason that is known: see the note |
| `–` | PrismQuant refuses the export; the note says why |
| `✗` | the reader gives up; the note says why |
| `≠` | read, and something else |
| `·` | nothing to read, or nobody to ask |

- *bytes*: every layer's, and in all, are those of the plan.
- *`prismquant.load`*: weights and logits equal those of a model that is put together from the plan,
  without reading the configuration.
- *transformers*: logits, in float32, of two texts, a picture and a clip.
- *compressed-tensors 0.17*: its `decompress` gives our weights, rounded to the dtype that it gives.
- *vLLM*: for a GPU of capability 10.0.
- vLLM 0.33 has no class for VideoLLaMA3; the note tells where its fallback to that of transformers
  ends in the environment that was used.
- *ModelOpt: formula*: `weight * weight_scale * weight_scale_2`, written down anew.
"""
KERNELS = """\
Scheme and kernel that vLLM's own code chooses when it is told that it runs on such a GPU: 8.0
Ampere, 8.9 Ada, 9.0 Hopper, 10.0 Blackwell. Kernels of packages that are not installed (FlashInfer,
DeepGEMM) are not among them. ✗: it finds none.
"""


def as_json(
    matrix: dict[str, Rows],
    kernels: dict[str, dict[str, str]],
    verdicts: Sequence[str],
    differing: Sequence[str],
) -> dict[str, Any]:
    """Everything, as JSON types."""
    return {
        "totals": table.totals(matrix),
        "differing": list(differing),
        "check_disagrees": list(verdicts),
        "kernels": kernels,
        "cells": {
            family: {
                name: {column: cell.to_dict() for column, cell in cells.items()}
                for name, cells in rows.items()
            }
            for family, rows in matrix.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
