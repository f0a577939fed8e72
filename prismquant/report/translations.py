"""Tables of what became of another tool's recipe, or of ours in its words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from prismquant.diagnostics.translation import TranslatedSetting, Translation, WrittenSetting
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
    return _table("ours", rows, translation.heading)


def written_table(heading: str, parts: Mapping[str, Sequence[WrittenSetting]]) -> Table:
    """One row for each setting of ours: what became of it, its place and value, theirs, and why.

    Args:
        heading: Title of the table.
        parts: Settings by what became of them.
    """
    rows = [
        [name, one.place, one.value, one.theirs or _nearest(one), one.why]
        for name, part in parts.items()
        for one in part
    ]
    return _table("theirs", rows, heading)


def _table(other: str, rows: list[list[str]], heading: str) -> Table:
    table = rich_table(["", "setting", "value", other, "why"], rows, title=heading)
    for column in table.columns:
        column.justify = "left"
    return table


def _nearest(one: TranslatedSetting | WrittenSetting) -> str:
    return f"nearest: {one.nearest}" if one.nearest else ""
