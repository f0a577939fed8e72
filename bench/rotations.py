"""What signs, online rotations and split columns do for the vision tower of the embedded model.

    python -m bench.rotations [--samples 600]

GPTQ of the tower's attention and MLP layers behind each way to rotate it; KL to the float model on
questions that calibration never saw. A table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.methods import CALIBRATION_SAMPLES, SETTINGS, cell, subject
from prismquant import __version__
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.recipe.schema import Recipe, parse_recipe
from prismquant.report.tables import markdown_table, rich_table

_TOWER = {"modality": "vision", "role": ["attn", "mlp"]}
_SPLIT = {"name": "split", "match": {"modality": "vision", "role": "mlp.down"}}
COMPARED = ("W8A8 static", "W4A8 static", "W4A4")


def _rotation(**options: Any) -> dict[str, Any]:
    return {"name": "rotation", "match": {"modality": "vision"}, "options": options}


WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "none": (),
    "offline": (_rotation(),),
    "online, no signs": (_rotation(online=True, signs=False),),
    "online, no signs, split": (_rotation(online=True, signs=False), _SPLIT),
    "online, signs": (_rotation(online=True),),
    "online, signs, split": (_rotation(online=True), _SPLIT),
}


def recipe_for(setting: str, way: str) -> Recipe:
    """GPTQ of the tower, rotated in a way."""
    rule = {"match": _TOWER, "weight_range": "mse", **SETTINGS[setting]}
    body = {"rules": [rule], "transforms": list(WAYS[way]), "name": f"{setting}, {way}"}
    return parse_recipe(body, source="bench")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cells and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.rotations", description="rotations")
    parser.add_argument("--samples", type=int, default=600, help="evaluation questions")
    options = parser.parse_args(arguments)
    results: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        evaluation = write_dataset(work / "eval", split="evaluation", count=options.samples)
        data = write_dataset(work / "c", split="calibration", seed=0, count=CALIBRATION_SAMPLES)
        what = subject("plain", CHECKPOINT, evaluation)
        for way, found in results.items():
            for setting in COMPARED:
                found[setting] = cell(what, recipe_for(setting, way), data)
    rows = [
        [way, *(f"{found[s]['kl']:.5f} ± {found[s]['kl_error']:.5f}" for s in COMPARED)]
        for way, found in results.items()
    ]
    headers = ["rotation of the vision tower", *COMPARED]
    threads = torch.get_num_threads()
    title = f"KL, {options.samples} questions, {threads} thread(s)"
    Console(width=120, highlight=False).print(rich_table(headers, rows, title=title))
    print(markdown_table(headers, rows))
    facts = {"version": __version__, "torch": torch.__version__, "threads": threads}
    print(json.dumps({"bench": "rotations", **facts, "results": results}))


if __name__ == "__main__":
    main()
