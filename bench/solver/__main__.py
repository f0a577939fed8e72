"""One layer, solved by us and by other tools, against the least that must be computed.

    python -m bench.solver [--sizes 1536 3584 8960] [--rows N] [--threads 1] [--repeats 1]
        [--llm-compressor-python PATH] [--gptqmodel-python PATH] [--out FILE.md]

For each number of input features, rows are those of the layers of Qwen2-VL that read such an input
(2B: 1536 and 8960, 7B: 3584 and 18944); the Hessian is that of random correlated tokens. All choose
4-bit codes in groups of 128. A tool gets the Hessian: statistics are not on the clock.

Kernels are compiled, or read from their cache, before the clock starts; what that takes is told.

The floor is one Cholesky factorization and the matrix products of one sweep, timed alone. Losses
are ``tr(E H E^T)``, measured for all alike. Seconds are the best of the repeats, by the clock;
those of the CPUs stand beside them, because they suffer less from what else runs on the machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.solver.worker import timed
from prismquant import __version__
from prismquant.algorithms.gptq import GPTQ
from prismquant.algorithms.gptq.row_chunks import peak_solve_bytes
from prismquant.algorithms.problem import LayerProblem, LayerResult, row_losses
from prismquant.diagnostics.solver_diagnostics import GPTQDiagnostics
from prismquant.formats.spec import spec
from prismquant.numerics.ranges import RangeRule
from prismquant.report.tables import format_bytes, markdown_table, rich_table
from prismquant.statistics.hessian import Hessian

ROWS: dict[int, tuple[tuple[int, ...], ...]] = {
    1536: ((8960, 8960), (1536,)),
    3584: ((18944, 18944),),
    8960: ((1536,),),
    18944: ((3584,),),
}
_THEIRS = GPTQ(order="activation", damping=0.01, damping_basis="mean", refine_passes=0)
# The solver, and to what it rounds factors of large products where the processor multiplies that.
OURS = {
    "ours": (GPTQ(), torch.bfloat16),
    "ours in float32": (GPTQ(), torch.float32),
    "ours, their algorithm": (_THEIRS, torch.bfloat16),
    "ours, their algorithm in float32": (_THEIRS, torch.float32),
}
PEERS = {"llm-compressor": "llm_compressor", "gptqmodel": "gptqmodel"}
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, eq=False)
class Case:
    """One input, the layers that read it, and its Hessian."""

    weights: tuple[Tensor, ...]
    hessian: Tensor

    @property
    def title(self) -> str:
        """Inputs and rows."""
        return f"{len(self.hessian)} -> {' + '.join(str(len(w)) for w in self.weights)}"

    def loss(self, values: Sequence[Tensor]) -> float:
        """Of the values chosen for all layers, together."""
        pairs = zip(self.weights, values, strict=True)
        return sum(float(row_losses(w - v, self.hessian).sum()) for w, v in pairs)


def make_case(features: int, rows: Sequence[int], tokens: int) -> Case:
    """Random weights, and tokens whose features correlate and differ in size."""
    generator = torch.Generator().manual_seed(features)
    rank = max(1, features // 16)
    mix = torch.randn(rank, features, generator=generator) / rank**0.5
    sizes = torch.exp(0.5 * torch.randn(features, generator=generator))
    record = Hessian(features)
    for start in range(0, tokens, 1024):
        count = min(1024, tokens - start)
        x = torch.randn(count, rank, generator=generator) @ mix
        x += 0.3 * torch.randn(count, features, generator=generator)
        record.update(x * sizes)
    weights = tuple(0.02 * torch.randn(r, features, generator=generator) for r in rows)
    return Case(weights, record.result())


def floor(case: Case, repeats: int) -> dict[str, float]:
    """One Cholesky factorization, and the products of a sweep with no rounding in between."""
    damped = case.hessian.clone()
    damped.diagonal().mul_(1.1)
    weights = torch.cat([w.T for w in case.weights], dim=1)
    errors = torch.zeros_like(weights)

    def work() -> None:
        factor = torch.linalg.cholesky(damped)
        for start in range(0, len(weights), 128):
            block = slice(start, start + 128)
            torch.addmm(weights[block], factor[block, :start], errors[:start])

    return timed(repeats, work)


def solve_ours(case: Case, solver: GPTQ, products: torch.dtype, repeats: int) -> dict[str, Any]:
    """What ours takes, and its loss."""
    problem = LayerProblem(
        tuple(f"layer {i}" for i in range(len(case.weights))),
        case.weights,
        spec("int4-g128"),
        RangeRule("minmax"),
        torch.float32,
        case.hessian,
        products=products,
    )
    results: list[LayerResult] = []

    def work() -> None:
        results[:] = [solver.solve(problem)]

    took = timed(repeats, work)
    loss = case.loss([w.dequantize() for w in results[0].weights])
    diagnostics = results[0].diagnostics
    assert isinstance(diagnostics, GPTQDiagnostics)
    return {**took, "loss": loss, "kernel": diagnostics.kernel}


def warm_up() -> float:
    """Solve a small layer, so that all kernels are at hand, and say how many seconds that took."""
    clock = time.perf_counter()
    solve_ours(make_case(128, (16,), 256), *OURS["ours"], 1)
    return time.perf_counter() - clock


def solve_peer(
    case: Case, python: Path, module: str, repeats: int, threads: int
) -> dict[str, Any] | str:
    """What another tool takes, and its loss; or the end of its complaint."""
    with tempfile.TemporaryDirectory() as folder:
        problem, result = Path(folder) / "problem.safetensors", Path(folder) / "result.safetensors"
        named = {f"weight.{i}": w.contiguous() for i, w in enumerate(case.weights)}
        save_file({"hessian": case.hessian, **named}, problem)
        command = [str(python), "-m", f"bench.solver.{module}", str(problem), str(result)]
        command += ["--repeats", str(repeats), "--threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
        )
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["failed without a word"])[-1]
        told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        values = load_file(result)
        return {**told, "loss": case.loss([values[name] for name in named])}


def table_rows(title: str, runs: dict[str, dict[str, Any] | str]) -> list[list[str]]:
    """Lines of the table for one case.

    Args:
        title: Of the case.
        runs: By what ran: seconds by clock and CPU and the loss (the floor has none), or why it did
            not.

    Returns:
        What ran, seconds, CPU seconds, CPU seconds of the floor's and of the best peer's, and the
        loss over the best.
    """
    done = {name: run for name, run in runs.items() if not isinstance(run, str)}
    least = done["floor"]["cpu_seconds"]
    peers = [run["cpu_seconds"] for name, run in done.items() if name in PEERS]
    best = min(run["loss"] for run in done.values() if "loss" in run)
    rows = []
    for name, run in runs.items():
        if isinstance(run, str):
            rows.append([title, name, f"not run: {run[:40]}", "", "", "", ""])
            continue
        rows.append(
            [
                title,
                name,
                f"{run['seconds']:.2f}",
                f"{run['cpu_seconds']:.2f}",
                f"{run['cpu_seconds'] / least:.2f}",
                f"{run['cpu_seconds'] / min(peers):.2f}" if peers else "",
                f"{run['loss'] / best:.3f}" if "loss" in run else "",
            ]
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.solver", description="the solver alone")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1536, 3584, 8960])
    parser.add_argument("--rows", type=int, help="of one layer, in place of the real models'")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    for peer in PEERS:
        parser.add_argument(f"--{peer}-python", type=Path, dest=peer)
    parser.add_argument("--out", type=Path, help="where to write the table, as Markdown")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    headers = ["layer", "what", "s", "CPU s", "of floor", "of best peer", "loss over best"]
    rows: list[list[str]] = []
    results: list[dict[str, Any]] = []
    warm = warm_up()
    for features in options.sizes:
        shapes = ((options.rows,),) if options.rows else ROWS.get(features, ((features,),))
        for shape in shapes:
            case = make_case(features, shape, options.tokens)
            runs: dict[str, dict[str, Any] | str] = {"floor": floor(case, options.repeats)}
            for name, (solver, products) in OURS.items():
                runs[name] = solve_ours(case, solver, products, options.repeats)
            for name, module in PEERS.items():
                python = getattr(options, name)
                runs[name] = "no environment was named"
                if python is not None:
                    runs[name] = solve_peer(case, python, module, options.repeats, options.threads)
            rows += table_rows(case.title, runs)
            peak = peak_solve_bytes(features, sum(shape))
            results.append({"features": features, "rows": shape, "peak": peak, "runs": runs})
            print(markdown_table(headers, rows[-len(runs) :]), flush=True)
            print(f"{case.title}: the solver may take {format_bytes(peak)} beside its problem")
    kernel = results[-1]["runs"]["ours"]["kernel"]
    title = f"int4-g128, {options.tokens} tokens, {options.threads} thread(s), kernel {kernel}"
    Console(width=120, highlight=False).print(rich_table(headers, rows, title=title))
    if options.out is not None:
        options.out.write_text(markdown_table(headers, rows) + "\n", encoding="utf-8")
    facts: dict[str, Any] = {"version": __version__, "threads": options.threads, "warm_up": warm}
    for package in ("torch", "numba"):
        facts[package] = importlib.metadata.version(package)
    print(json.dumps({"bench": "solver", **facts, "results": results}))


if __name__ == "__main__":
    main()
