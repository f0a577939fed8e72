"""What each method costs at each setting, on the embedded model, plain and with activation
outliers.

    python -m bench.methods [--samples 600] [--seeds 1] [--factor 64] [--channels 4] [--out
    bench-out]

Each cell quantizes the language model, writes the checkpoint, loads it again and compares it with
the unquantized model on questions that calibration never saw. RTN is rounding to nearest with
min-max scales; GPTQ is the preset as it stands. The outlier version has the same float function,
bit for bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prismquant.api import measure, quantize
from prismquant.demo.run import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.models.outliers import add_outliers
from prismquant.recipe.schema import Recipe, load_recipe
from prismquant.report.tables import markdown_table, rich_table

SETTINGS = ("w8a8", "w4a16", "w4a8", "w4a8-static", "w3a16")
CALIBRATION_SAMPLES = 128


def recipe_for(setting: str, solver: str) -> Recipe:
    """The preset with a solver; rounding to nearest takes min-max scales, its textbook form."""
    rule = {"solver": solver} | ({"weight_range": "minmax"} if solver == "rtn" else {})
    return load_recipe(setting).with_rules(rule, name=f"{setting}-{solver}")


def cell(
    model: Path, setting: str, solver: str, calibration: Path, evaluation: Path
) -> dict[str, Any]:
    """Quantize once and measure."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        started = time.perf_counter()
        quantize(model, recipe_for(setting, solver), out, calibration)
        seconds = time.perf_counter() - started
        overall = measure(out, evaluation, reference=model, batch_size=32).overall
    answers = overall.divergence["answer"]
    return {
        "exact_match": overall.exact_match,
        "reference_exact_match": overall.reference_exact_match,
        "nll": overall.nll_token,
        "reference_nll": overall.reference_nll_token,
        "kl": answers.kl,
        "kl_error": answers.kl_error,
        "top1": answers.top1,
        "seconds": seconds,
    }


def rows_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table; means over calibration seeds, GPTQ's share of RTN's KL."""
    headers = ["model", "setting", "method", "exact match", "NLL", "KL", "of RTN KL", "seconds"]
    rows = []
    for model, settings in results.items():
        first = next(iter(settings.values()))["rtn"][0]
        exact, nll = first["reference_exact_match"], first["reference_nll"]
        rows.append([model, "float", "", f"{100 * exact:.1f} %", f"{nll:.4f}", "", "", ""])
        for setting, solvers in settings.items():
            base = statistics.fmean(run["kl"] for run in solvers["rtn"])
            for solver, runs in solvers.items():
                mean = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
                spread = statistics.stdev(run["kl"] for run in runs) if len(runs) > 1 else None
                kl = f"{mean['kl']:.5f}" + ("" if spread is None else f" ± {spread:.5f}")
                share = "" if solver == "rtn" else f"{mean['kl'] / base:.3f}"
                quality = [f"{100 * mean['exact_match']:.1f} %", f"{mean['nll']:.4f}", kl, share]
                rows.append([model, setting, solver.upper(), *quality, f"{mean['seconds']:.1f}"])
    return headers, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="default: the embedded one")
    parser.add_argument("--samples", type=int, default=600, help="evaluation questions")
    parser.add_argument("--seeds", type=int, default=1, help="calibration sets to average over")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="presets")
    parser.add_argument(
        "--factor", type=float, default=64.0, help="outlier strength, a power of two"
    )
    parser.add_argument("--channels", type=int, default=4, help="outlier channels at each norm")
    parser.add_argument("--out", type=Path, default=None, help="write the table there as Markdown")
    options = parser.parse_args(arguments)
    console = Console(width=120, highlight=False)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        evaluation = write_dataset(work / "eval", split="evaluation", count=options.samples)
        sets = [
            write_dataset(
                work / f"c{seed}", split="calibration", seed=seed, count=CALIBRATION_SAMPLES
            )
            for seed in range(options.seeds)
        ]
        outliers = work / "outliers"
        add_outliers(
            options.model,
            outliers,
            factor=options.factor,
            channels=options.channels,
            modality="llm",
        )
        for name, model in {"plain": options.model, "outliers": outliers}.items():
            for setting in options.settings:
                for solver in ("rtn", "gptq"):
                    runs = [cell(model, setting, solver, data, evaluation) for data in sets]
                    results.setdefault(name, {}).setdefault(setting, {})[solver] = runs
                    console.print(f"{name} {setting} {solver}: KL {runs[0]['kl']:.5f}", style="dim")
    headers, rows = rows_of(results)
    threads = torch.get_num_threads()
    title = f"{options.samples} questions, {options.seeds} calibration set(s), {threads} thread(s)"
    console.print(rich_table(headers, rows, title=title))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(markdown_table(headers, rows), encoding="utf-8")
    facts = {"threads": threads, "torch": torch.__version__, "samples": options.samples}
    print(json.dumps({"bench": "methods", **facts, "results": results}))


if __name__ == "__main__":
    main()
