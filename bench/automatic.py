"""Compare automatic recipes with each of their alternatives.

    python -m bench.automatic [--models plain outliers] [--settings w4a16 w4a8] [--seeds 3]
        [--out bench-out]
    python -m bench.automatic --folder NAME=DIR [--models plain outliers]
    python -m bench.automatic --folder NAME=DIR --models plain --group-size 64
        --calib FILE --evaluation FILE

On the embedded model, or on a checkpoint in a folder that knows the same scenes, or, with data of
its own, on any.

Each cell quantizes the language model, writes the checkpoint, loads it again and compares it with
the unquantized model on samples that calibration never saw. The loss is that by which the choice
is made: KL divergence of answer tokens, and a fifth of that of other text. Finished cells are kept
in ``OUT/automatic.jsonl``; a run that was cut off goes on where it stopped, and ``--seeds`` can be
raised later: losses are then means over so many calibration sets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from prismquant.storage import file_digest

SETTINGS = [name.removeprefix("auto-") for name in AUTOMATIC]
AUTO, PLAIN = "automatic", "GPTQ alone"
_GROUP = 128
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
    """Rows of the table: the automatic recipe beside the best and the plain alternative.

    Losses and seconds are means over calibration sets. What is the best is told by these means, as
    nobody can know which is the best for one set.
    """
    rows = []
    for model, setting in dict.fromkeys(key[:2] for key in done):
        runs: dict[str, list[Mapping[str, Any]]] = {}
        for key, one in done.items():
            if key[:2] == (model, setting):
                runs.setdefault(key[2], []).append(one)
        # Sets of which not all cells are done would tell the wrong means.
        finished = len({len(own) for own in runs.values()}) == 1
        auto = runs.pop(AUTO, None)
        if auto is None or PLAIN not in runs or not finished:
            continue
        loss = {name: statistics.fmean(one["loss"] for one in own) for name, own in runs.items()}
        seconds = [statistics.fmean(one["seconds"] for one in own) for own in (auto, runs[PLAIN])]
        best = min(loss, key=lambda name: loss[name])
        errors = [one["error"] for one in runs[best]]
        chosen = statistics.fmean(one["loss"] for one in auto)
        rows.append(
            [
                f"{model} {setting}",
                f"{loss[PLAIN]:.5f}",
                best,
                f"{loss[best]:.5f} ± {math.hypot(*errors) / len(errors):.5f}",
                ", ".join(dict.fromkeys(one["chosen"] for one in auto)),
                f"{chosen:.5f}",
                f"{chosen / loss[best]:.2f}",
                f"{seconds[0] / seconds[1]:.1f}",
            ]
        )
    return rows


def automatic(setting: str, group_size: int) -> Recipe:
    """An automatic recipe with groups of another size where it has groups of 128."""
    body = load_recipe(f"auto-{setting}").to_dict()
    for rule in body["rules"]:
        if rule.get("weights", {}).get("group_size") == _GROUP:
            rule["weights"]["group_size"] = group_size
    return parse_recipe(body, source="bench")


def _without_method(auto: Recipe) -> Recipe:
    """GPTQ alone at the same setting."""
    body = {key: part for key, part in auto.to_dict().items() if key != "choose"}
    return parse_recipe(body | {"name": PLAIN}, source="bench")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", help="NAME=DIR of another checkpoint than the embedded one")
    parser.add_argument("--calib", type=Path, help="its calibration samples; default: scenes")
    parser.add_argument("--evaluation", type=Path, help="samples to measure on; default: scenes")
    parser.add_argument("--group-size", type=int, default=_GROUP, help="in place of 128")
    parser.add_argument("--models", nargs="+", default=["plain", "outliers"], help="versions of it")
    parser.add_argument("--samples", type=int, default=600, help="evaluation questions")
    parser.add_argument("--seeds", type=int, default=1, help="calibration sets of scenes")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--factor", type=float, default=64.0, help="of outliers, a power of two")
    parser.add_argument("--channels", type=int, default=4, help="outlier channels at each norm")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="cells and the table")
    options = parser.parse_args(arguments)
    if (options.calib is None) != (options.evaluation is None):
        parser.error("--calib and --evaluation go together")
    options.name, _, folder = (options.folder or "").partition("=")
    if options.folder and not folder:
        parser.error("--folder takes NAME=DIR")
    if options.calib and options.seeds > 1:
        parser.error("--seeds is of scenes: with --calib there is one calibration set")
    options.model = Path(folder) if folder else CHECKPOINT
    return options


def _facts(options: argparse.Namespace) -> dict[str, Any]:
    facts = facts_of(options)
    if options.folder:
        facts["folder"] = options.name
    if options.group_size != _GROUP:
        facts["group_size"] = options.group_size
    if options.evaluation:
        facts["data"] = [file_digest(options.calib), file_digest(options.evaluation)]
    return facts


def _subjects(options: argparse.Namespace, work: Path) -> Iterator[tuple[Subject, list[Path]]]:
    """Models, each with its sets of calibration samples."""
    sets, evaluation = [options.calib], options.evaluation
    # Scenes are short; of other samples a few fill the memory with logits.
    size = 2 if evaluation else 32
    if evaluation is None:
        evaluation = write_dataset(work / "eval", split="evaluation", count=options.samples)
        sets = [
            write_dataset(
                work / f"c{seed}", split="calibration", seed=seed, count=CALIBRATION_SAMPLES
            )
            for seed in range(options.seeds)
        ]
    for what in subjects_of(options, work, evaluation, size):
        name = f"{options.name} {what.name}".strip()
        yield replace(what, name=name), sets


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cells that are missing and print the table."""
    options = _arguments(arguments)
    console = Console(width=140, highlight=False)
    facts = _facts(options)
    cells = Cells(options.out / "automatic.jsonl", facts)
    warm = False
    with tempfile.TemporaryDirectory() as folder:
        for what, sets in _subjects(options, Path(folder)):
            for setting, seed in itertools.product(options.settings, range(len(sets))):
                auto = automatic(setting, options.group_size)
                recipes = {PLAIN: _without_method(auto), AUTO: auto}
                recipes |= {one.name: auto.chosen(one.name) for one in auto.choose}
                for name, recipe in recipes.items():
                    key = (what.name, setting, name, *[seed] * bool(seed))
                    if key not in cells.done:
                        if not warm:
                            # The first run in a process compiles its kernels.
                            cell(what, recipes[PLAIN], sets[seed])
                            warm = True
                        cells.add(key, cell(what, recipe, sets[seed]))
                        console.print(f"{key}: loss {cells.done[key]['loss']:.5f}", style="dim")
    rows = rows_of(cells.done)
    console.print(rich_table(HEADERS, rows, title="time: CPU seconds over those of plain GPTQ"))
    table = markdown_table(HEADERS, rows)
    (options.out / "automatic.md").write_text(table, encoding="utf-8")
    results = [{"cell": list(key), **result} for key, result in cells.done.items()]
    print(json.dumps({"bench": "automatic", **facts, "results": results}))


if __name__ == "__main__":
    main()
