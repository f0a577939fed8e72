"""One mapping of a source, read key by key against the table of what the tool knows there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prismquant.errors import suggest
from prismquant.recipe.importers.ledger import Ledger, in_quotes, joined, quoted


@dataclass(frozen=True)
class Setting:
    """One key that a tool knows, as importers and the page about migrating tell of it.

    Attributes:
        name: The tool's.
        default: The tool's; empty: it must be given, or does nothing where it is not.
        ours: Our key; of a setting without effect the nearest thing.
        difference: How ours differs, or why there is none.
        idle: Whether it has no effect here: then it is dropped wherever it stands.
    """

    name: str
    default: str = ""
    ours: str = ""
    difference: str = ""
    idle: bool = False


Table = tuple[Setting, ...]


def idle(name: str, difference: str, nearest: str = "", default: str = "") -> Setting:
    """A setting that has no effect here."""
    return Setting(name, default, nearest, difference, idle=True)


class SourceSection:
    """A mapping of a source.

    Settings without effect are dropped, and unknown keys noted as wrong, when it is made.

    Args:
        ledger: Where the notes go.
        place: Of the mapping within the source; empty: the whole.
        content: The mapping; anything else is noted as wrong.
        table: All keys that the tool knows there.
    """

    def __init__(self, ledger: Ledger, place: str, content: Any, table: Iterable[Setting]) -> None:
        self.ledger = ledger
        self.place = place
        self.content: Mapping[str, Any] = ledger.mapping(place, content)
        known = {setting.name: setting for setting in table}
        ledger.refuse_unknown(place, self.content, known)
        for key, value in self.content.items():
            if key in known and known[key].idle:
                ledger.dropped(self.at(key), value, known[key].difference, known[key].ours)

    def __contains__(self, key: str) -> bool:
        """Whether the key is given, and is not null."""
        return self.content.get(key) is not None

    def at(self, key: str) -> str:
        """Place of a key within the source."""
        return joined(self.place, key)

    def honoured(self, key: str, ours: str, why: str = "") -> None:
        """Note a key, where it is given, as meaning here what it means there."""
        if key in self.content:
            self.ledger.honoured(self.at(key), self.content[key], ours, why)

    def changed(self, key: str, ours: str, why: str) -> None:
        """Note a key, where it is given, as meaning something else here."""
        if key in self.content:
            self.ledger.changed(self.at(key), self.content[key], ours, why)

    def dropped(self, key: str, why: str, nearest: str = "") -> None:
        """Note a key, where it is given, as having no effect here."""
        if key in self.content:
            self.ledger.dropped(self.at(key), self.content[key], why, nearest)

    def wrong(self, key: str, what: str) -> None:
        """Note a key's value as wrong."""
        self.ledger.wrong(self.at(key), what)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self.content.get(key, default)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.wrong(key, f"true or false, not {_refused(value, bool)}")
        return default

    def number(self, key: str, default: float, least: float, most: float) -> float:
        """A number within bounds."""
        value = self.content.get(key)
        if value is None:
            return default
        fine = isinstance(value, int | float) and not isinstance(value, bool)
        if not fine or not least <= value <= most:
            self.wrong(key, f"a number from {least:g} to {most:g}, not {_refused(value, float)}")
            return default
        return float(value)

    def integer(self, key: str, default: int, least: int, most: int) -> int:
        """A whole number within bounds."""
        value = self.content.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.wrong(key, f"a whole number from {least} to {most}, not {_refused(value, int)}")
            return default
        return value

    def damping(self, key: str) -> dict[str, Any]:
        """Options of GPTQ for a fraction of the mean of the Hessian's diagonal, noted."""
        value = self.number(key, 0.01, 0, 10)
        if not value:
            self.honoured(key, "options.damping: 0")
            return {"damping": value}
        self.honoured(key, f"options.damping: {value:.15g}, damping_basis: mean")
        return {"damping": value, "damping_basis": "mean"}

    def word(self, key: str, default: str, choices: Collection[str]) -> str:
        """One of some words, whatever its case."""
        value = self.content.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or value.lower() not in choices:
            self.wrong(key, f"{in_quotes(value)} is not a choice; {suggest(str(value), choices)}")
            return default
        return value.lower()

    def words(self, key: str, default: Iterable[str] = ()) -> tuple[str, ...]:
        """One text, or a list of texts."""
        value = self.content.get(key)
        if value is None:
            return tuple(default)
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
            self.wrong(key, f"a text or a list of texts, not {quoted(value)}")
            return tuple(default)
        return tuple(listed)


def _refused(value: Any, kind: type[bool] | type[int] | type[float]) -> str:
    """A value that is none of its kind, and what to do where only quotes make it a text."""
    text = value.strip().lower() if isinstance(value, str) else ""
    try:
        fine = text in ("true", "false") if kind is bool else bool(text) and kind(text) is not None
    except ValueError:
        fine = False
    return f"{quoted(value)}{': write it without quotes' if fine else ''}"
