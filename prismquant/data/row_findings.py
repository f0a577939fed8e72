"""Findings on data, gathered: a user sees all the broken rows of a file at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from prismquant.errors import DataError

_MOST_SHOWN = 10
_MOST_PLACES = 3

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Findings(Exception):  # noqa: N818
    """Everything that is wrong with one row, or with a part of it."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines
        super().__init__(*lines)


@dataclass(frozen=True)
class RowFinding:
    """Something that is wrong, and the row in which it is."""

    where: str
    what: str


def collect(
    parse: Callable[[_In], _Out], parts: Iterable[_In], name: Callable[[int], str] = lambda _: ""
) -> list[_Out]:
    """All parts, parsed.

    Args:
        parse: Makes one of them, or raises its findings.
        parts: What to parse.
        name: What stands before the findings of a part, from its number (1, 2, ..).

    Raises:
        Findings: Those of all parts together.
    """
    results: list[_Out] = []
    lines: list[str] = []
    for number, part in enumerate(parts, start=1):
        try:
            results.append(parse(part))
        except Findings as findings:
            lines += [name(number) + line for line in findings.lines]
    if lines:
        raise Findings(*lines)
    return results


def findings_error(name: str, findings: Sequence[RowFinding]) -> DataError:
    """One error of all findings: the same of many rows is one line, and ten lines are shown."""
    places: dict[str, list[str]] = {}
    for finding in findings:
        places.setdefault(finding.what, []).append(finding.where)
    every = [_printable(f"{', '.join(where)}: {what}") for what, where in places.items()]
    lines = [f"{_listed(where)}: {what}" for what, where in places.items()]
    shown = lines[:_MOST_SHOWN]
    if len(lines) > _MOST_SHOWN:
        rest = sum(len(where) for where in list(places.values())[_MOST_SHOWN:])
        shown.append(f"and {rest} more")
    count = f"{len(findings)} finding{'s' * (len(findings) > 1)}"
    return DataError(
        f"{Path(name).name} cannot be used, {count}:\n"
        + "\n".join(f"  - {_printable(line)}" for line in shown),
        where=name,
        remedy="correct or remove these samples; nothing was started",
        findings=every,
    )


def _listed(places: Sequence[str]) -> str:
    rest = len(places) - _MOST_PLACES
    return ", ".join(places[:_MOST_PLACES]) + (f" and {rest} more" if rest > 0 else "")


def _printable(line: str) -> str:
    """A line without what a terminal would obey: rows come from strangers."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
    )
