"""The commands: each is a few lines over :mod:`prismquant.api`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prismquant.arguments import as_choice, as_path
from prismquant.cli.analyze_command import analyze
from prismquant.cli.arch_commands import archs
from prismquant.cli.generate_command import generate
from prismquant.cli.options import (
    AnalyzeOptions,
    Arch,
    AsJson,
    EvalOptions,
    Fallback,
    GenerateOptions,
    KVCache,
    Model,
    OnFailure,
    QuantizeOptions,
    RecipeOption,
    SearchOptions,
    Shards,
    takes,
)
from prismquant.cli.output import console as make_console
from prismquant.cli.output import say, say_json, show
from prismquant.cli.recipe_commands import recipes
from prismquant.cli.written import print_findings, print_remarks, require_sound, tell_run
from prismquant.errors import ArgumentError, PrismQuantError
from prismquant.memory import collecting_seldom
from prismquant.report.tables import as_text
from prismquant.version import __version__

if TYPE_CHECKING:
    from prismquant.recipe.importers.imported import Imported

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize vision-language models after training, and prove what was lost.",
)
app.command()(takes(AnalyzeOptions)(analyze))
app.command()(takes(GenerateOptions)(generate))
app.add_typer(archs, name="arch")
app.add_typer(recipes, name="recipe")


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the trace of an error; before or after a command.")
    ] = False,
) -> None:
    # Where the flag stands behind the command, nobody here sees it: see `prismquant.cli.main`.
    del debug
    if version:
        say(__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for the results.")] = "demo-out",
    as_json: AsJson = False,
) -> None:
    """Quantize the embedded model with W4A16 and W4A8 and show float, RTN and GPTQ side by side."""
    from prismquant.demo.main_job import run_demo
    from prismquant.report.tables import comparison_table
    from prismquant.threads import use_threads

    use_threads(None)
    report = run_demo(out, say=make_console(stderr=True).print if as_json else show)
    if as_json:
        say_json(report.to_dict())
        return
    show(comparison_table(report.rows, title=report.title))
    show(as_text(f"checkpoints, records and results.json: {out}"), soft_wrap=True)


@app.command()
def inspect(
    model: Model,
    recipe: RecipeOption = "w4a16",
    kv_cache: KVCache = None,
    fallback: Fallback = False,
    on_failure: OnFailure = None,
    tensor_parallel: Shards = None,
    arch: Arch = None,
    as_json: AsJson = False,
) -> None:
    """Print the plan: every layer with its format and size. Reads headers only, no weights."""
    from prismquant.api import inspect as make
    from prismquant.recipe.importers.import_recipe import import_recipe
    from prismquant.report.plan_summary import PlanSummary
    from prismquant.report.plans import layer_table, totals_table, transform_table

    imported = import_recipe(recipe)
    with collecting_seldom():
        plan = make(
            model,
            imported,
            kv_cache=kv_cache,
            fallback=fallback,
            on_failure=on_failure,
            tensor_parallel=tensor_parallel,
            arch=arch,
        )
        content = plan.to_dict()
    if as_json:
        translated = {} if imported.translation is None else {"translation": imported.to_dict()}
        say_json(content | translated)
        return
    summary = PlanSummary.from_dict(content)
    for table in (layer_table(summary), transform_table(summary), totals_table(summary)):
        if table is not None:
            show(table)
    for remark in plan.remarks:
        show(as_text(f"note: {remark}", "yellow"))


@app.command()
@takes(QuantizeOptions)
def quantize(asked: QuantizeOptions) -> None:
    """Quantize a checkpoint into a folder that transformers and vLLM load."""
    from prismquant.api import quantize as run
    from prismquant.check import check
    from prismquant.distributed import joined
    from prismquant.report.progress import ProgressReporter
    from prismquant.threads import use_threads

    recipe = _one_recipe(asked)
    pace = use_threads(asked.threads, _earlier_threads(asked.out) if asked.resume else None)
    console = make_console(stderr=True)
    with joined() as ranks:
        first = ranks.rank == 0
        pace = pace if ranks.size == 1 and asked.device == "cpu" else None
        shown = ProgressReporter(console, pace) if first else contextlib.nullcontext()
        with shown as reporter:
            result = run(
                asked.model,
                recipe,
                asked.out,
                asked.calib,
                arch=asked.arch,
                samples=asked.samples,
                batch_size=asked.batch_size,
                solver=asked.solver,
                kv_cache=asked.kv_cache,
                fallback=asked.fallback,
                on_failure=asked.on_failure,
                tensor_parallel=asked.tensor_parallel,
                device=asked.device if asked.device != "cuda" else ranks.device,
                dtype=asked.dtype,
                resume=asked.resume,
                trust_remote_code=asked.trust_remote_code,
                reporter=reporter,
                max_pixels=asked.max_pixels,
                max_frames=asked.max_frames,
                max_length=asked.max_length,
                seq_length=asked.seq_length,
                memory_budget=asked.memory_budget,
                ranks=ranks,
                strict=asked.strict,
            )
    if not first:
        return
    report = check(asked.out)
    tell_run(result, report, asked.out, console, as_json=asked.as_json)
    require_sound(report, damaged=bool(result.record.damaged))


def _one_recipe(asked: QuantizeOptions) -> str | Imported:
    """The recipe that a command names in one of two ways.

    Raises:
        ArgumentError: It names none, or names it in both.
        RecipeError: MQuant's flags are not valid.
    """
    from prismquant.recipe.importers.import_recipe import import_recipe

    if (asked.recipe is None) == (asked.mquant_args is None):
        raise ArgumentError("a run has one recipe", remedy="give --recipe or --mquant-args")
    if asked.mquant_args is not None:
        return import_recipe(asked.mquant_args, "mquant")
    return str(asked.recipe)


def _earlier_threads(out: str) -> int | None:
    """With how many threads a run went on last: others may round sums in another order."""
    from prismquant.run.directory import RunDirectory

    try:
        return RunDirectory(Path(out)).load().threads[-1]
    except (PrismQuantError, IndexError):
        return None  # what is wrong with the folder is said when the run looks at it


@app.command()
def export(
    model: Model,
    format_name: Annotated[
        str, typer.Option("--format", help="dense, compressed-tensors, gptq, awq, gguf ..")
    ],
    out: Annotated[str, typer.Option(help="Folder of the result.", show_default=False)],
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only",
            help="Drop quantized inputs and caches where the format cannot say them.",
        ),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of dense weights: float32, bfloat16 or float16.")
    ] = None,
    arch: Arch = None,
    as_json: AsJson = False,
) -> None:
    """Write a quantized checkpoint in another format, or say which layers it cannot hold."""
    from prismquant.api import export as run
    from prismquant.check import check
    from prismquant.models.given_arch import described_by
    from prismquant.report.progress import CountProgress

    console = make_console(stderr=True)
    options = {} if dtype is None else {"dtype": dtype}
    with CountProgress(console) as progress, described_by(arch):
        result = run(
            model, format_name, out, weights_only=weights_only, options=options, progress=progress
        )
    report = check(out)
    if as_json:
        say_json(result.to_dict() | {"check": report.to_dict()})
    else:
        print_remarks(console, result.remarks)
        print_findings(console, report)
        size = f"{result.bytes / 2**20:.1f} MiB"
        line = f"written: {out} ({result.format}, {result.layers} quantized layers, {size})"
        console.print(as_text(line), soft_wrap=True)
    require_sound(report)


@app.command()
@takes(SearchOptions)
def search(asked: SearchOptions) -> None:
    """Find the best mix of formats within a budget, and write it as a recipe."""
    from prismquant.api import find_mix
    from prismquant.models.given_arch import described_by
    from prismquant.report.fronts import front_table, mix_table, swap_table
    from prismquant.report.progress import CountProgress
    from prismquant.search.constraints import Asked

    given = {name: getattr(asked, name) for name in Asked.__annotations__}
    console = make_console(stderr=True)
    with CountProgress(console) as progress, described_by(asked.arch):
        found = find_mix(
            asked.sensitivity,
            out=asked.out,
            pareto=asked.pareto,
            points=asked.points,
            verify=asked.verify,
            swaps=asked.swaps,
            model=asked.model,
            calibration=asked.calib,
            progress=progress,
            **given,
        )
    content = found.to_dict()
    if asked.as_json:
        say_json(content | {"out": asked.out, "pareto": asked.pareto})
        return
    if found.front is not None:
        show(front_table(found.front))
    show(mix_table(content))
    if found.verified is not None:
        show(swap_table(content["verified"]))
    print_remarks(console, found.mix.notes)
    if asked.out is None:
        say(found.text, newline=False)
    for written in filter(None, (asked.out, asked.pareto)):
        console.print(as_text(f"written: {written}"), soft_wrap=True)


@app.command("check")
def check_folder(
    folder: Model,
    target: Annotated[
        str | None,
        typer.Option("--for", help="Who loads it: vllm, transformers, sglang or prismquant."),
    ] = None,
    arch: Arch = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a checkpoint will load, and as it is meant. Reads no weight."""
    from prismquant.check import TargetReader
    from prismquant.check import check as look
    from prismquant.models.given_arch import described_by
    from prismquant.report.checks import findings_table, verdict

    reader = None if target is None else as_choice(target, "reader", TargetReader)
    with described_by(arch):
        report = look(as_path(folder, "folder"), reader)
    if as_json:
        say_json(report.to_dict())
    else:
        found = findings_table(report)
        if found is not None:
            show(found)
        show(as_text(verdict(report)), soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


@app.command("eval")
@takes(EvalOptions)
def evaluate(asked: EvalOptions) -> None:
    """Exact match, NLL, and KL divergence to the reference, by kind of question and of token."""
    from prismquant.api import measure
    from prismquant.report.fronts import prediction_table
    from prismquant.report.tables import comparison_table, detail_table, reference_variant, variant
    from prismquant.shards import weight_bytes
    from prismquant.storage import write_json
    from prismquant.threads import use_threads

    inputs = (asked.model, asked.reference, asked.data)
    target = None if asked.out is None else _result_file(asked.out, inputs)
    use_threads(None)
    result = measure(
        asked.model,
        asked.data,
        reference=asked.reference,
        arch=asked.arch,
        limit=asked.limit,
        max_pixels=asked.max_pixels,
        max_frames=asked.max_frames,
        max_length=asked.max_length,
        seq_length=asked.seq_length,
        batch_size=asked.batch_size,
        generated=asked.generated,
        trust_remote_code=asked.trust_remote_code,
    )
    measured = result.to_dict()
    if asked.out is not None and target is not None:
        # Again: the work may have taken hours.
        write_json(_result_file(asked.out, inputs), measured)
    if asked.as_json:
        say_json(measured)
        return
    rows = [reference_variant(asked.reference, measured)] if asked.reference else []
    rows.append(variant(asked.model, measured, size=weight_bytes(Path(asked.model))))
    show(comparison_table(rows), detail_table(measured))
    if (compared := prediction_table(measured)) is not None:
        show(compared)
    for note in result.notes:
        show(as_text(f"note: {note}", "yellow"), soft_wrap=True)
    if asked.reference is not None and result.overall.exact_match is not None:
        lost, won = len(result.right_to_wrong), len(result.wrong_to_right)
        show(as_text(f"answers lost {lost}, won {won}, against {asked.reference}"), soft_wrap=True)


def _result_file(out: str, inputs: Sequence[str | None]) -> Path:
    """A file that the result of an evaluation can be written to, as far as that is seen now.

    Raises:
        ArgumentError: No file is called so.
        StorageError: Something lies there that is not to be replaced, or it cannot be written.
    """
    from prismquant.evaluate.figures import Fidelity
    from prismquant.outputs import require_result_file

    path = as_path(out, "out")
    # An input that is no path may be the name of a data set; what is wrong with it is said later.
    read = [Path(name) for name in inputs if name and os.path.lexists(name)]
    # Fields with a default are those that later versions added.
    keys = [field.name for field in fields(Fidelity) if field.default_factory is MISSING]
    require_result_file(path, inputs=read, keys=keys)
    return path
