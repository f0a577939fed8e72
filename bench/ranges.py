"""The search for the scales of a weight: with a compiled look at all trials, and in torch alone.

    python -m bench.ranges [--rows 3072] [--features 2048] [--threads 1] [--repeats 3]

Both searches run in this process on the same random weight, by turns. Times are the least CPU time
of the repeats, per weight, and both choose the same scales, bit for bit: the last column counts
those that differ. Compiling, or loading what an earlier process has compiled, comes before.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from prismquant.kernels import range_search as compiled
from prismquant.numerics import ranges
from prismquant.numerics.grids import FloatGrid, Grid, IntGrid
from prismquant.numerics.kinds import Granularity, ScaleKind
from prismquant.numerics.ranges import RangeRule
from prismquant.numerics.scales import AnyScale, ScaleFormat, global_scale
from prismquant.report.tables import rich_table


@dataclass(frozen=True)
class Case:
    """A format whose scales are searched."""

    name: str
    grid: Grid
    symmetric: bool = True
    group_size: int | None = 128
    scale: torch.dtype | ScaleKind = torch.bfloat16
    weighted: bool = True

    @property
    def granularity(self) -> Granularity:
        """Groups, or channels where there is no group size."""
        return Granularity.GROUP if self.group_size else Granularity.CHANNEL

    def form(self, weight: Tensor) -> AnyScale:
        """How the scales of a weight are stored."""
        if isinstance(self.scale, torch.dtype):
            return self.scale
        divisor = global_scale(weight.abs().max(), self.grid) if self.scale == "e4m3" else None
        return ScaleFormat(torch.bfloat16, self.scale, divisor)


CASES = (
    Case("int4 g128, bf16 scales", IntGrid(4)),
    Case("int4 g128, no importance", IntGrid(4), weighted=False),
    Case("int4 g128, fp16 scales", IntGrid(4), scale=torch.float16),
    Case("int4 g128, asymmetric", IntGrid(4), symmetric=False),
    Case("int4 g32, asymmetric", IntGrid(4), symmetric=False, group_size=32),
    Case("int4 channel", IntGrid(4), group_size=None),
    Case("int3 g128", IntGrid(3)),
    Case("int2 g64, asymmetric", IntGrid(2), symmetric=False, group_size=64),
    Case("int8 channel", IntGrid(8), group_size=None),
    Case("int8 channel, asymmetric", IntGrid(8), symmetric=False, group_size=None),
    Case("fp8 channel, fp32 scales", FloatGrid("e4m3"), group_size=None, scale=torch.float32),
    Case("fp8 channel, bf16 scales", FloatGrid("e4m3"), group_size=None),
    Case("nvfp4", FloatGrid("e2m1"), group_size=16, scale="e4m3"),
    Case("nvfp4, no importance", FloatGrid("e2m1"), group_size=16, scale="e4m3", weighted=False),
    Case("mxfp4", FloatGrid("e2m1"), group_size=32, scale="e8m0"),
    Case("mxfp8", FloatGrid("e4m3"), group_size=32, scale="e8m0"),
)
HEADER = ("case", "in torch, ns", "with a look, ns", "ratio", "differ")
Way = Callable[..., tuple[Tensor, Tensor | None]]


def search(way: Way, case: Case, weight: Tensor, importance: Tensor) -> tuple[float, Tensor]:
    """CPU nanoseconds per weight, and the scales."""
    costs = importance if case.weighted else None
    unit = (case.granularity, case.group_size)
    form = case.form(weight)
    begin = time.process_time()
    scale, _ = way(weight, case.grid, case.symmetric, *unit, RangeRule("mse"), form, costs)
    return (time.process_time() - begin) / weight.numel() * 1e9, scale.to(torch.float32)


def compare(case: Case, weight: Tensor, importance: Tensor, repeats: int) -> dict[str, Any]:
    """Both searches by turns."""
    ways = (ranges.weight_scales, compiled.weight_scales)
    runs = [[search(way, case, weight, importance) for way in ways] for _ in range(repeats)]
    before, after = (min(turn[way][0] for turn in runs) for way in range(2))
    return {
        "case": case.name,
        "before": before,
        "after": after,
        "ratio": before / after,
        "differ": int((runs[0][0][1] != runs[0][1][1]).sum()),
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
    has_look = compiled.look_for(weight.device) is not None
    results = [compare(case, weight, importance, options.repeats) for case in CASES]
    cells = [
        [
            r["case"],
            *(f"{r[key]:.1f}" for key in ("before", "after")),
            f"{r['ratio']:.2f}",
            str(r["differ"]),
        ]
        for r in results
    ]
    title = f"{options.rows} x {options.features}, {options.threads} thread(s), CPU ns per weight"
    Console().print(rich_table(HEADER, cells, title=title))
    print(json.dumps({**vars(options), "compiled": has_look, "results": results}))


if __name__ == "__main__":
    main()
