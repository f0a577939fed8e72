"""Words on a checkpoint that a command has written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prismquant.cli.output import say_json
from prismquant.errors import StorageError
from prismquant.report.tables import as_text

if TYPE_CHECKING:
    from prismquant.check import Report
    from prismquant.quantization.request import Result


def tell_run(result: Result, report: Report, out: str, console: Any, *, as_json: bool) -> None:
    """Say what a run has done, as one JSON object or in tables."""
    from prismquant.diagnostics.failed_layers import failed_layers
    from prismquant.report.layer_predictions import compared_layers, comparison_table
    from prismquant.report.method_choices import choice_table
    from prismquant.report.plans import memory_line, run_table, token_lines
    from prismquant.report.run_files import RunFiles
    from prismquant.report.translations import translation_table

    if as_json:
        body = {
            "out": out,
            "failed": [name for step in result.record.steps for name in failed_layers(step.layers)],
            "notes": [*result.plan.remarks, *result.notes],
            "compared": [asdict(layer) for layer in compared_layers(result.record)],
            "record": result.record.to_dict(),
            "check": report.to_dict(),
        }
        say_json(body)
        return
    files = RunFiles.read(result.folder)
    if files.record.translation is not None:
        console.print(translation_table(files.record.translation))
    if files.record.choice is not None:
        console.print(choice_table(files.record.choice))
    console.print(run_table(files))
    if (compared := comparison_table(files.record)) is not None:
        console.print(compared)
    console.print(memory_line(files.record))
    for line in token_lines(files):
        console.print(as_text(line))
    print_remarks(console, [*result.plan.remarks, *result.notes])
    print_findings(console, report)
    console.print(as_text(f"written: {out}"), soft_wrap=True)


def require_sound(report: Any, *, damaged: bool = False) -> None:
    """End with an error where the check of what was written has found one.

    Args:
        report: Of the check.
        damaged: Whether the source holds NaN or infinities, which the result has kept.

    Raises:
        StorageError: It has.
    """
    if not report.ok:
        why = "the source model is damaged itself" if damaged else "please report it"
        raise StorageError(
            "the files were written, but the check of them found errors: see above",
            where=str(report.folder),
            remedy=f"do not serve them; `prismquant check` tells all there is; {why}",
        )


def print_remarks(console: Any, remarks: Sequence[str]) -> None:
    """Print what a user should know of the checkpoint before serving it."""
    for remark in remarks:
        console.print(as_text(f"note: {remark}", "yellow"))


def print_findings(console: Any, report: Any) -> None:
    """Errors and warnings about what was written, a line each."""
    from prismquant.report.checks import finding_lines

    for line in finding_lines(report):
        console.print(as_text(line, "yellow"), soft_wrap=True)
