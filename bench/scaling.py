"""How long large models take on several ranks, derived from parts that are measured here.

    python -m bench.scaling [--tokens 65536] [--ranks 1 8 64] [--out FILE.md]

Measured on this machine, with one process and one thread: a product in the shapes of a forward
pass and in the dtype that a run takes by default, an update of second moments in it, GPTQ solves of
several sizes, the hand-over of a matrix between two processes, and writing to the disk. From the
shapes of a model follow how many operations of each kind a W4A16 run takes, and from both the
seconds. Nothing here has run on a cluster: reading of the source, waiting for the slowest rank and
the vision tower are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from prismquant.algorithms.gptq import GPTQ
from prismquant.algorithms.problem import LayerProblem
from prismquant.formats.spec import spec
from prismquant.numerics.ranges import RangeRule
from prismquant.report.tables import markdown_table, rich_table
from prismquant.runtime.mixed import Precision
from prismquant.statistics.hessian import Hessian
from prismquant.storage import write_bytes, write_text

HEADERS = (
    *("model", "ranks", "forward", "moments", "solve", "exchange", "write", "in all"),
    "sent by a rank",
)


@dataclass(frozen=True)
class Group:
    """Layers of a block that share an input.

    Attributes:
        columns: Features of the input.
        rows: Of all the layers.
        count: Such groups in a block; more than one are experts.
        share: Of the tokens that reach each of them.
    """

    columns: int
    rows: int
    count: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class Shape:
    """A language model, as far as its cost goes."""

    blocks: int
    groups: tuple[Group, ...]

    @property
    def parameters(self) -> float:
        """Of the layers that are quantized."""
        return float(self.blocks * sum(g.count * g.columns * g.rows for g in self.groups))

    @property
    def active(self) -> float:
        """Of these, how many a token meets."""
        return float(self.blocks * sum(g.count * g.share * g.columns * g.rows for g in self.groups))


def dense(blocks: int, hidden: int, intermediate: int, keys: int) -> Shape:
    """Queries, keys and values; output; gate and up; down."""
    groups = (
        Group(hidden, hidden + 2 * keys),
        Group(hidden, hidden),
        Group(hidden, 2 * intermediate),
        Group(intermediate, hidden),
    )
    return Shape(blocks, groups)


def experts(
    blocks: int, hidden: int, heads: int, keys: int, expert: int, count: int, active: int
) -> Shape:
    """Attention, and experts of which each token meets some."""
    groups = (
        Group(hidden, heads + 2 * keys),
        Group(heads, hidden),
        Group(hidden, 2 * expert, count, active / count),
        Group(expert, hidden, count, active / count),
    )
    return Shape(blocks, groups)


MODELS = {
    "7B (Qwen2.5-VL)": dense(28, 3584, 18944, 512),
    "72B (Qwen2.5-VL)": dense(80, 8192, 29568, 1024),
    "235B-A22B (Qwen3-VL)": experts(94, 4096, 8192, 512, 1536, 128, 8),
}


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Attributes:
        forward: Operations a second of a forward pass; a multiplication and an addition are two.
        moments: The same of an update, in which half of them are saved.
        cubic: Seconds of a solve for each n^3.
        square: And for each n^2 rows.
        exchange: Bytes a second that are added up over two processes.
        write: Bytes a second to the disk, flushed.
    """

    forward: float
    moments: float
    cubic: float
    square: float
    exchange: float
    write: float


@dataclass(frozen=True)
class Estimate:
    """Seconds of each part, and what one rank sends."""

    forward: float
    moments: float
    solve: float
    exchange: float
    write: float
    sent: float

    @property
    def total(self) -> float:
        """Seconds in all: parts do not overlap."""
        return self.forward + self.moments + self.solve + self.exchange + self.write


def estimate(shape: Shape, tokens: int, ranks: int, rates: Rates) -> Estimate:
    """What a W4A16 run takes: one forward pass, second moments, solves, the exchange, writing."""
    moments = sum(g.count * g.share * tokens * g.columns**2 for g in shape.groups)
    solve = sent = 0.0
    for group in shape.groups:
        factor = rates.cubic * group.columns**3
        sweep = rates.square * group.columns**2 * group.rows
        if group.count >= ranks:
            solve += group.count * (factor + sweep) / ranks
        else:
            # Cut by rows: every rank factorizes for itself.
            solve += group.count * (factor + sweep / ranks)
        # Half a matrix of float64, then codes of a byte and scales.
        sent += group.count * (4.0 * group.columns**2 + 1.02 * group.columns * group.rows / ranks)
    alone = ranks == 1
    return Estimate(
        forward=2 * shape.active * tokens / rates.forward / ranks,
        moments=shape.blocks * moments / rates.moments / ranks,
        solve=shape.blocks * solve,
        exchange=0.0 if alone else shape.blocks * sent / rates.exchange,
        write=shape.parameters * 0.52 / rates.write,
        sent=0.0 if alone else shape.blocks * sent,
    )


def seconds(
    work: Callable[[], object], rounds: int = 3, clock: Callable[[], float] = time.process_time
) -> float:
    """The least of some rounds, after one that is not counted; of CPU, which others do not slow."""
    work()
    best = float("inf")
    for _ in range(rounds):
        started = clock()
        work()
        best = min(best, clock() - started)
    return best


def solve_seconds(columns: int, rows: int, products: torch.dtype) -> float:
    """One solve with the default options, of layers that multiply in a dtype."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * columns, columns, generator=generator)
    hessian = x.T @ x / len(x)
    weight = torch.randn(rows, columns, generator=generator)

    def work() -> None:
        problem = LayerProblem(
            *(("layer",), (weight,), spec("int4-g128"), RangeRule(), torch.bfloat16),
            hessian=hessian.clone(),
            products=products,
        )
        GPTQ().solve(problem)

    return seconds(work, 1)


_EXCHANGE = """
import sys, time, torch
from prismquant.distributed import joined
with joined() as ranks:
    x = torch.zeros(int(sys.argv[1]) // 8, dtype=torch.float64)
    ranks.sum_(x)
    started = time.perf_counter()
    for _ in range(3):
        ranks.sum_(x)
    if ranks.rank == 0:
        print(3 * x.nbytes / (time.perf_counter() - started))
"""


def exchange_rate(work: Path, size: int = 1 << 27) -> float:
    """Bytes a second that two processes of this machine add up."""
    script = work / "exchange.py"
    script.write_text(_EXCHANGE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(size)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )
    return float(done.stdout.split()[-1])


def measure_rates(work: Path) -> Rates:
    """All parts, on this machine."""
    precision = Precision.chosen(None, torch.device("cpu"), torch.bfloat16)
    products = precision.products or precision.dtype
    x = torch.randn(1024, 2048).to(products)
    weight = torch.randn(4096, 2048).to(products)
    forward = 2.0 * 1024 * 2048 * 4096 / seconds(lambda: torch.nn.functional.linear(x, weight))
    record = Hessian(2048)
    moments = 1024 * 2048.0**2 / seconds(lambda: record.update(x))
    # Two sizes and two numbers of rows decide both coefficients.
    narrow, wide = (solve_seconds(1536, rows, products) for rows in (512, 4096))
    square = (wide - narrow) / (1536.0**2 * (4096 - 512))
    rest = solve_seconds(3072, 512, products) - square * 3072.0**2 * 512
    cubic = max(rest, 0.0) / 3072.0**3
    data = os.urandom(1 << 28)
    written = len(data) / seconds(lambda: write_bytes(work / "data", data), 2, time.perf_counter)
    return Rates(forward, moments, cubic, square, exchange_rate(work), written)


def duration(value: float) -> str:
    """Seconds as a person says them."""
    if value < 1:
        return "0" if value == 0 else "< 1 s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, derive, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling")
    parser.add_argument("--tokens", type=int, default=65536, help="of the calibration set")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rates = measure_rates(Path(folder))
    rows, found = [], []
    for name, shape in MODELS.items():
        for ranks in options.ranks:
            parts = estimate(shape, options.tokens, ranks, rates)
            times = (parts.forward, parts.moments, parts.solve, parts.exchange, parts.write)
            told = [duration(part) for part in (*times, parts.total)]
            rows.append([name, str(ranks), *told, f"{parts.sent / 2**30:.1f} GiB"])
            found.append({"model": name, "ranks": ranks, "seconds": asdict(parts)})
    title = f"derived: W4A16 with GPTQ, {options.tokens} tokens, one thread a rank"
    Console(width=160).print(rich_table(HEADERS, rows, title=title))
    measured = [[name, f"{value:.3g}"] for name, value in asdict(rates).items()]
    Console(width=160).print(rich_table(("measured", "value"), measured))
    if options.out:
        tables = markdown_table(("measured", "value"), measured), markdown_table(HEADERS, rows)
        write_text(options.out, "\n\n".join(tables) + "\n")
    versions = {"torch": torch.__version__, "threads": 1, "cores": os.cpu_count()}
    print(json.dumps({"rates": asdict(rates), "derived": found, **versions}))


if __name__ == "__main__":
    main()
