"""One alternative of a recipe that leaves a choice: rules and transforms on top of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from prismquant.recipe.match import Strict
from prismquant.recipe.rule import LayerRule
from prismquant.recipe.transform_rule import TransformRule


class Alternative(Strict):
    """One way among several, of which held-out loss takes the best.

    Attributes:
        name: What tables and the record call it.
        rules: They come after the recipe's own.
        transforms: They come after the recipe's own.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    rules: tuple[LayerRule, ...] = ()
    transforms: tuple[TransformRule, ...] = ()

    def describe(self) -> str:
        """Say in a few words what it adds, such as ``smoothquant + correction``."""
        words = [rule.name for rule in self.transforms]
        for rule in self.rules:
            words += sorted(rule.model_fields_set - {"match"})
        return " + ".join(dict.fromkeys(words)) or "nothing more"


def choice_lines(recipe: str, choose: Sequence[Alternative]) -> list[str]:
    """Remarks on the choice that a recipe leaves, for a plan of its first alternative.

    Args:
        recipe: Its name.
        choose: The alternatives.
    """
    tried = "; ".join(f"{one.name} ({one.describe()})" for one in choose)
    return [
        f"recipe {recipe!r} leaves a choice, which needs calibration data: {tried}",
        f"this is the plan of the first alternative, {choose[0].name}",
    ]
