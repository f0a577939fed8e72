"""Rows of the comparison, their mean over calibration sets, and its two tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

HEADERS = (
    *("model", "setting", "tool", "method"),
    *("KL on answers", "of pictures", "top-1", "exact match", "seconds", "of CPU"),
)
OURS = "prismquant"

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Row:
    """One line of the table; ``why`` says why there are no figures."""

    model: str
    setting: str
    tool: str
    method: str
    figures: Mapping[str, float | None] = field(default_factory=dict)
    why: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


def averaged(rows: Sequence[Row]) -> Row:
    """One row for several calibration sets; one that failed stands for all."""
    failed = next((row for row in rows if row.why), None)
    if failed is not None or len(rows) == 1:
        return failed or rows[0]
    figures: Figures = {}
    for key in rows[0].figures:
        values = [row.figures[key] for row in rows]
        known = [value for value in values if value is not None]
        figures[key] = statistics.mean(known) if known else None
    figures["kl_error"] = statistics.stdev(row.figures["kl"] or 0.0 for row in rows)
    return replace(rows[0], figures=figures)


def cells(row: Row) -> list[str]:
    """A row of the table."""
    names = [row.model, row.setting, row.tool, row.method]
    if row.why:
        return [*names, row.why, *[""] * 5]
    figures = row.figures
    error = f" ± {figures['kl_error']:.5f}" if figures["kl_error"] is not None else ""
    return [
        *names,
        f"{figures['kl']:.5f}{error}",
        "" if figures["kl_image"] is None else f"{figures['kl_image']:.5f}",
        f"{100 * (figures['top1'] or 0):.1f} %",
        f"{100 * (figures['exact_match'] or 0):.1f} %",
        f"{figures['seconds']:.1f}",
        f"{figures['cpu_seconds']:.1f}",
    ]


def best_rows(rows: Sequence[Row]) -> list[list[str]]:
    """A heading, then by model and setting: KL of rounding, of the preset, of the automatic recipe,
    the lowest of each other tool with its method, and the automatic one's over the lowest of these.
    """
    tools = dict.fromkeys(row.tool for row in rows if row.tool != OURS)
    found = [["model", "setting", "rounding", "preset", "automatic", *tools, "ratio"]]
    for model, setting in dict.fromkeys((row.model, row.setting) for row in rows):
        own = [row for row in rows if (row.model, row.setting) == (model, setting) and row.figures]
        ours = {row.method: _kl(row) for row in own if row.tool == OURS}
        names = (f"{setting} rtn minmax", setting, f"auto-{setting}")
        best = {tool: _best(row for row in own if row.tool == tool) for tool in tools}
        theirs = [_kl(row) for row in best.values() if row is not None]
        if names[-1] in ours and theirs:
            kls = [f"{ours[name]:.5f}" if name in ours else "" for name in names]
            said = [f"{_kl(row):.5f} {row.method}" if row else "" for row in best.values()]
            found.append([model, setting, *kls, *said, f"{ours[names[-1]] / min(theirs):.2f}"])
    return found


def _best(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=_kl, default=None)


def _kl(row: Row) -> float:
    return row.figures["kl"] or 0.0
