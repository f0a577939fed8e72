"""Recipes without data against `cp`: gigabytes of checkpoint a second, and peak memory.

    python -m bench.stream [--shape qwen2-vl-2b | --model DIR] [--blocks N]
                           [--recipes w4a16:minmax w4a16 fp8 ..] [--workers 1 2] [--out FILE.md]

Each recipe is a preset with rounding to nearest in place of its solver; after a colon the rule for
the weights' ranges, where it is not the preset's. The source is read once beforehand, so that it
lies in the page cache as far as memory allows, for `cp` and for us alike; both end when the last
byte is on the disk. Each run is a process of its own, with as many workers as threads; its seconds
are those of `prismquant.quantize`, without the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

import prismquant as pq
from bench.engine.models import MODELS, weight_files_bytes, write_model
from bench.engine.process import measure, thread_environment
from prismquant.report.tables import format_bytes, markdown_table, rich_table

RECIPES = ("w4a16:minmax", "w8a16", "fp8:minmax", "mxfp4:minmax", "w4a16", "fp8", "nvfp4a16")
_PIECE = 1 << 24


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        what: The recipe, or ``cp``.
        workers: Steps worked on at a time.
        seconds: By the clock.
        cpu_seconds: Of all threads, with the imports; 0 for ``cp``.
        gigabytes: Of the source, 10^9 bytes.
        written: Bytes of the result's tensors.
        peak: Bytes of the largest resident set; 0 for ``cp``.
    """

    what: str
    workers: int
    seconds: float
    cpu_seconds: float
    gigabytes: float
    written: int
    peak: int

    @property
    def speed(self) -> float:
        """Gigabytes of the source a second."""
        return self.gigabytes / self.seconds


def recipe_of(name: str) -> pq.Recipe:
    """A preset with rounding to nearest, e.g. ``w4a16``; ``w4a16:minmax`` also names the range.

    Raises:
        RecipeError: There is no such preset or rule.
    """
    preset, _, rule = name.partition(":")
    fields = {"solver": "rtn"} | ({"weight_range": rule} if rule else {})
    return pq.load_recipe(preset).without_transforms().with_rules(fields)


def warm(folder: Path) -> None:
    """Read all shards once."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(_PIECE):
                pass


def copy_seconds(folder: Path, target: Path) -> float:
    """Seconds to copy all shards one after the other, until they are on the disk."""
    target.mkdir(parents=True)
    started = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def run(folder: Path, recipe: str, workers: int, work: Path) -> Row:
    """Quantize in a process of its own.

    Raises:
        RuntimeError: The process failed; its last words.
    """
    out, told = work / "out", work / "told.json"
    command = [sys.executable, "-m", "bench.stream", "--model", str(folder), "--recipes", recipe]
    command += ["--alone", str(told), "--work", str(work)]
    measured = measure(command, log=work / "log", environment=thread_environment(workers))
    if measured.code:
        raise RuntimeError(f"{recipe}: {measured.tail}")
    row = Row(
        what=recipe,
        workers=workers,
        seconds=json.loads(told.read_text()),
        cpu_seconds=measured.cpu_seconds,
        gigabytes=weight_files_bytes(folder) / 1e9,
        written=weight_files_bytes(out),
        peak=measured.peak,
    )
    shutil.rmtree(out)
    return row


def alone(folder: Path, recipe: str, out: Path, told: Path) -> None:
    """What the process does: quantize, and leave its seconds in a file."""
    chosen = recipe_of(recipe)
    started = time.perf_counter()
    pq.quantize(folder, chosen, out)
    told.write_text(json.dumps(time.perf_counter() - started))


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells; the first ``cp`` before a row is what it is compared with."""
    headers = ["what", "workers", "s", "CPU s", "GB/s", "of cp", "written", "peak RSS"]
    cells = []
    floor = rows[0]
    for row in rows:
        copied = row.what == "cp"
        floor = row if copied else floor
        cells.append(
            [
                row.what,
                "" if copied else str(row.workers),
                f"{row.seconds:.1f}",
                "" if copied else f"{row.cpu_seconds:.0f}",
                f"{row.speed:.3f}",
                "1" if copied else f"{row.speed / floor.speed:.2f}",
                format_bytes(row.written),
                "" if copied else format_bytes(row.peak),
            ]
        )
    return headers, cells


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """A folder that is given, and kept; or one that is removed afterwards."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy, run all recipes, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shape", default="qwen2-vl-2b", choices=sorted(MODELS))
    source.add_argument("--model", type=Path, help="a checkpoint instead of a random one")
    parser.add_argument("--blocks", type=int, help="cut the random model's towers to so many")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path, help="holds model and results; kept if it is given")
    parser.add_argument("--out", type=Path, help="write the table as Markdown, too")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone is not None:
        alone(options.model, options.recipes[0], options.work / "out", options.alone)
        return
    rows: list[Row] = []
    with work_folder(options.work) as work:
        folder, title = options.model, str(options.model)
        if folder is None:
            shape = MODELS[options.shape]
            shape = shape.cut(options.blocks) if options.blocks else shape
            title = options.shape + (f", {options.blocks} blocks" if options.blocks else "")
            folder = write_model(work / "model", shape)
        gigabytes = weight_files_bytes(folder) / 1e9
        warm(folder)
        for recipe in options.recipes:
            # The disk is not equally fast at all times: a copy before each recipe.
            seconds = copy_seconds(folder, work / "copy")
            rows.append(Row("cp", 1, seconds, 0.0, gigabytes, weight_files_bytes(folder), 0))
            rows += [run(folder, recipe, workers, work) for workers in options.workers]
    headers, cells = table(rows)
    heading = f"{title}: {gigabytes:.2f} GB, {os.cpu_count()} cores"
    Console(width=100, highlight=False).print(rich_table(headers, cells, title=heading))
    if options.out is not None:
        options.out.write_text(f"{heading}\n\n{markdown_table(headers, cells)}\n", encoding="utf-8")
    facts = {"model": title, "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"bench": "stream", **facts, "runs": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
