"""What the workers share: a problem read from a file, solved and timed, the result left beside it.

A worker runs in an environment of its own and imports nothing from prismquant. The problem is a
safetensors file with ``hessian`` and ``weight.0``, ``weight.1``, ..; the result one with the same
names of weights, holding the values that their codes stand for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Solve = Callable[[Sequence[torch.Tensor], torch.Tensor], list[torch.Tensor]]


def timed(repeats: int, work: Callable[[], object]) -> dict[str, float]:
    """The best of several runs: seconds by the clock, and of this process's CPUs."""
    clocks, cpus = [], []
    for _ in range(repeats):
        clock, cpu = time.perf_counter(), time.process_time()
        work()
        clocks.append(time.perf_counter() - clock)
        cpus.append(time.process_time() - cpu)
    return {"seconds": min(clocks), "cpu_seconds": min(cpus)}


def run(solve: Solve, package: str) -> None:
    """Read the arguments and the problem, solve, and print what it took as one JSON line.

    Args:
        solve: Gets weights ``[out_i, in]`` and Hessian ``[in, in]``, both its own to overwrite, and
            returns the values that were chosen.
        package: Whose version is told.
    """
    parser = argparse.ArgumentParser(description=f"the core of {package}'s GPTQ")
    parser.add_argument("problem", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    best: dict[str, float] = {}
    found: list[torch.Tensor] = []
    for _ in range(options.repeats):
        # Read again each time, and not on the clock, because the tools overwrite what they get.
        tensors = load_file(options.problem)
        hessian = tensors.pop("hessian")
        weights = [tensors[f"weight.{i}"] for i in range(len(tensors))]
        clock, cpu = time.perf_counter(), time.process_time()
        found = solve(weights, hessian)
        took = {
            "seconds": time.perf_counter() - clock,
            "cpu_seconds": time.process_time() - cpu,
        }
        best = {key: min(value, best.get(key, value)) for key, value in took.items()}
    save_file({f"weight.{i}": w.contiguous() for i, w in enumerate(found)}, options.result)
    versions = {name: importlib.metadata.version(name) for name in (package, "torch")}
    print(json.dumps({**best, "versions": versions, "threads": torch.get_num_threads()}))
