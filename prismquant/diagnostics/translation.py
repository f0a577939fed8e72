"""Translation of another tool's recipe, setting by setting, as the record of a run keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prismquant.arguments import EXACT


@dataclass(frozen=True)
class TranslatedSetting:
    """One setting of another tool's recipe, and what became of it.

    Attributes:
        place: Where it stands, e.g. ``modifiers[0].GPTQModifier.dampening_frac``.
        value: The value there, as text.
        ours: Our key and value, e.g. ``rules[0].options.damping: 0.01``; empty: there is none.
        why: How ours differs, or why there is none; may be empty where nothing differs.
        nearest: The nearest thing that we have; empty: none, or it is ``ours``.
    """

    __pydantic_config__ = EXACT

    place: str
    value: str
    ours: str = ""
    why: str = ""
    nearest: str = ""

    def describe(self) -> str:
        """Say in one line what became of it."""
        said = f"{self.place}: {self.value}"
        if self.ours:
            said += f" -> {self.ours}"
        said += f" ({self.why})" if self.why else ""
        return f"{said}; nearest: {self.nearest}" if self.nearest else said


@dataclass(frozen=True)
class WrittenSetting:
    """One setting of a recipe of ours, and what another tool's recipe has for it.

    Attributes:
        place: Where it stands with us, e.g. ``rules[0].options.damping``.
        value: The value there, as text.
        theirs: Their key and value; empty: there is none.
        why: How theirs differs, or why there is none; may be empty where nothing differs.
        nearest: The nearest thing that they have; empty: none, or it is ``theirs``.
    """

    place: str
    value: str
    theirs: str = ""
    why: str = ""
    nearest: str = ""

    def describe(self) -> str:
        """Say in one line what became of it."""
        return TranslatedSetting(
            self.place, self.value, self.theirs, self.why, self.nearest
        ).describe()


@dataclass(frozen=True)
class Translation:
    """Translation of another tool's recipe, setting by setting.

    Attributes:
        dialect: Whose recipe it was, e.g. ``llm-compressor``.
        source: Name of the file, or the beginning of the text.
        honoured: Settings that mean here what they mean there.
        changed: Settings that mean something else here, and how.
        dropped: Settings that have no effect here, and why.
    """

    __pydantic_config__ = EXACT

    dialect: str
    source: str
    honoured: tuple[TranslatedSetting, ...] = ()
    changed: tuple[TranslatedSetting, ...] = ()
    dropped: tuple[TranslatedSetting, ...] = ()

    @property
    def heading(self) -> str:
        """Whose recipe it was, and how many of its settings became what."""
        counts = ", ".join(
            f"{len(part)} {name}"
            for name, part in (
                ("honoured", self.honoured),
                ("changed", self.changed),
                ("dropped", self.dropped),
            )
        )
        return f"{self.source} was read as a recipe of {self.dialect}: settings {counts}"

    def lines(self) -> Iterator[str]:
        """Lines for a user: whose recipe it was, and all that is not as it is there."""
        yield self.heading
        for one in self.changed:
            yield f"changed: {one.describe()}"
        for one in self.dropped:
            yield f"dropped: {one.describe()}"
