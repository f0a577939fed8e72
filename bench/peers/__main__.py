"""Other tools and ours on one model, with the same samples, settings and yardstick.

    python -m bench.peers [--llm-compressor-python PATH] [--auto-round-python PATH]
        [--gptqmodel-python PATH] [--settings w4a16 w4a8] [--recipes NAME ...] [--samples 600]
        [--sets 3] [--group-size 64]
        [--model DIR --name NAME [--calibrations FILE ... --evaluation FILE]]

Each tool runs in an environment of its own, which its option names; without it the tool is shown as
not run. A tool leaves the rounded weights in floating point; where the setting quantizes inputs,
they are quantized here, in the same way for all. Everything is then compared with the float model
on questions that calibration never saw. Calibration is on questions about single pictures, because
llm-compressor takes no set that mixes pictures and clips; or on files of your own, which have one
picture in each sample, or none in any. With several calibration sets figures are means over them,
and the error is their spread. ``--cells FILE`` keeps finished rows: a run that was cut off goes on
where it stopped. A setting is a preset, or ``w2a16``.

The last table sets the best of each other tool's methods beside the recipe of ours that leaves the
choice of a method to held-out loss (``auto-..``), where that is among the recipes.

Seconds are what the method took: for the tools without loading and saving the model, for ours with
both. Where other processes share the machine, seconds of CPU are the fairer figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.methods import Cells
from bench.peers.rows import HEADERS, Row, averaged, best_rows, cells
from bench.peers.worker import REPORT, stopwatch
from bench.peers.yardstick import Yardstick
from prismquant.api import quantize
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.errors import PlanError, PrismQuantError
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.models.outliers import add_outliers
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import Plan
from prismquant.recipe.schema import Recipe, load_recipe
from prismquant.report.tables import markdown_table, rich_table

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("plain", "outliers")
SETTINGS = ("w4a16", "w3a16", "w2a16", "w8a8", "w4a8")
CALIBRATION_SAMPLES = 128


@dataclass(frozen=True)
class Peer:
    """A tool: the module that runs it, and its methods with and without quantized inputs."""

    module: str
    weights: tuple[str, ...]
    activations: tuple[str, ...] = ()


PEERS = {
    "llm-compressor": Peer(
        "llm_compressor",
        ("gptq", "awq"),
        ("gptq", "awq", "smoothquant-gptq", "smoothquant-all-gptq"),
    ),
    "auto-round": Peer("auto_round", ("signround",)),
    "gptqmodel": Peer("gptq_model", ("gptq",)),
}


@dataclass(frozen=True)
class Tools:
    """The interpreter of each tool that is there, and how long the one that trains does so."""

    pythons: Mapping[str, str]
    iterations: int


def with_weights(recipe: Recipe, weights: Mapping[str, Any], name: str) -> Recipe:
    """The recipe with another format for the weights of the language model's blocks."""
    blocks = {"modality": "llm", "role": ["attn", "mlp"]}
    return recipe.with_rules({"match": blocks, "weights": weights}, name=name)


def named_recipe(name: str, group_size: int | None = None) -> Recipe:
    """A recipe of ours, or one that defines a setting by its layers and number formats.

    Args:
        name: Of a preset or a file, or ``w2a16``.
        group_size: Of weights that have a scale by group, in place of what the recipe says.
    """
    recipe = load_recipe("w3a16" if name == "w2a16" else name)
    weights = dict(recipe.rules[0].weights or {})
    if name == "w2a16":
        weights |= {"bits": 2, "group_size": 64}
    if group_size is not None and weights.get("group_size"):
        weights |= {"group_size": group_size}
    if weights == recipe.rules[0].weights:
        return recipe
    return with_weights(recipe, weights, name if name == "w2a16" else recipe.name)


def planned(recipe: Recipe, bound: BoundModel) -> Plan:
    """Plan of a recipe; of one that leaves a choice, with the first of the alternatives."""
    return make_plan(recipe.chosen(recipe.choose[0].name) if recipe.choose else recipe, bound)


def formats(plan: Plan) -> tuple[Any, Any]:
    """Number formats of weights and inputs; recipes of one setting agree in them."""
    config = plan.quantized[0].config
    return config.weights, config.activations


def refuse_unsuited(model: Path, bases: Sequence[Recipe], extra: Sequence[Recipe]) -> None:
    """Stop before any work where something could not be compared.

    Args:
        model: Folder of the float checkpoint.
        bases: What defines the settings.
        extra: More recipes of ours.

    Raises:
        PlanError: A setting has static inputs, or a recipe has the formats of no setting.
    """
    bound = bind(model)
    known = {base.name: formats(planned(base, bound)) for base in bases}
    for name, (_, activations) in known.items():
        if activations is not None and not activations.dynamic:
            raise PlanError(f"setting {name}: other tools are measured with dynamic inputs only")
    for recipe in extra:
        if formats(planned(recipe, bound)) not in known.values():
            raise PlanError(
                f"recipe {recipe.name!r} has the number formats of none of the settings",
                remedy=f"settings are {', '.join(known)}",
            )


@dataclass(frozen=True)
class Job:
    """One model, what it is calibrated and measured with, and where files may go."""

    name: str
    model: Path
    calibrations: tuple[Path, ...]
    yardstick: Yardstick
    work: Path


def over_sets(job: Job, single: Callable[[Path], Row]) -> Row:
    """Run with each calibration set."""
    return averaged([single(calibration) for calibration in job.calibrations])


def run_ours(job: Job, setting: str, recipe: Recipe, calibration: Path) -> Row:
    """Quantize with a recipe of ours and measure the checkpoint as it is."""
    with tempfile.TemporaryDirectory(dir=job.work) as folder:
        out = Path(folder) / "out"
        watch = stopwatch()
        try:
            quantize(job.model, recipe, out, calibration, dtype=torch.float32)
        except PrismQuantError as error:
            return Row(job.name, setting, "prismquant", recipe.name, why=f"failed: {error.what}")
        took = watch()
        figures = job.yardstick.measure(out) | took
    return Row(job.name, setting, "prismquant", recipe.name, figures)


def run_peer(
    job: Job, base: Recipe, tool: str, method: str, tools: Tools, calibration: Path
) -> Row:
    """Run a tool in its environment, with the formats of a setting, and measure what it leaves."""
    setting = base.name
    python = tools.pythons.get(tool)
    if python is None:
        return Row(job.name, setting, tool, method, why="not run")
    plan = planned(base, bind(job.model))
    weights, activations = formats(plan)
    with tempfile.TemporaryDirectory(dir=job.work) as folder:
        out = Path(folder) / "out"
        command = [python, "-m", f"bench.peers.{PEERS[tool].module}"]
        command += [str(job.model.resolve()), str(calibration.resolve()), str(out)]
        command += ["--method", method, "--bits", str(weights.bits)]
        command += ["--group-size", str(weights.group_size or 0)]
        command += ["--activation-bits", str(activations.bits if activations else 0)]
        command += ["--samples", str(CALIBRATION_SAMPLES), "--iterations", str(tools.iterations)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            why = f"failed: {lines[-1] if lines else done.returncode}"
            return Row(job.name, setting, tool, method, why=why)
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        took = {key: report[key] for key in ("seconds", "cpu_seconds")}
        figures = job.yardstick.measure(out, plan.quantized) | took
    return Row(job.name, setting, tool, method, figures, versions=report["versions"])


def runs(
    job: Job, base: Recipe, extra: Sequence[Recipe], tools: Tools
) -> Iterator[tuple[str, str, Callable[[], Row]]]:
    """All that is compared at a setting: tool, method, and what runs it; rounding to nearest first,
    then ours, then theirs.
    """
    setting, bound = base.name, bind(job.model)
    wanted = formats(planned(base, bound))
    minmax = {"solver": "rtn", "weight_range": "minmax"}
    same = [recipe for recipe in extra if formats(planned(recipe, bound)) == wanted]
    for recipe in (base.with_rules(minmax, name=f"{setting} rtn minmax"), base, *same):
        single = partial(run_ours, job, setting, recipe)
        yield "prismquant", recipe.name, partial(over_sets, job, single)
    for tool, peer in PEERS.items():
        for method in peer.weights if wanted[1] is None else peer.activations:
            single = partial(run_peer, job, base, tool, method, tools)
            yield tool, method, partial(over_sets, job, single)


def drawn_sets(count: int, work: Path) -> list[Path]:
    """Calibration sets of generated questions, each about one picture."""
    return [
        write_dataset(
            work / f"calibration-{seed}",
            split="calibration",
            seed=seed,
            count=CALIBRATION_SAMPLES,
            mix={"image": 1.0},
        )
        for seed in range(count)
    ]


def jobs(options: argparse.Namespace, work: Path) -> Iterator[Job]:
    """The model as it is, and with activation outliers; both compute the same in floating point."""
    outliers = work / "outliers"
    if "outliers" in options.models:
        settings = {"factor": options.factor, "channels": options.channels, "modality": "llm"}
        add_outliers(options.model, outliers, **settings)
    calibrations = tuple(options.calibrations or drawn_sets(options.sets, work))
    evaluation = options.evaluation or write_dataset(
        work / "evaluation", split="evaluation", count=options.samples
    )
    for name in options.models:
        model = {"plain": options.model, "outliers": outliers}[name]
        called = f"{options.name} {name}" if options.name else name
        yield Job(called, model, calibrations, Yardstick(model, evaluation), work)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="compare tools")
    for tool in PEERS:
        parser.add_argument(
            f"--{tool}-python",
            type=Path,
            metavar="PATH",
            help=f"interpreter of an environment with {tool}",
        )
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="default: the embedded one")
    parser.add_argument("--name", help="what the table calls it")
    parser.add_argument("--calibrations", nargs="+", type=Path, help="its sets, in place of --sets")
    parser.add_argument("--evaluation", type=Path, help="its questions, in place of --samples")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="presets, or w2a16")
    parser.add_argument(
        "--recipes",
        nargs="*",
        default=[],
        help="more recipes of ours; each is compared at the setting with its number formats",
    )
    parser.add_argument("--samples", type=int, default=600, help="evaluation questions")
    parser.add_argument("--sets", type=int, default=1, help="calibration sets to average over")
    parser.add_argument(
        "--group-size", type=int, help="of weights with a scale by group; default: the recipe's"
    )
    parser.add_argument("--iterations", type=int, default=200, help="of auto-round, in each block")
    parser.add_argument("--factor", type=float, default=64.0, help="of outliers, a power of two")
    parser.add_argument("--channels", type=int, default=4, help="outlier channels at each norm")
    parser.add_argument("--cells", type=Path, default=None, help="file of finished rows")
    parser.add_argument("--out", type=Path, default=None, help="write the table there as Markdown")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all of it and print the table."""
    options = parse(arguments)
    given = {tool: getattr(options, f"{tool}_python".replace("-", "_")) for tool in PEERS}
    # Absolute, because tools run elsewhere; not resolved, because a link tells the environment.
    pythons = {tool: str(path.absolute()) for tool, path in given.items() if path}
    tools = Tools(pythons, options.iterations)
    bases, extra = (
        [named_recipe(name, options.group_size) for name in names]
        for names in (options.settings, options.recipes)
    )
    refuse_unsuited(options.model, bases, extra)
    console = Console(width=160, highlight=False)
    rows: list[Row] = []
    kept = Cells(options.cells, {"samples": options.samples, "sets": options.sets})
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs(options, Path(folder)):
            for base in bases:
                for tool, method, compare in runs(job, base, extra, tools):
                    key = (job.name, base.name, tool, method)
                    rows.append(Row(**kept.done[key]) if key in kept.done else compare())
                    if key not in kept.done and not rows[-1].why:
                        kept.add(key, asdict(rows[-1]))
                    console.print(" | ".join(cells(rows[-1])), style="dim", markup=False)
                    if options.out is not None:  # after each row: a full run takes an hour
                        options.out.parent.mkdir(parents=True, exist_ok=True)
                        table = markdown_table(HEADERS, [cells(row) for row in rows])
                        options.out.write_text(table, encoding="utf-8")
    exact = next((row.figures["reference_exact_match"] for row in rows if row.figures), None)
    versions = {"torch": torch.__version__, "prismquant": version("prismquant")}
    tool_versions = {row.tool: dict(row.versions) for row in rows if row.versions}
    facts = {
        "threads": torch.get_num_threads(),
        "samples": options.samples,
        "calibration_sets": options.sets,
        "reference_exact_match": exact,
        "versions": {"prismquant": versions, **tool_versions},
    }
    title = f"{options.samples} questions, {facts['threads']} thread(s)"
    title += "" if exact is None else f", float model {100 * exact:.1f} % exact"
    console.print(rich_table(HEADERS, [cells(row) for row in rows], title=title))
    headers, *best = best_rows(rows)
    if best:
        console.print(rich_table(headers, best, title="KL on answers"))
    print(json.dumps({"bench": "peers", **facts, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
