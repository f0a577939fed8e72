"""The findings about a checkpoint, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from prismquant.report.tables import as_text, rich_table

if TYPE_CHECKING:
    from prismquant.check import Report

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def findings_table(report: Report) -> Table | None:
    """One row a finding, the worst first; None where there is none."""
    if not report.findings:
        return None
    table = rich_table(["", "rule", "where", "what", "remedy"], [], title=report.folder)
    for column in table.columns:
        column.justify = "left"
        column.overflow = "fold"
    for finding in report.findings:
        severity = Text(str(finding.severity), style=_STYLES[finding.severity])
        rest = (finding.rule, finding.place, finding.what, finding.remedy)
        table.add_row(severity, *(as_text(part) for part in rest))
    return table


def finding_lines(report: Report) -> Iterator[str]:
    """Errors and warnings, a line each, for the end of a command that wrote the checkpoint."""
    for finding in report.findings:
        if finding.severity != "note":
            remedy = f"; {finding.remedy}" if finding.remedy else ""
            yield f"{finding.severity}: {finding.what}: {finding.place}{remedy} [{finding.rule}]"


def verdict(report: Report) -> str:
    """One line: how many findings of what severity, for whom."""
    who = f" for {report.target}" if report.target else ""
    counts = ", ".join(
        f"{number} {severity}{'' if number == 1 else 's'}"
        for severity in _STYLES
        if (number := sum(finding.severity == severity for finding in report.findings))
    )
    method = f"{report.layers} quantized layers" if report.method else "floating point"
    return f"{report.folder}{who}: {counts or 'nothing found'} ({method}, {report.rules} rules)"
