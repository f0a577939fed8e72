"""Tables of families, and of what became of the claims of an architecture file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from prismquant.report.tables import rich_table

_VERDICTS = {True: "holds", False: "WRONG", None: "not tried"}


def families_table(families: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each family: its file, its name, its model types."""
    rows = [[one["name"], one["title"], ", ".join(one["model_types"])] for one in families]
    return _left(rich_table(["file", "family", "model types"], rows))


def claims_table(check: Mapping[str, Any]) -> Table:
    """One row for each claim of an architecture file: whether it holds, and what decided."""
    rows = [[_VERDICTS[one["holds"]], one["what"], one["said"]] for one in check["claims"]]
    blocks = ", ".join(f"{count} {tower} blocks" for tower, count in check["blocks"].items())
    title = f"{check['arch']}.toml on a small random {check['title']}: {blocks}"
    return _left(rich_table(["", "claim", "seen"], rows, title=title))


def verdict(check: Mapping[str, Any]) -> str:
    """The outcome in a sentence."""
    held = [one["holds"] for one in check["claims"]]
    wrong, untried = held.count(False), held.count(None)
    left = f"; {untried} could not be tried" if untried else ""
    if wrong:
        return f"{wrong} of {len(held)} claims are wrong{left}: nothing should be quantized by it"
    return f"all of {len(held) - untried} claims hold{left}"


def _left(table: Table) -> Table:
    for column in table.columns:
        column.justify = "left"
    return table
