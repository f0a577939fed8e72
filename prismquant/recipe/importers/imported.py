"""A recipe that was read from any tool's words, with what became of each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prismquant.diagnostics.translation import TranslatedSetting, Translation
from prismquant.errors import RecipeError, listed
from prismquant.recipe.schema import Recipe

OWN = "prismquant"


@dataclass(frozen=True)
class Imported:
    """A recipe with where it comes from.

    Attributes:
        dialect: Whose recipe it was; ``prismquant`` for one of our own.
        recipe: The recipe.
        source: Name of the file, or the beginning of the text.
        honoured: Settings that mean here what they mean there.
        changed: Settings that mean something else here, and how.
        dropped: Settings that have no effect here, and why.
        data: Calibration data that it names, which are taken where no others are given.
    """

    dialect: str
    recipe: Recipe
    source: str = ""
    honoured: tuple[TranslatedSetting, ...] = ()
    changed: tuple[TranslatedSetting, ...] = ()
    dropped: tuple[TranslatedSetting, ...] = ()
    data: str = ""

    @property
    def translation(self) -> Translation | None:
        """The translation as the record keeps it; None for a recipe of our own."""
        if self.dialect == OWN:
            return None
        return Translation(self.dialect, self.source, self.honoured, self.changed, self.dropped)

    @property
    def lines(self) -> tuple[str, ...]:
        """Lines for a user on what is not as in the source; none for a recipe of our own."""
        return () if self.translation is None else tuple(self.translation.lines())

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        parts = {"honoured": self.honoured, "changed": self.changed, "dropped": self.dropped}
        return {
            "dialect": self.dialect,
            "source": self.source,
            "recipe": self.recipe.to_dict(),
            **({"data": self.data} if self.data else {}),
            **{name: [vars(one) for one in part] for name, part in parts.items()},
        }

    def require_exact(self) -> None:
        """Refuse a translation that changes or drops anything.

        Raises:
            RecipeError: It does; lists all of it.
        """
        findings = list(self.lines[1:])
        if findings:
            raise RecipeError(
                f"the recipe of {self.dialect} cannot be kept as it is:{listed(findings)}",
                where=self.source,
                remedy="leave these settings out, or drop --strict",
                findings=findings,
            )
