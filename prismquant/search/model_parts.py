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
from prismquant.run.method_choice import WHOLE, MethodTrial


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


def one_for_all(
    recipe: Recipe,
    chosen: Mapping[str, str],
    names: Sequence[str],
    trials: Sequence[MethodTrial],
) -> str | None:
    """The single alternative with the least sum of losses, against which a joint choice is tried.

    Args:
        recipe: The recipe with the alternatives.
        chosen: Name of the alternative, by part of the model.
        names: Of those that can be laid over the model.
        trials: All trials so far.

    Returns:
        Its name; None where what was chosen is one alternative, or none was tried in all parts.
    """
    if len(chosen) < 2:
        return None
    added = {
        one.name: {part: json.dumps(one.within(part)) for part in chosen}
        for one in recipe.choose
        if one.name in names
    }
    sums: dict[str, float] = {}
    for name, own in added.items():
        if all(own[part] == added[other][part] for part, other in chosen.items()):
            return None
        # Those that add the same to a part were tried there once.
        losses = [
            trial.loss
            for trial in trials
            if trial.round == 0
            and trial.loss is not None
            and trial.part in chosen
            and added[trial.name][trial.part] == own[trial.part]
        ]
        if len(losses) == len({trial.part for trial in trials if trial.part in chosen}):
            sums[name] = sum(losses)
    return min(sums, key=lambda name: sums[name], default=None)


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
