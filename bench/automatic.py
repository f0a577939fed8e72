"""Compare automatic recipes with each of their alternatives, on the embedded model.

    python -m bench.automatic [--models plain outliers] [--settings w4a16 w4a8] [--out bench-out]

Each cell quantizes the language model, writes the checkpoint, loads it again and compares it with
the unquantized model on questions that calibration never saw. The loss is that by which the choice
is made: KL divergence of answer tokens, and a fifth of that of other text. Finished cells are kept
in ``OUT/automatic.jsonl``, and a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.methods import CALIBRATION_SAMPLES, Cells, Subject, facts_of, subjects_of
from prismquant.api import quantize
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.evaluate.fidelity import evaluate_model
from prismquant.export.load_quantized import load_model
from prismquant.recipe.presets import AUTOMATIC
from prismquant.recipe.schema import Recipe, load_recipe, parse_recipe
from prismquant.report.tables import markdown_table, rich_table
from prismquant.search.analysis_request import DEFAULT_WEIGHTS
from prismquant.search.repair import measured

SETTINGS = [name.removeprefix("auto-") for name in AUTOMATIC]
AUTO, PLAIN = "automatic", "GPTQ alone"
HEADERS = ["model and setting", PLAIN, "best", "lowest", "chosen", "its loss", "of best", "time"]


def cell(what: Subject, recipe: Recipe, calibration: Path) -> dict[str, Any]:
    """Quantize once and measure."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        started = time.process_time()
        result = quantize(what.folder, recipe, out, calibration, dtype=torch.float32)
        seconds = time.process_time() - started
        model = load_model(out, dtype=torch.float32)
    found = evaluate_model(model, what.batches, what.reference)
    loss = measured(found.outcomes, DEFAULT_WEIGHTS)
    choice = result.record.choice
    return {
        "loss": loss.loss,
        "error": loss.error,
        "answer": found.overall.divergence["answer"].kl,
        "text": found.overall.divergence["text"].kl,
        "seconds": seconds,
        "chosen": choice.told if choice else "",
    }


def rows_of(done: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table: the automatic recipe beside the best and the plain alternative."""
    rows = []
    for model, setting in dict.fromkeys(key[:2] for key in done):
        own = {key[2]: one for key, one in done.items() if key[:2] == (model, setting)}
        auto = own.pop(AUTO, None)
        if auto is None or PLAIN not in own:
            continue
        best = min(own, key=lambda name: own[name]["loss"])
        low, plain = own[best], own[PLAIN]
        rows.append(
            [
                f"{model} {setting}",
                f"{plain['loss']:.5f}",
                best,
                f"{low['loss']:.5f} ± {low['error']:.5f}",
                auto["chosen"],
                f"{auto['loss']:.5f}",
                f"{auto['loss'] / low['loss']:.2f}",
                f"{auto['seconds'] / plain['seconds']:.1f}",
            ]
        )
    return rows


def _without_method(auto: Recipe) -> Recipe:
    """GPTQ alone at the same setting."""
    body = {key: part for key, part in auto.to_dict().items() if key != "choose"}
    return parse_recipe(body | {"name": PLAIN}, source="bench")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="default: the embedded one")
    parser.add_argument("--models", nargs="+", default=["plain", "outliers"], help="versions of it")
    parser.add_argument("--samples", type=int, default=600, help="evaluation questions")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--factor", type=float, default=64.0, help="of outliers, a power of two")
    parser.add_argument("--channels", type=int, default=4, help="outlier channels at each norm")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="cells and the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cells that are missing and print the table."""
    options = _arguments(arguments)
    console = Console(width=140, highlight=False)
    facts = facts_of(options)
    cells = Cells(options.out / "automatic.jsonl", facts)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        evaluation = write_dataset(work / "eval", split="evaluation", count=options.samples)
        data = write_dataset(work / "data", split="calibration", count=CALIBRATION_SAMPLES)
        for what in subjects_of(options, work, evaluation):
            for setting in options.settings:
                auto = load_recipe(f"auto-{setting}")
                recipes = {PLAIN: _without_method(auto), AUTO: auto}
                recipes |= {one.name: auto.chosen(one.name) for one in auto.choose}
                for name, recipe in recipes.items():
                    key = (what.name, setting, name)
                    if key not in cells.done:
                        cells.add(key, cell(what, recipe, data))
                        console.print(f"{key}: loss {cells.done[key]['loss']:.5f}", style="dim")
    rows = rows_of(cells.done)
    console.print(rich_table(HEADERS, rows, title="time: CPU seconds over those of plain GPTQ"))
    table = markdown_table(HEADERS, rows)
    (options.out / "automatic.md").write_text(table, encoding="utf-8")
    results = [{"cell": list(key), **result} for key, result in cells.done.items()]
    print(json.dumps({"bench": "automatic", **facts, "results": results}))


if __name__ == "__main__":
    main()
