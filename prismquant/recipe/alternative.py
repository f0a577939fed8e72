"""One alternative of a recipe that leaves a choice: rules and transforms on top of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from prismquant.models.arch import Modality
from prismquant.recipe.match import Strict
from prismquant.recipe.rule import LayerRule
from prismquant.recipe.transform_rule import TransformRule

PARTS: Mapping[str, tuple[Modality, ...]] = {
    "vision": (Modality.VISION, Modality.PROJECTOR),
    "llm": (Modality.LLM,),
}
"""Parts of a model for each of which an alternative may be chosen, by name."""


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
            words += sorted(rule.model_fields_set - {"match", "optional"})
        return " + ".join(dict.fromkeys(words)) or "nothing more"

    def within(self, part: str) -> dict[str, list[dict[str, Any]]]:
        """Rules and transforms that it adds to a part of the model, meaning layers there alone.

        Args:
            part: A key of :data:`PARTS`.
        """
        added: dict[str, list[dict[str, Any]]] = {"rules": [], "transforms": []}
        for key, entries in (("rules", self.rules), ("transforms", self.transforms)):
            for entry in entries:
                meant = [m for m in entry.match.modality or Modality if m in PARTS[part]]
                if meant:
                    match = entry.match.model_dump(mode="json", exclude_unset=True)
                    body = entry.model_dump(mode="json", exclude_unset=True)
                    added[key].append(body | {"match": match | {"modality": meant}})
        return added


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
