"""Bookkeeping of an importer: each setting of the source, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from prismquant.diagnostics.translation import TranslatedSetting
from prismquant.errors import RecipeError, listed, shortened, suggest
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.schema import parse_recipe

_LONGEST = 200


class Ledger:
    """Settings of one source, noted while it is read; wrong ones are gathered into one error.

    Args:
        dialect: Whose recipe it is.
        source: Name of the file, or the beginning of the text.
    """

    def __init__(self, dialect: str, source: str) -> None:
        self._dialect = dialect
        self._source = source
        # Settings that several layers share are read more than once, and noted once.
        self._noted: dict[str, dict[TranslatedSetting, None]] = {
            "honoured": {},
            "changed": {},
            "dropped": {},
        }
        self._wrong: list[str] = []

    @property
    def faults(self) -> int:
        """Number of settings that were noted as wrong so far."""
        return len(self._wrong)

    def honoured(self, place: str, value: Any, ours: str, why: str = "") -> None:
        """Note a setting that means here what it means there."""
        self._note("honoured", TranslatedSetting(place, shown(value), ours, why))

    def changed(self, place: str, value: Any, ours: str, why: str) -> None:
        """Note a setting that means something else here."""
        self._note("changed", TranslatedSetting(place, shown(value), ours, why))

    def dropped(self, place: str, value: Any, why: str, nearest: str = "") -> None:
        """Note a setting that has no effect here."""
        self._note("dropped", TranslatedSetting(place, shown(value), "", why, nearest))

    def overruled(self, place: str, why: str) -> None:
        """Note that a setting, and all below its place, have no effect: another one counts."""
        for kind in ("honoured", "changed"):
            for setting in list(self._noted[kind]):
                if setting.place == place or setting.place.startswith((f"{place}.", f"{place}[")):
                    del self._noted[kind][setting]
                    self._note("dropped", replace(setting, ours="", why=why))

    def wrong(self, place: str, what: str) -> None:
        """Note a setting that cannot be: :meth:`finish` refuses the source."""
        self._wrong.append(f"{place}: {what}" if place else what)

    def mapping(self, place: str, value: Any) -> Mapping[str, Any]:
        """The value if it is a mapping of words; else an empty one, and a note that it is wrong."""
        if not isinstance(value, Mapping):
            self.wrong(place, f"expected a mapping, found {quoted(value)}")
            return {}
        for key in value:
            if not isinstance(key, str):
                self.wrong(place, f"a key is a word, not {quoted(key)}")
        return {key: one for key, one in value.items() if isinstance(key, str)}

    def refuse_unknown(self, place: str, given: Mapping[str, Any], known: Collection[str]) -> None:
        """Note each key that the tool does not know either."""
        for key in given:
            if key not in known:
                self.wrong(joined(place, key), f"unknown key; {suggest(key, known)}")

    def finish(self, content: Mapping[str, Any]) -> Imported:
        """The recipe with the notes.

        Args:
            content: The recipe, in the words of our grammar.

        Raises:
            RecipeError: A setting cannot be; lists all of them.
        """
        self.require_valid()
        recipe = parse_recipe(content, source=f"{self._source}, read as {self._dialect}")
        parts = {name: tuple(noted) for name, noted in self._noted.items()}
        kept = (parts["honoured"], parts["changed"], parts["dropped"])
        return Imported(self._dialect, recipe, self._source, *kept)

    def require_valid(self) -> None:
        """Refuse a source in which something was noted as wrong.

        Raises:
            RecipeError: It was; lists all of it.
        """
        if self._wrong:
            raise RecipeError(
                f"the recipe of {self._dialect} is not valid:{listed(self._wrong)}",
                where=self._source,
                findings=self._wrong,
            )

    def _note(self, kind: str, setting: TranslatedSetting) -> None:
        self._noted[kind][setting] = None


def shown(value: Any) -> str:
    """A value of the source as text: JSON where it is some, shortened where it is long."""
    if isinstance(value, str):
        text = value
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, default=_as_list)
        except (TypeError, ValueError):
            text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}.."


def quoted(value: Any) -> str:
    """A value of the source as an error shows it, so that a text is told from a number."""
    if not isinstance(value, str):
        return shown(value)
    text = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}.."
    return f"the text {json.dumps(text, ensure_ascii=False)}"


def in_quotes(value: Any) -> str:
    """A value of the source as the subject of an error: a text in quotes, anything else shown."""
    return shortened(value) if isinstance(value, str) else shown(value)


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    raise TypeError


def joined(place: str, key: str) -> str:
    """The place of a key within that of its mapping."""
    return f"{place}.{key}" if place else key
