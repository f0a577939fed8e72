"""Number formats of 4 to 8 bits with scales of their own, by how scales and codes are chosen.

    python -m bench.formats [--samples 600] [--models plain outliers] [--out bench-out]

As :mod:`bench.methods`, for formats instead of widths: each cell quantizes the language model,
writes the checkpoint, loads it again and compares it with the unquantized model on questions that
calibration never saw. Finished cells are kept in ``OUT/formats.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.methods import CALIBRATION_SAMPLES, Cells, cell, facts_of, subjects_of
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.recipe.schema import Recipe, parse_recipe
from prismquant.report.tables import markdown_table, rich_table

_LLM = {"modality": "llm", "role": ["attn", "mlp"]}

FORMATS: dict[str, dict[str, str]] = {
    "NVFP4": {"weights": "nvfp4", "activations": "nvfp4-dyn"},
    "NVFP4 A16": {"weights": "nvfp4"},
    "MXFP4": {"weights": "mxfp4", "activations": "mxfp4-dyn"},
    "MXFP4 A16": {"weights": "mxfp4"},
    "MXFP6 A16": {"weights": "mxfp6"},
    "MXFP8": {"weights": "mxfp8", "activations": "mxfp8-ceil-dyn"},
    "FP8": {"weights": "fp8-channel", "activations": "fp8-token"},
    "FP8 blocks": {"weights": "fp8-b128", "activations": "fp8-g128-dyn"},
    "INT4 g32 A16": {"weights": "int4-g32"},
}
_FP4 = ("NVFP4", "NVFP4 A16")
_CODED = (*_FP4, "MXFP4", "MXFP4 A16")
_FOUR_BITS = (*_CODED, "INT4 g32 A16")

# Fields of the rule, transforms, and the formats that it is tried with; none: all.
_Method = tuple[dict[str, Any], tuple[dict[str, Any], ...], tuple[str, ...]]
_AWQ = {"name": "awq", "match": {"modality": "llm"}}
_SMOOTH = {"name": "smoothquant", "match": {"modality": "llm"}}
_ROTATION = {"name": "rotation", "match": {"modality": "llm"}, "options": {"online": True}}


def _rtn(rule: str) -> dict[str, Any]:
    return {"solver": "rtn", "weight_range": rule}


METHODS: dict[str, _Method] = {
    "rtn": (_rtn("minmax"), (), ()),
    "rtn, mse": (_rtn("mse"), (), ()),
    "rtn, sweep": (_rtn("sweep"), (), _CODED),
    "rtn, four over six": (_rtn("four_over_six"), (), _FP4),
    "gptq, minmax": ({"weight_range": "minmax"}, (), _FOUR_BITS),
    "gptq, mse": ({"weight_range": "mse"}, (), ()),
    "gptq, sweep": ({"weight_range": "sweep"}, (), _CODED),
    "awq + gptq, mse": ({"weight_range": "mse"}, (_AWQ,), _FOUR_BITS),
    "smoothquant + gptq, mse": ({"weight_range": "mse"}, (_SMOOTH,), _FOUR_BITS),
    "rotation + gptq, mse": ({"weight_range": "mse"}, (_ROTATION,), _FOUR_BITS),
}
HEADERS = ["model", "format", "method", "exact match", "KL", "top-1", "s"]


def recipe_for(name: str, method: str) -> Recipe:
    """A format with a method."""
    fields, transforms, _ = METHODS[method]
    body = {"rules": [{"match": _LLM, **FORMATS[name], **fields}], "transforms": list(transforms)}
    return parse_recipe(body | {"name": f"{name}, {method}"}, source="bench")


def rows_of(done: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> list[list[str]]:
    """The table's rows, in the order of the formats."""
    order = {name: place for place, name in enumerate(FORMATS)}
    keys = sorted(done, key=lambda key: (key[0] != "plain", order[key[1]]))
    return [
        [
            *key,
            f"{100 * done[key]['exact_match']:.1f} %",
            f"{done[key]['kl']:.5f} ± {done[key]['kl_error']:.5f}",
            f"{100 * done[key]['top1']:.1f} %",
            f"{done[key]['seconds']:.0f}",
        ]
        for key in keys
    ]


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.formats", description="number formats")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="default: the embedded one")
    parser.add_argument("--models", nargs="+", choices=("plain", "outliers"), default=["plain"])
    parser.add_argument("--samples", type=int, default=600, help="evaluation questions")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--factor", type=float, default=64.0, help="of outliers, a power of two")
    parser.add_argument("--channels", type=int, default=4, help="outlier channels at each norm")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="cells and the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cells that are missing and print the table."""
    options = _arguments(arguments)
    console = Console(width=140, highlight=False)
    facts = facts_of(options)
    cells = Cells(options.out / "formats.jsonl", facts)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        evaluation = write_dataset(work / "eval", split="evaluation", count=options.samples)
        data = write_dataset(work / "c", split="calibration", seed=0, count=CALIBRATION_SAMPLES)
        for what in subjects_of(options, work, evaluation):
            for name in options.formats:
                for method, (_, _, only) in METHODS.items():
                    key = (what.name, name, method)
                    if key in cells.done or (only and name not in only):
                        continue
                    result = cell(what, recipe_for(name, method), data)
                    cells.add(key, result)
                    console.print(f"{key}: KL {result['kl']:.5f}", style="dim")
    rows = rows_of(cells.done)
    title = f"{facts['architecture']}, {options.samples} questions, {facts['threads']} thread(s)"
    console.print(rich_table(HEADERS, rows, title=title))
    (options.out / "formats.md").write_text(markdown_table(HEADERS, rows), encoding="utf-8")
    results = [{"cell": list(key), **result} for key, result in cells.done.items()]
    print(json.dumps({"bench": "formats", **facts, "results": results}))


if __name__ == "__main__":
    main()
