"""The search for the scales of a weight: with bounds, and weighing every trial as a floor of truth.

    python -m bench.ranges [--rows 3072] [--features 2048] [--threads 1] [--repeats 3]

Both searches run in this process on the same random weight, by turns. Times are the least CPU time
of the repeats, per weight, and both choose the same scales, bit for bit: the last column counts
those that differ. Tables are made in the first repeat, as in the first layer of a model; what that
one takes stands beside.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

from prismquant.numerics import bounds, ranges
from prismquant.numerics.affine import Granularity
from prismquant.numerics.grids import FloatGrid, Grid, IntGrid
from prismquant.numerics.ranges import RangeRule, weight_scales
from prismquant.report.tables import rich_table


@dataclass(frozen=True)
class Case:
    """A format whose scales are searched."""

    name: str
    grid: Grid
    symmetric: bool = True
    group_size: int | None = 128
    dtype: torch.dtype = torch.bfloat16
    weighted: bool = True

    @property
    def granularity(self) -> Granularity:
        """Groups, or channels where there is no group size."""
        return Granularity.GROUP if self.group_size else Granularity.CHANNEL


CASES = (
    Case("int4 g128, bf16 scales", IntGrid(4)),
    Case("int4 g128, no importance", IntGrid(4), weighted=False),
    Case("int4 g128, fp16 scales", IntGrid(4), dtype=torch.float16),
    Case("int4 g128, asymmetric", IntGrid(4), symmetric=False),
    Case("int4 channel", IntGrid(4), group_size=None),
    Case("int3 g128", IntGrid(3)),
    Case("int2 g64, asymmetric", IntGrid(2), symmetric=False, group_size=64),
    Case("int8 channel", IntGrid(8), group_size=None),
    Case("fp8 channel, fp32 scales", FloatGrid("e4m3"), group_size=None, dtype=torch.float32),
    Case("fp8 channel, bf16 scales", FloatGrid("e4m3"), group_size=None),
)
HEADER = ("case", "every trial, ns", "with bounds, ns", "first time, ns", "ratio", "differ")


def search(case: Case, weight: Tensor, importance: Tensor) -> tuple[float, Tensor]:
    """CPU nanoseconds per weight, and the scales."""
    costs = importance if case.weighted else None
    unit = (case.granularity, case.group_size)
    begin = time.process_time()
    scale, _ = weight_scales(
        weight, case.grid, case.symmetric, *unit, RangeRule("mse"), case.dtype, costs
    )
    return (time.process_time() - begin) / weight.numel() * 1e9, scale


def compare(case: Case, weight: Tensor, importance: Tensor, repeats: int) -> dict[str, Any]:
    """Both searches by turns."""
    bounds.loss_table.cache_clear()
    narrowed, full = [], []
    for _ in range(repeats):
        narrowed.append(search(case, weight, importance))
        with mock.patch.object(ranges, "narrows", return_value=False):
            full.append(search(case, weight, importance))
    after, before = (min(took for took, _ in runs) for runs in (narrowed, full))
    return {
        "case": case.name,
        "before": before,
        "after": after,
        "first": narrowed[0][0],
        "ratio": before / after,
        "differ": int((narrowed[0][1] != full[0][1]).sum()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(options.rows, options.features, generator=generator)
    importance = torch.rand(options.features, generator=generator).pow(3) + 0.01
    results = [compare(case, weight, importance, options.repeats) for case in CASES]
    cells = [
        [
            r["case"],
            *(f"{r[key]:.1f}" for key in ("before", "after", "first")),
            f"{r['ratio']:.2f}",
            str(r["differ"]),
        ]
        for r in results
    ]
    title = f"{options.rows} x {options.features}, {options.threads} thread(s), CPU ns per weight"
    Console().print(rich_table(HEADER, cells, title=title))
    print(json.dumps({**vars(options), "results": results}))


if __name__ == "__main__":
    main()
