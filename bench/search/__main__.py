"""How well each method of analysis ranks what units lose, and what the mixes found by it lose.

    python -m bench.search [--models plain outliers] [--methods fisher gradient kl_div ..]
        [--solvers rtn gptq] [--draws 3] [--questions 200] [--random 200] [--out bench-out]
    python -m bench.search --folder NAME=DIR ..  trained models of other families, in their place
    python -m bench.search .. --modelopt-python PATH --auto-round-python PATH    others beside ours

*Truth* of a unit in a format: the model is quantized in that unit alone, written, loaded again, and
compared with the unquantized model on questions that no calibration saw. (Mixes that are rounded to
nearest take their layers from uniform checkpoints, written and loaded once.) *Spearman* is the rank
correlation of a method's scores with it, over the units, by format. *Mixes*: budgets are the bytes
of the uniform recipes, and the means between neighbours; each found mix is quantized and measured
as a whole, beside the uniform recipe of the budget and random mixes that fill it. ModelOpt's
``auto_quantize`` and AutoRound's ``AutoScheme`` score the same samples in environments of their
own; the mixes that they choose are quantized by ours, like all others.

A folder's model is calibrated with and asked the embedded model's questions, unless files of both
are named; ``NAME-outliers`` is its version with activation outliers.

Analyses run as commands of their own, whose seconds of CPU and peak memory are told. Finished cells
are kept in ``OUT/search.jsonl``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.methods import Cells
from bench.search.other_tools import MODELOPT, analyses, bits_and_group, effective_bits
from bench.search.rounded import RoundedLayers, uniform_choice
from bench.search.subjects import Searched, subjects
from bench.search.tables import CLASSES, Measures, Result, tables_of
from prismquant import __version__
from prismquant.api import quantize
from prismquant.export.load_quantized import load_model
from prismquant.report.tables import markdown_table, rich_table
from prismquant.search.allocate import Allocation, Mix, allocate, set_up
from prismquant.search.constraints import Amount, Constraints
from prismquant.search.found_recipe import recipe_of
from prismquant.search.knapsack import Solved
from prismquant.search.sensitivity import FLOAT, IN_NATS, Sensitivity, TokenClass
from prismquant.search.sensitivity_file import read_sensitivity

FORMATS = ("int2-g32", "int3-g32", "int4-g32")
METHODS = ("fisher", "gradient", "kl_div", "output", "weight")

Weights = Mapping[TokenClass, float] | None


class Bench:
    """The cells of one model.

    Args:
        what: The model.
        cells: Where finished ones are kept.
        options: What was asked for.
        work: Where checkpoints may lie for a moment.
    """

    def __init__(
        self, what: Searched, cells: Cells, options: argparse.Namespace, work: Path
    ) -> None:
        self.what, self.cells, self.options, self.work = what, cells, options, work
        self._rounded: RoundedLayers | None = None

    def run(self) -> Iterator[str]:
        """Fill in what is missing; yields a line for each cell."""
        for solver in self.options.solvers:
            for draw in range(len(self.what.calibrations)):
                for method in self.options.methods:
                    yield from self._cell(
                        ("score", method, solver, draw),
                        functools.partial(self._analyzed, method, solver, draw),
                    )
        options = self.options
        others = analyses(
            options.modelopt_python, options.auto_round_python, options.modelopt_modes
        )
        for name, analysis in others.items():
            for draw, calibration in enumerate(self.what.calibrations[: options.peer_draws]):
                work = functools.partial(
                    analysis.run, self.what.folder, calibration, options.formats, self.work
                )
                yield from self._cell(("peer", name, draw), work)
        for solver in self.options.solvers:
            yield from self._truths(solver)
            yield from self._mixes(solver)

    def sensitivity(self, method: str, solver: str, draw: int) -> Sensitivity:
        """What an analysis has written."""
        return read_sensitivity(self._file(method, solver, draw))

    def _cell(self, key: tuple[Any, ...], work: Callable[[], Result]) -> Iterator[str]:
        key = (self.what.name, *key)
        if key not in self.cells.done:
            self.cells.add(key, work())
            yield f"{key}: {json.dumps(self.cells.done[key])[:120]}"

    def _file(self, method: str, solver: str, draw: int) -> Path:
        return Path(self.options.out) / f"search-{self.what.name}-{method}-{solver}-{draw}.json"

    def _analyzed(self, method: str, solver: str, draw: int) -> Result:
        out = self._file(method, solver, draw)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "prismquant", "analyze", str(self.what.folder)]
        command += ["--calib", str(self.what.calibrations[draw]), "--out", str(out)]
        command += ["--formats", ",".join(self.options.formats), "--method", method]
        command += ["--solver", solver, "--samples", "64", "--seed", str(draw), "--json"]
        if self.options.modalities:
            command += ["--modalities", self.options.modalities]
        started = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(done.stderr)
        return {
            "seconds": time.perf_counter() - started,
            "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            # The largest child so far: a lower one cannot be told apart.
            "peak": after.ru_maxrss * 1024,
        }

    @property
    def measures(self) -> Measures:
        """What was measured, for tables."""
        return Measures(
            self.what.name,
            self.cells.done,
            self.sensitivity,
            self.options.methods,
            self.options.solvers,
            self.options.formats,
            range(len(self.what.calibrations)),
        )

    def _peer_mix(self, allocation: Allocation, mode: str, draw: int, number: int) -> Result:
        found = self.cells.done[self.what.name, "peer", mode, draw]
        bits = found["chosen"][str(effective_bits(self.options.formats)[number])]
        formats = {bits_and_group(name)[0]: name for name in self.options.formats}
        chosen = tuple(
            _index(unit, formats[bits[name]] if (name := unit.layers[0].name) in bits else FLOAT)
            for unit in allocation.units
        )
        return self._measured(allocation, chosen)

    def _truths(self, solver: str) -> Iterator[str]:
        found = self.sensitivity(self.options.methods[0], solver, 0)
        allocation = set_up(found, Constraints())
        pairs = [
            (index, number)
            for index, unit in enumerate(allocation.units)
            for number, option in enumerate(unit.options)
            if option.format != FLOAT
        ]
        if self.options.truths is not None:
            pairs = sorted(random.Random(0).sample(pairs, min(self.options.truths, len(pairs))))
        for index, number in pairs:
            chosen = [_index(unit, FLOAT) for unit in allocation.units]
            chosen[index] = number
            unit = allocation.units[index]
            yield from self._cell(
                ("truth", solver, unit.name, unit.options[number].format),
                functools.partial(self._measured, allocation, tuple(chosen)),
            )

    def _mixes(self, solver: str) -> Iterator[str]:
        first = self.sensitivity(self.options.methods[0], solver, 0)
        allocation = set_up(first, Constraints())
        for name in self.options.formats:
            chosen = uniform_choice(allocation, name)
            yield from self._cell(
                ("uniform", solver, name), functools.partial(self._measured, allocation, chosen)
            )
        for number, (label, size) in enumerate(budgets(allocation, self.options.formats).items()):
            for mode, draw in self.measures.peers():
                work = functools.partial(self._peer_mix, allocation, mode, draw, number)
                yield from self._cell(("mix", solver, label, mode, draw), work)
            for method in self.options.methods:
                for draw in range(len(self.what.calibrations)):
                    found = self.sensitivity(method, solver, draw)
                    for name, weights in self._weightings(found):
                        yield from self._cell(
                            ("mix", solver, label, method + name, draw),
                            functools.partial(self._found, found, size, weights),
                        )
            for seed in range(self.options.random):
                yield from self._cell(
                    ("random", solver, label, seed),
                    functools.partial(self._random, allocation, size, seed),
                )

    def _weightings(self, found: Sensitivity) -> Iterator[tuple[str, Weights]]:
        """Weights of the analysis; and of answers alone, where classes are scored apart."""
        yield "", None
        if found.method in IN_NATS:
            yield ", answers alone", {"answer": 1.0}

    def _found(self, found: Sensitivity, size: int, weights: Weights) -> Result:
        constraints = Constraints(total=Amount(bytes=size), weights=weights)
        mix = allocate(found, constraints)
        losses = self._divergence(found, mix, constraints)
        return {"bytes": mix.stored_bytes, "predicted": mix.losses, **losses}

    def _measured(self, allocation: Allocation, chosen: tuple[int, ...]) -> Result:
        mix = allocation.mix(Solved(chosen, 0.0, 0.0))
        if not mix.changes:
            return {"bytes": mix.stored_bytes, **dict.fromkeys(CLASSES, 0.0)}
        losses = self._divergence(allocation.found, mix, allocation.constraints)
        return {"bytes": mix.stored_bytes, **losses}

    def _random(self, allocation: Allocation, size: int, seed: int) -> Result:
        return self._measured(allocation, random_mix(allocation, size, seed))

    def _divergence(
        self, found: Sensitivity, mix: Mix, constraints: Constraints
    ) -> dict[str, float]:
        if found.solver == "rtn":
            if self._rounded is None:
                every, formats = set_up(found, Constraints()), self.options.formats
                self._rounded = RoundedLayers(self.what.folder, every, formats, self.work)
            return self.what.divergence(self._rounded.mixed(mix.formats))
        recipe = recipe_of(found, mix, constraints, "mix").recipe
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            out = Path(folder) / "out"
            quantize(self.what.folder, recipe, out, self.what.calibrations[0], dtype=torch.float32)
            return self.what.divergence(load_model(out, dtype=torch.float32))


def _index(unit: Any, name: str) -> int:
    """Place of an option of a unit by its format's name."""
    return next(n for n, option in enumerate(unit.options) if option.format == name)


def budgets(allocation: Allocation, formats: Sequence[str]) -> dict[str, int]:
    """Bytes of the uniform recipes but the least and the largest, and means between neighbours."""
    uniform = {
        name: allocation.mix(Solved(uniform_choice(allocation, name), 0.0, 0.0)).stored_bytes
        for name in formats
    }
    found: dict[str, int] = {}
    for low, high in itertools.pairwise(formats):
        if found:
            found[low] = uniform[low]
        found[f"{low} .. {high}"] = (uniform[low] + uniform[high]) // 2
    return found


def random_mix(allocation: Allocation, size: int, seed: int) -> tuple[int, ...]:
    """A mix that fills a budget: units in random order take random options that still fit."""
    rng = random.Random(seed)
    sizes = allocation.sizes
    least = [min(range(len(row)), key=row.__getitem__) for row in sizes]
    free = size - allocation.mix(Solved(tuple(least), 0.0, 0.0)).stored_bytes
    chosen = list(least)
    for _ in range(4):
        for unit in rng.sample(range(len(sizes)), len(sizes)):
            row = sizes[unit]
            at = rng.randrange(len(row))
            more = row[at] - row[chosen[unit]]
            if 0 <= more <= free:
                chosen[unit], free = at, free - int(more)
    return tuple(chosen)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="default: all, each also with outliers"
    )
    parser.add_argument(
        "--folder",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="a model of your own; may be given again",
    )
    parser.add_argument("--calibrations", nargs="+", type=Path, help="its sets, one a draw")
    parser.add_argument("--evaluation", type=Path, help="its questions")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--solvers", nargs="+", default=["rtn", "gptq"], choices=["rtn", "gptq"])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="fewest bits first")
    parser.add_argument("--modalities", help="parts of the model to choose for, e.g. llm")
    parser.add_argument("--draws", type=int, default=3, help="calibration sets")
    parser.add_argument("--questions", type=int, default=200, help="of the evaluation")
    parser.add_argument("--truths", type=int, help="a random sample of so many; default: all")
    parser.add_argument("--random", type=int, default=200, help="random mixes at each budget")
    parser.add_argument("--modelopt-python", help="interpreter of an environment with ModelOpt")
    parser.add_argument("--auto-round-python", help="interpreter of an environment with AutoRound")
    parser.add_argument("--peer-draws", type=int, default=3, help="calibration sets for both")
    parser.add_argument("--modelopt-modes", nargs="+", default=list(MODELOPT), choices=MODELOPT)
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="cells and tables")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cells that are missing and print both tables."""
    options = _arguments(arguments)
    console = Console(width=140, highlight=False)
    facts = {
        "version": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "questions": options.questions,
        "formats": list(options.formats),
    }
    cells = Cells(options.out / "search.jsonl", facts)
    with tempfile.TemporaryDirectory() as folder:
        for what in subjects(options, Path(folder)):
            bench = Bench(what, cells, options, Path(folder))
            for line in bench.run():
                console.print(line, style="dim")
            told = ""
            for table in tables_of(bench.measures):
                console.print(rich_table(table.headers, table.rows, title=table.title))
                told += f"{table.title}\n\n{markdown_table(table.headers, table.rows)}\n"
            (options.out / f"search-{what.name}.md").write_text(told, encoding="utf-8")
    results = [{"cell": list(key), **result} for key, result in cells.done.items()]
    found = {"bench": "search", **facts, "results": results}
    (options.out / "search.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
