"""Table of what became of another tool's recipe."""

from __future__ import annotations

from rich.table import Table

from prismquant.diagnostics.translation import TranslatedSetting, Translation
from prismquant.report.tables import rich_table


def translation_table(translation: Translation) -> Table:
    """One row for each setting: what became of it, its place and value, ours, and why."""
    parts = {
        "honoured": translation.honoured,
        "changed": translation.changed,
        "dropped": translation.dropped,
    }
    rows = [
        [name, one.place, one.value, one.ours or _nearest(one), one.why]
        for name, part in parts.items()
        for one in part
    ]
    headers = ["", "setting", "value", "ours", "why"]
    table = rich_table(headers, rows, title=translation.heading)
    for column in table.columns:
        column.justify = "left"
    return table


def _nearest(one: TranslatedSetting) -> str:
    return f"nearest: {one.nearest}" if one.nearest else ""
