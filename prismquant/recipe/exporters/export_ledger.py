"""Bookkeeping of an exporter: each setting of a recipe, and what became of it."""

from __future__ import annotations

from typing import Any

from prismquant.diagnostics.translation import WrittenSetting
from prismquant.recipe.exporters.layer_work import LayerWork, RulePlaces
from prismquant.recipe.importers.ledger import shown


class ExportLedger:
    """Settings of one recipe, noted while it is written.

    Args:
        places: Where its fields are said.
    """

    def __init__(self, places: RulePlaces) -> None:
        self.places = places
        # Layers share settings, which are noted once.
        self.noted: dict[str, dict[WrittenSetting, None]] = {
            "written": {},
            "changed": {},
            "dropped": {},
        }
        self.guesses: dict[str, None] = {}

    def written(self, place: str, value: Any, theirs: str, why: str = "") -> None:
        """Note a setting that means there what it means here."""
        self.noted["written"][WrittenSetting(place, shown(value), theirs, why)] = None

    def changed(self, place: str, value: Any, theirs: str, why: str) -> None:
        """Note a setting that means something else there."""
        self.noted["changed"][WrittenSetting(place, shown(value), theirs, why)] = None

    def dropped(self, place: str, value: Any, why: str, nearest: str = "") -> None:
        """Note a setting that has no counterpart there."""
        self.noted["dropped"][WrittenSetting(place, shown(value), "", why, nearest)] = None

    def guessed(self, what: str) -> None:
        """Note what the recipe does not say, and the text does."""
        self.guesses[what] = None

    @property
    def noted_places(self) -> set[str]:
        """Places of which anything is noted."""
        return {one.place for part in self.noted.values() for one in part}

    def mentions(self, place: str) -> bool:
        """Whether anything is noted of a place, or below it."""
        below = (f"{place}.", f"{place} ")
        return any(one == place or one.startswith(below) for one in self.noted_places)


class WorkNotes:
    """Notes on the fields of one kind of layers.

    Args:
        ledger: Where they go.
        work: What is done to these layers.
    """

    def __init__(self, ledger: ExportLedger, work: LayerWork) -> None:
        self._ledger = ledger
        self.work = work
        self.config = work.config

    def said(self, name: str) -> bool:
        """Whether the recipe says a field, or a key in it; else it has its default."""
        return self._ledger.places.said(self.work, name)

    def written(self, name: str, value: Any, theirs: str, why: str = "") -> None:
        """Note a field as meaning there what it means here."""
        self._ledger.written(self._at(name), value, theirs, why)

    def changed(self, name: str, value: Any, theirs: str, why: str) -> None:
        """Note a field as meaning something else there."""
        self._ledger.changed(self._at(name), value, theirs, why)

    def dropped(self, name: str, value: Any, why: str, nearest: str = "") -> None:
        """Note a field as having no counterpart there."""
        self._ledger.dropped(self._at(name), value, why, nearest)

    def either(self, name: str, value: Any, theirs: str, why: str) -> None:
        """Note a field as changed where there is a reason, else as written."""
        if why:
            self.changed(name, value, theirs, why)
        else:
            self.written(name, value, theirs)

    def guessed(self, what: str) -> None:
        """Note what the recipe does not say, and the text does."""
        self._ledger.guessed(what)

    def _at(self, name: str) -> str:
        return self._ledger.places.of(self.work, name)


def note_fallback(notes: WorkNotes, why: str) -> None:
    """Note what to do where a format cannot hold a layer, for a tool that is not told.

    Args:
        notes: On the layer.
        why: What the tool does; empty: it has no groups here.
    """
    weights, value = notes.config.weights, notes.work.fallback
    grouped = weights is not None and weights.granularity.grouped
    if grouped and why and (value != "error" or notes.said("fallback")):
        notes.dropped("fallback", value, why)
    elif notes.said("fallback"):
        notes.written("fallback", value, "", "no width is cut into groups")
