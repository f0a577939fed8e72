"""Recipes for trials: those of the alternatives, on some blocks of each tower only.

What a method does to a block takes the same time in each, and every forward of the model sees all
blocks anyway; so a trial quantizes pairs of neighbours that are spread over the depth. In the
second block of a pair, a method shows how it copes with what the first one has changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prismquant.algorithms.correction import Correction
from prismquant.errors import PlanError
from prismquant.models.bound import BoundModel
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.schema import Recipe, parse_recipe


def spread_pairs(count: int, part: float, fewest: int) -> tuple[int, ...]:
    """Numbers of blocks in pairs of neighbours, spread over a tower.

    Args:
        count: Blocks of the tower.
        part: Part of them that is taken.
        fewest: How many are taken at least; all, where there are not many more.
    """
    pairs = math.ceil(max(fewest, part * count) / 2)
    if 2 * pairs >= count - 1:
        return tuple(range(count))
    last = count - 2
    starts = [last * (2 * n + 1) // (2 * pairs) for n in range(pairs)]
    return tuple(sorted({block for start in starts for block in (start, start + 1)}))


def trial_recipes(
    whole: Mapping[str, Recipe], bound: BoundModel, part: float, fewest: int
) -> tuple[Mapping[str, Recipe], bool]:
    """Recipes of alternatives, by name, all on the same blocks.

    Args:
        whole: Their recipes on all blocks.
        bound: The model.
        part: Part of the blocks of each tower.
        fewest: Blocks of a tower, at least.

    Returns:
        Recipes that leave the other blocks alone, and whether they are of all blocks: where there
        are no more, or where an alternative cannot be laid over the model without the others.
        Transforms search on coarser grids, corrections have one damping.
    """
    whole = {name: quicker(one) for name, one in whole.items()}
    plans = [make_plan(one, bound) for one in whole.values()]
    quantized = {row.site.name for plan in plans for row in plan.quantized}
    towers: dict[str, list[str]] = {}
    for step in bound.steps:
        if step.kind == "block" and any(site.name in quantized for site in step.sites):
            towers.setdefault(step.modality, []).append(step.name)
    skipped: list[str] = []
    for blocks in towers.values():
        kept = {blocks[number] for number in spread_pairs(len(blocks), part, fewest)}
        skipped += [name for name in blocks if name not in kept]
    if not skipped:
        return whole, True
    rule: Mapping[str, Any] = {"match": {"name": [f"{name}.*" for name in skipped]}, "skip": True}
    fewer = {name: one.with_rules(rule, name=one.name) for name, one in whole.items()}
    try:
        for one in fewer.values():
            make_plan(one, bound)
    except PlanError:
        return whole, True
    return fewer, False


def quicker(recipe: Recipe) -> Recipe:
    """The recipe with options of its transforms and corrections with which they take less time.

    What the recipe says itself stays.
    """
    transforms = []
    for rule in recipe.transforms:
        body = rule.model_dump(mode="json", exclude_unset=True)
        options = _rough(rule.build(), rule.options)
        transforms.append(body | ({"options": options} if options else {}))
    rules = []
    for layers in recipe.rules:
        body = layers.model_dump(mode="json", exclude_unset=True)
        if isinstance(layers.correction, dict):
            body["correction"] = _rough(Correction(**layers.correction), layers.correction)
        rules.append(body)
    body = recipe.to_dict() | {"rules": rules}
    return parse_recipe(
        body | ({"transforms": transforms} if transforms else {}), source=recipe.name
    )


def _rough(method: object, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with which a method takes less time, where none are given; without idle ones."""
    idle: Mapping[str, str] = getattr(method, "idle", {})
    rough: Mapping[str, Any] = getattr(method, "rough", {})
    return {key: value for key, value in rough.items() if key not in idle} | dict(given)
