"""What each method costs at each setting, on the embedded model, plain and with activation
outliers.

    python -m bench.methods [--seeds 3] [--samples 600] [--models plain outliers] [--out bench-out]

Each cell quantizes the language model, writes the checkpoint, loads it again and compares it with
the unquantized model on questions that calibration never saw. The outlier version has the same
float function, bit for bit. Finished cells are kept in ``OUT/methods.jsonl``: a run that was cut
off goes on where it stopped, and ``--seeds`` can be raised later.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bench.known_logits import KnownLogits
from prismquant import __version__
from prismquant.api import quantize
from prismquant.data import read_samples
from prismquant.data.batches import Batch, make_batches
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.evaluate.fidelity import evaluate_model
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.outliers import add_outliers
from prismquant.models.processor import load_processor
from prismquant.recipe.schema import Recipe, parse_recipe
from prismquant.report.tables import markdown_table, rich_table

CALIBRATION_SAMPLES = 128
_LLM = {"modality": "llm", "role": ["attn", "mlp"]}

SETTINGS: dict[str, dict[str, str]] = {
    "W8A8 static": {"weights": "int8-channel", "activations": "int8-tensor"},
    "W8A8 dynamic": {"weights": "int8-channel", "activations": "int8-token"},
    "W4A16 g128": {"weights": "int4-g128"},
    "W4A8 dynamic": {"weights": "int4-channel", "activations": "int8-token"},
    "W4A8 static": {"weights": "int4-channel", "activations": "int8-tensor"},
    "W3A16 g128": {"weights": "int3-g128"},
    "W2A16 g64": {"weights": "int2-g64-asym"},
    "W4A4": {"weights": "int4-channel", "activations": "int4-token"},
}


@dataclass(frozen=True)
class Method:
    """What a method adds to a setting.

    Attributes:
        rule: Fields of the rule.
        transforms: Transforms of the recipe.
        settings: Where it is tried; empty is everywhere.
    """

    rule: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[Mapping[str, Any], ...] = ()
    settings: tuple[str, ...] = ()


def _transform(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "match": {"modality": "llm"}, "options": options}


_RTN = {"solver": "rtn"}
_AWQ_CLIP = {"solver": "rtn", "options": {"scale_weighting": "group"}}
_ROTATION = _transform("rotation")
_ONLINE = _transform("rotation", online=True)
_UNSIGNED = _transform("rotation", online=True, signs=False)
_SMOOTH, _AWQ = _transform("smoothquant"), _transform("awq")
_SPLIT = {"name": "split", "match": {"modality": "llm", "role": "mlp.down"}}
_ACTIVATIONS = tuple(name for name, spec in SETTINGS.items() if "activations" in spec)
# Tuning a block takes a minute or two: tried where rounding alone loses most.
_LOW = ("W3A16 g128", "W2A16 g64", "W4A4")

METHODS: dict[str, Method] = {
    "rtn": Method(_RTN | {"weight_range": "minmax"}),
    "gptq": Method(),
    "awq": Method(_AWQ_CLIP, (_AWQ,)),
    "awq+gptq": Method({}, (_AWQ,)),
    "smoothquant": Method(_RTN, (_SMOOTH,)),
    "smoothquant+gptq": Method({}, (_SMOOTH,)),
    "rotation+gptq": Method({}, (_ROTATION,)),
    "rotation online+rtn": Method(_RTN, (_ONLINE,), _ACTIVATIONS),
    "rotation online+gptq": Method({}, (_ONLINE,), _ACTIVATIONS),
    "rotation online+smoothquant+gptq": Method({}, (_ONLINE, _SMOOTH), _ACTIVATIONS),
    "mquant": Method({}, (_UNSIGNED, _SPLIT), _ACTIVATIONS),
    "gptq+correction": Method({"correction": "auto"}),
    "awq+gptq+correction": Method({"correction": "auto"}, (_AWQ,)),
    "zeroquant": Method(_RTN | {"tuner": "zeroquant"}, (), _LOW),
    "awq+zeroquant": Method(_RTN | {"tuner": "zeroquant"}, (_AWQ,), _LOW),
    "autoround": Method(_RTN | {"tuner": "autoround"}, (), _LOW),
}


def recipe_for(setting: str, method: str) -> Recipe:
    """A setting's formats with what the method adds."""
    chosen = METHODS[method]
    low = "int8" not in SETTINGS[setting]["weights"]
    rule = {"match": _LLM, "weight_range": "mse" if low else "minmax"}
    rule |= {**SETTINGS[setting], **chosen.rule}
    body = {"rules": [rule], "transforms": list(chosen.transforms)}
    return parse_recipe(body | {"name": f"{setting}, {method}"}, source="bench")


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to quantize, and what to compare with.

    Attributes:
        name: ``plain`` or ``outliers``.
        folder: Its checkpoint.
        reference: The unquantized model.
        batches: Evaluation batches.
    """

    name: str
    folder: Path
    reference: nn.Module
    batches: Sequence[Batch]


def subject(name: str, folder: Path, evaluation: Path, batch_size: int = 32) -> Subject:
    """Load the reference and render the questions once."""
    bound = bind(folder)
    batches = make_batches(
        read_samples(evaluation, require_answers=True),
        load_processor(folder),
        batch_size=batch_size,
        vision_token_ids=bound.vision_token_ids,
    )
    reference = KnownLogits(load_model(folder, dtype=torch.float32))
    return Subject(name, folder, reference, list(batches))


def cell(what: Subject, recipe: Recipe, calibration: Path) -> dict[str, Any]:
    """Quantize once and measure."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        started = time.perf_counter()
        quantize(what.folder, recipe, out, calibration, dtype=torch.float32)
        seconds = time.perf_counter() - started
        model = load_model(out, dtype=torch.float32)
    overall = evaluate_model(model, what.batches, what.reference).overall
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


class Cells:
    """Finished cells in a file, one line each.

    Args:
        path: The file; None: they are kept in memory alone.
        facts: What else a cell depends on; cells of other facts are left alone.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.facts = dict(facts)
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self.done: dict[tuple[Any, ...], dict[str, Any]] = {}
        for line in lines:
            entry = json.loads(line)
            if entry["facts"] == self.facts:
                self.done[tuple(entry["cell"])] = entry["result"]

    def add(self, key: tuple[Any, ...], result: Mapping[str, Any]) -> None:
        """Keep a cell."""
        self.done[key] = dict(result)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            entry = {"facts": self.facts, "cell": list(key), "result": dict(result)}
            file.write(json.dumps(entry) + "\n")


HEADERS = ["model", "setting", "method", "exact match", "NLL", "KL", "of GPTQ", "s", "sets"]
Runs = dict[tuple[str, str, str], list[dict[str, Any]]]


def runs_of(cells: Cells) -> Runs:
    """Results by model, setting and method; one for each calibration set."""
    runs: Runs = {}
    for (model, setting, method, _), result in cells.done.items():
        runs.setdefault((model, setting, method), []).append(result)
    return runs


def rows_of(runs: Runs, *, essence: bool = False) -> list[list[str]]:
    """Rows of the table: means over calibration sets, shares of plain GPTQ's KL.

    Args:
        runs: What was measured.
        essence: Only rounding, GPTQ and whichever method has the lowest KL.
    """
    rows = []
    for model in dict.fromkeys(key[0] for key in runs):
        first = next(results[0] for key, results in runs.items() if key[0] == model)
        exact, nll = first["reference_exact_match"], first["reference_nll"]
        rows.append([model, "float", "", f"{100 * exact:.1f} %", f"{nll:.4f}", "", "", "", ""])
        for setting in SETTINGS:
            here = {m: runs[model, setting, m] for m in METHODS if (model, setting, m) in runs}
            shown = [m for m in here if not essence or m in ("rtn", "gptq", best(here))]
            rows += [[model, setting, *_row(m, here[m], here.get("gptq"))] for m in shown]
    return rows


def best(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The method with the lowest mean KL."""
    return min(methods, key=lambda m: statistics.fmean(run["kl"] for run in methods[m]))


def _row(
    method: str, runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]] | None
) -> list[str]:
    mean = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
    spread = f" ± {statistics.stdev(run['kl'] for run in runs):.5f}" if len(runs) > 1 else ""
    share = f"{mean['kl'] / statistics.fmean(run['kl'] for run in base):.2g}" if base else ""
    return [
        method,
        f"{100 * mean['exact_match']:.1f} %",
        f"{mean['nll']:.4f}",
        f"{mean['kl']:.5f}{spread}",
        share,
        f"{mean['seconds']:.0f}",
        str(len(runs)),
    ]


def facts_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a cell depends on besides its place in the table."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "architecture": bind(options.model).arch.name,
        "samples": options.samples,
        "outliers": [options.factor, options.channels],
    }


def subjects_of(
    options: argparse.Namespace, work: Path, evaluation: Path, batch_size: int = 32
) -> Iterator[Subject]:
    """The model as it is and with outliers, as far as they are asked for."""
    if "plain" in options.models:
        yield subject("plain", options.model, evaluation, batch_size)
    if "outliers" in options.models:
        outliers = work / "outliers"
        add_outliers(
            options.model,
            outliers,
            factor=options.factor,
            channels=options.channels,
            modality="llm",
        )
        yield subject("outliers", outliers, evaluation, batch_size)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="default: the embedded one")
    parser.add_argument("--models", nargs="+", default=["plain", "outliers"], help="versions of it")
    parser.add_argument("--samples", type=int, default=600, help="evaluation questions")
    parser.add_argument("--seeds", type=int, default=1, help="calibration sets to average over")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--factor", type=float, default=64.0, help="of outliers, a power of two")
    parser.add_argument("--channels", type=int, default=4, help="outlier channels at each norm")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="cells and the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cells that are missing and print the table."""
    options = _arguments(arguments)
    console = Console(width=140, highlight=False)
    facts = facts_of(options)
    threads = facts["threads"]
    cells = Cells(options.out / "methods.jsonl", facts)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        evaluation = write_dataset(work / "eval", split="evaluation", count=options.samples)
        sets = [
            write_dataset(
                work / f"c{seed}", split="calibration", seed=seed, count=CALIBRATION_SAMPLES
            )
            for seed in range(options.seeds)
        ]
        subjects = list(subjects_of(options, work, evaluation))
        for seed, data in enumerate(sets):
            for what in subjects:
                for setting in options.settings:
                    for method in options.methods:
                        key = (what.name, setting, method, seed)
                        only = METHODS[method].settings
                        if key in cells.done or (only and setting not in only):
                            continue
                        result = cell(what, recipe_for(setting, method), data)
                        cells.add(key, result)
                        console.print(f"{key}: KL {result['kl']:.5f}", style="dim")
    runs = runs_of(cells)
    title = f"{facts['architecture']}, {options.samples} questions, {threads} thread(s)"
    console.print(rich_table(HEADERS, rows_of(runs), title=title))
    for name, essence in (("methods", False), ("essence", True)):
        table = options.out / f"{name}-{facts['architecture']}.md"
        table.write_text(markdown_table(HEADERS, rows_of(runs, essence=essence)), encoding="utf-8")
    results = [{"cell": list(key), **result} for key, result in cells.done.items()]
    print(json.dumps({"bench": "methods", **facts, "results": results}))


if __name__ == "__main__":
    main()
