"""Default threads beside busy processes, against one thread: a ratio of seconds.

    python -m bench.threads [--busy 0 2] [--repeats 3] [--samples 64] [--recipe w4a16]

Quantizes the embedded model from the command line, in turn with `OMP_NUM_THREADS=1` and with
nothing said of threads, while so many other processes do nothing but spin. Seconds are of the
clock, from start to checkpoint; of each kind the median counts. What the machine does besides
falls on both alike.
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
from pathlib import Path

import torch
from rich.console import Console

from bench.engine.process import measure
from prismquant.demo.run import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.pipeline.checkpoint import RunDirectory
from prismquant.report.tables import rich_table

_OF_OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_")


@contextlib.contextmanager
def spinning(count: int) -> Iterator[None]:
    """Within the block, so many processes keep a core busy each, or share them."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds_of(
    work: Path, options: argparse.Namespace, said: Mapping[str, str]
) -> tuple[float, str]:
    """A run in a process of its own: its seconds, and the threads of its steps.

    Raises:
        ChildProcessError: It failed.
    """
    plain = {k: v for k, v in os.environ.items() if not k.startswith(_OF_OPENMP)}
    command = [sys.executable, "-m", "prismquant", "quantize", str(CHECKPOINT)]
    command += ["--recipe", options.recipe, "--calib", str(work / "data" / "calibration.jsonl")]
    took = measure(
        [*command, "--out", str(work / "out")], log=work / "log.txt", environment=plain | dict(said)
    )
    if took.code:
        raise ChildProcessError(took.tail)
    record = RunDirectory(work / "out").load()
    shutil.rmtree(work / "out")
    return took.seconds, " then ".join(map(str, record.threads))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--recipe", default="w4a16")
    options = parser.parse_args(arguments)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_dataset(work / "data", split="calibration", count=options.samples)
        for busy in options.busy:
            one: list[float] = []
            default: list[float] = []
            chosen: list[str] = []
            with spinning(busy):
                for _ in range(options.repeats):
                    one.append(seconds_of(work, options, {"OMP_NUM_THREADS": "1"})[0])
                    seconds, threads = seconds_of(work, options, {})
                    default.append(seconds)
                    chosen.append(threads)
            first, second = statistics.median(one), statistics.median(default)
            told = f"{second:.1f} (threads: {', '.join(chosen)})"
            rows.append([str(busy), f"{first:.1f}", told, f"{second / first:.2f}"])
    headers = ["busy processes", "one thread, s", "default, s", "ratio"]
    title = f"{options.recipe}, {os.cpu_count()} cores, torch {torch.__version__}"
    Console(width=110).print(rich_table(headers, rows, title=title))


if __name__ == "__main__":
    main()
