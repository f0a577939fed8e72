"""Parts of a model that each have a choice of their own, and the recipes tried in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prismquant.errors import PlanError
from prismquant.models.bound import BoundModel
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.alternative import PARTS
from prismquant.recipe.schema import Recipe
from prismquant.run.method_choice import WHOLE


def parts_of(
    recipe: Recipe, names: Sequence[str], bound: BoundModel
) -> dict[str, dict[str, Recipe]]:
    """Recipes to try, by part of the model and name of the alternative.

    Alternatives that add the same to a part are tried there once, under the first one's name.

    Args:
        recipe: The recipe with the alternatives.
        names: Of those that can be laid over the model.
        bound: The model.

    Returns:
        For each part that is quantized, recipes that leave the others alone. The model as a whole
        is the only part where one of them alone is quantized, or where the alternatives cannot be
        laid over parts.
    """
    whole = {WHOLE: {name: recipe.chosen(name) for name in names}}
    rows = make_plan(whole[WHOLE][names[0]], bound).quantized
    modalities = {row.site.modality for row in rows}
    if any(modalities <= {*own} for own in PARTS.values()):
        return whole
    found: dict[str, dict[str, Recipe]] = {}
    try:
        for part in PARTS:
            found[part] = _recipes(recipe, names, part)
            for one in found[part].values():
                make_plan(one, bound)
    except PlanError:
        return whole
    return found


def _recipes(recipe: Recipe, names: Sequence[str], part: str) -> dict[str, Recipe]:
    others = [m for other, own in PARTS.items() if other != part for m in own]
    skip: Mapping[str, Any] = {"match": {"modality": others}, "skip": True}
    added = {one.name: json.dumps(one.within(part)) for one in recipe.choose if one.name in names}
    first = {content: name for name, content in reversed(added.items())}
    return {
        name: recipe.combined({part: name}).with_rules(skip)
        for name, content in added.items()
        if first[content] == name
    }
