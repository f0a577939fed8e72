"""Recipes that were written for another tool, read again and compared."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prismquant.algorithms.methods import build_solver, build_tuner
from prismquant.models.arch import SiteKind
from prismquant.numerics.rules import RangeRule
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.resolve import resolve

if TYPE_CHECKING:
    from pathlib import Path

    from prismquant.models.bound import BoundModel
    from prismquant.recipe.exporters.foreign_recipe import ForeignRecipe
    from prismquant.recipe.layer_config import LayerConfig
    from prismquant.recipe.schema import Recipe

SUFFIX = {"llm-compressor": ".yaml", "mi-optimize": ".yaml", "modelopt": ".py", "mquant": ".txt"}


def read_back(exported: ForeignRecipe, folder: Path) -> Recipe:
    """The recipe that is read from the text of a dialect."""
    if exported.dialect == "mquant":
        return import_recipe(exported.text, "mquant").recipe
    path = folder / f"recipe{SUFFIX[exported.dialect]}"
    path.write_text(exported.text)
    imported = import_recipe(path)
    assert imported.dialect == exported.dialect
    return imported.recipe


def meaning(config: LayerConfig) -> Any:
    """All that a configuration does, without what has no part in it."""
    if config.weights is None:
        return None
    settled = config.settled()
    solver = build_solver(config.solver, config.options)
    for name in getattr(solver, "idle", {}):
        solver = replace(solver, **{name: type(solver).__dataclass_fields__[name].default})  # type: ignore[type-var]
    if config.solver == "gptq":
        # The codes do not depend on it, and MQuant has no word for it.
        solver = replace(solver, block_size=128)  # type: ignore[type-var]
    tuner = config.tuner and build_tuner(config.tuner, config.tuner_options)
    return (
        replace(
            settled,
            solver="",
            options=type(config.options)(),
            tuner=None,
            tuner_options=type(config.options)(),
            weight_range=used(settled.weight_range),
            activation_range=used(settled.activation_range),
            on_failure="stop",
        ),
        solver,
        tuner,
    )


def used(rule: RangeRule) -> RangeRule:
    """A range rule with the defaults of all that its kind does not go by."""
    return replace(rule, **{name: getattr(RangeRule(), name) for name in rule.idle})


def configs(recipe: Recipe, model: BoundModel) -> dict[str, Any]:
    """What a recipe does to each layer of a model."""
    found = {}
    for site in model.sites:
        config = resolve(recipe, modality=site.modality, role=site.role, name=site.name).config
        if site.kind == SiteKind.PATCH_CONV:
            # No plan quantizes pixels, whatever a recipe says.
            config = replace(config, activations=None)
        found[site.name] = meaning(config)
    return found


def scaled_edges(recipe: Recipe, model: BoundModel) -> list[Any]:
    """What each transform does, and where: the edges that end in a quantized layer it means."""
    quantized = {name for name, config in configs(recipe, model).items() if config is not None}
    found: list[Any] = []
    for rule in recipe.transforms:
        made = rule.build()
        if rule.name in ("rotation", "split"):
            found.append((made, made.plan(model, rule.match)))
            continue
        read = [
            index
            for index, edge in enumerate(model.edges)
            if any(one in quantized and rule.match.means(model.site(one)) for one in edge.consumers)
        ]
        found.append((made, read))
    return found
