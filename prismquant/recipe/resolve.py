"""Resolving a recipe for one layer: the rules that match it, merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prismquant.algorithms.methods import build_solver, build_tuner
from prismquant.errors import PrismQuantError, RecipeError
from prismquant.recipe.layer_config import LayerConfig, build, merge
from prismquant.recipe.match import Matchable
from prismquant.recipe.rule import Fallback, LayerRule, check_weighting
from prismquant.recipe.schema import Recipe


@dataclass(frozen=True)
class Resolved:
    """Rules of a recipe, merged for one layer.

    Attributes:
        config: What is done to it.
        fallback: What to do where the formats cannot hold the layer's shape.
        rules: Indices of the rules that matched, in order.
        skipped_by: Index of the rule that leaves the layer alone; None where no rule does, or a
            later one undoes it.
    """

    config: LayerConfig
    fallback: Fallback
    rules: tuple[int, ...]
    skipped_by: int | None = None


def resolve(recipe: Recipe, *, modality: str, role: str, name: str) -> Resolved:
    """Merge all the rules that match one layer; later ones win field by field.

    Raises:
        RecipeError: The merged fields make no number format, range rule or solver; the message
            names the layer and the rules that took part.
    """
    matched = _matched(recipe, modality, role, name)
    return _merged(recipe, matched, f"{name} ({modality}, {role})")


def resolve_all(recipe: Recipe, layers: Iterable[Matchable]) -> dict[str, Resolved]:
    """Results of :func:`resolve` for many layers, by name.

    Layers that the same rules match share one value: models have tens of thousands of experts.

    Raises:
        RecipeError: As of :func:`resolve`, for the first layer that it is about.
    """
    found: dict[str, Resolved] = {}
    made: dict[tuple[int, ...], Resolved] = {}
    for layer in layers:
        matched = _matched(recipe, layer.modality, layer.role, layer.name)
        if matched not in made:
            where = f"{layer.name} ({layer.modality}, {layer.role})"
            made[matched] = _merged(recipe, matched, where)
        found[layer.name] = made[matched]
    return found


def _matched(recipe: Recipe, modality: str, role: str, name: str) -> tuple[int, ...]:
    """Indices of the rules that match a layer."""
    return tuple(
        index
        for index, rule in enumerate(recipe.rules)
        if rule.match.matches(modality=modality, role=role, name=name)
    )


def _merged(recipe: Recipe, indices: tuple[int, ...], layer: str) -> Resolved:
    """Rules merged, for a layer that an error names."""
    matched = {index: recipe.rules[index] for index in indices}
    skipped_by: int | None = None
    fallback: Fallback = "error"
    for index, rule in matched.items():
        if rule.skip:
            skipped_by = index
        elif rule.skip is not None or rule.weights is not None:
            skipped_by = None
        fallback = rule.fallback or fallback
    merged = merge(_partial(rule) for rule in matched.values())
    try:
        config = build(merged | {"weights": None} if skipped_by is not None else merged)
        if config.weights is not None:
            _check(config, merged)
    except (PrismQuantError, TypeError, ValueError) as error:
        numbers = ", ".join(f"rules[{i}]" for i in matched)
        what = error.what if isinstance(error, PrismQuantError) else str(error)
        raise RecipeError(
            what,
            where=f"{layer}, set by {numbers} of recipe {recipe.name!r}",
            remedy=getattr(error, "remedy", None),
        ) from error
    return Resolved(config, fallback, indices, skipped_by)


def _partial(rule: LayerRule) -> dict[str, Any]:
    """The fields that a rule says of a layer."""
    return {name: getattr(rule, name) for name in rule.model_fields_set}


def _check(config: LayerConfig, merged: Mapping[str, Any]) -> None:
    build_solver(config.solver, config.options)
    if config.tuner is not None:
        build_tuner(config.tuner, config.tuner_options)
    _check_formats(config)
    if "kind" not in (merged.get("weight_range") or {}):
        check_weighting(config.options, config.weight_range.kind)


def _check_formats(config: LayerConfig) -> None:
    weights = config.weights
    if weights is not None and (weights.dynamic or weights.granularity == "token"):
        raise RecipeError("weights are neither dynamic nor scaled per token")
    if weights is not None and config.weight_range.kind == "ema":
        raise RecipeError("a weight has no running range: 'ema' is for activations")
    for what, spec in (("activations", config.activations), ("outputs", config.outputs)):
        if spec is not None and spec.granularity in ("channel", "block"):
            raise RecipeError(
                f"{what} with {spec.granularity} scales are not supported",
                remedy="use granularity tensor (static), token or group (dynamic)",
            )
        if spec is not None and spec.dynamic == (spec.granularity == "tensor"):
            raise RecipeError(
                f"{what} of {spec.describe()} are not supported",
                remedy="tensor scales are static, token and group scales dynamic",
            )
