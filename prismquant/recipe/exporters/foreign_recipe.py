"""A recipe in another tool's words, with what became of each setting of ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prismquant.diagnostics.translation import WrittenSetting
from prismquant.errors import RecipeError, listed


@dataclass(frozen=True)
class ForeignRecipe:
    """Another tool's recipe.

    Attributes:
        dialect: Whose recipe it is.
        name: Of our recipe.
        text: The recipe, as a file or a command line of the tool.
        written: Settings that mean there what they mean here.
        changed: Settings that mean something else there, and how.
        dropped: Settings that have no counterpart there, and why.
        guessed: What our recipe does not say, and the text does.
    """

    dialect: str
    name: str
    text: str
    written: tuple[WrittenSetting, ...] = ()
    changed: tuple[WrittenSetting, ...] = ()
    dropped: tuple[WrittenSetting, ...] = ()
    guessed: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, tuple[WrittenSetting, ...]]:
        """Settings by what became of them."""
        return {"written": self.written, "changed": self.changed, "dropped": self.dropped}

    @property
    def heading(self) -> str:
        """Whose recipe it is, and how many settings became what."""
        counts = ", ".join(f"{len(part)} {name}" for name, part in self.parts.items())
        return f"{self.name} was written as a recipe of {self.dialect}: settings {counts}"

    @property
    def lines(self) -> tuple[str, ...]:
        """Lines for a user: whose recipe it is, and all that is not as it is here."""
        return (self.heading, *self._findings(), *(f"guessed: {one}" for one in self.guessed))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "dialect": self.dialect,
            "name": self.name,
            "text": self.text,
            **{name: [vars(one) for one in part] for name, part in self.parts.items()},
            "guessed": list(self.guessed),
        }

    def require_exact(self) -> None:
        """Refuse a translation that changes or drops anything.

        Raises:
            RecipeError: It does; lists all of it.
        """
        findings = list(self._findings())
        if findings:
            raise RecipeError(
                f"{self.dialect} cannot say the recipe as it is:{listed(findings)}",
                where=self.name,
                remedy="leave these settings out, or drop --strict",
                findings=findings,
            )

    def _findings(self) -> Iterator[str]:
        for kind in ("changed", "dropped"):
            yield from (f"{kind}: {one.describe()}" for one in self.parts[kind])
