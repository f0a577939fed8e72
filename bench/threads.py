"""Default threads beside busy processes, against one thread: a ratio of seconds.

    python -m bench.threads [--busy 0 2] [--repeats 3] [--samples 32] [--recipe w4a16]

Quantizes the embedded model from the command line, in turn with `OMP_NUM_THREADS=1` and with
nothing said of threads, while so many other processes do nothing but spin: all the time, or
(*later*) from when the run has chosen its number of threads. Seconds are of the clock, from start
to checkpoint and of the steps alone; of each kind the median counts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from bench.engine.process import measure
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.report.tables import rich_table
from prismquant.run.directory import RunDirectory

_OF_OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_")
# Spins from when a file is there, which may be at once.
_SPIN = """
import os, sys, time
while not os.path.exists(sys.argv[1]): time.sleep(0.02)
while True: pass
"""


@dataclass(frozen=True)
class Took:
    """Seconds of a run.

    Attributes:
        whole: From start to checkpoint.
        steps: Of all its steps.
        threads: What they were computed with.
    """

    whole: float
    steps: float
    threads: str


@contextlib.contextmanager
def spinning(count: int, since: Path) -> Iterator[None]:
    """Within the block, so many processes keep a core busy each, or share them."""
    command = [sys.executable, "-c", _SPIN, str(since)]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(work: Path, options: argparse.Namespace, busy: int, late: bool, **said: str) -> Took:
    """One run in a process of its own, beside others.

    Raises:
        ChildProcessError: It failed.
    """
    out = work / "out"
    plain = {k: v for k, v in os.environ.items() if not k.startswith(_OF_OPENMP)}
    command = [sys.executable, "-m", "prismquant", "quantize", str(CHECKPOINT)]
    command += ["--recipe", options.recipe, "--calib", str(work / "data" / "calibration.jsonl")]
    command += ["--out", str(out)]
    with spinning(busy, RunDirectory(out).record_path if late else work):
        took = measure(command, log=work / "log.txt", environment=plain | said)
    if took.code:
        raise ChildProcessError(took.tail)
    record = RunDirectory(out).load()
    shutil.rmtree(out)
    return Took(took.seconds, record.seconds, " then ".join(map(str, record.threads)))


def row(name: str, first: Sequence[Took], default: Sequence[Took]) -> list[str]:
    """A line of the table."""
    pairs = [
        [statistics.median(getattr(took, what) for took in kind) for kind in (first, default)]
        for what in ("whole", "steps")
    ]
    cells = [f"{ours:.1f} / {one:.1f} = {ours / one:.2f}" for one, ours in pairs]
    return [name, *cells, ", ".join(took.threads for took in default)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--recipe", default="w4a16")
    options = parser.parse_args(arguments)
    rows: list[list[str]] = []
    one_thread: Mapping[str, str] = {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_dataset(work / "data", split="calibration", count=options.samples)
        # Compiles what is cached from then on.
        run(work, options, 0, False, **one_thread)
        cases = [(n, late) for n in options.busy for late in ((False, True) if n else (False,))]
        for busy, late in cases:
            taken: tuple[list[Took], list[Took]] = ([], [])
            for _ in range(options.repeats):
                for kind, said in zip(taken, (one_thread, {}), strict=True):
                    kind.append(run(work, options, busy, late, **said))
            rows.append(row(f"{busy}, later" if late else str(busy), *taken))
    headers = ["busy processes", "whole, s: default / one = ratio", "steps, s", "default's threads"]
    title = f"{options.recipe}, {os.cpu_count()} cores, torch {torch.__version__}"
    Console(width=130).print(rich_table(headers, rows, title=title))


if __name__ == "__main__":
    main()
