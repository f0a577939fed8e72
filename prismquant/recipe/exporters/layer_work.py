"""Work that a recipe asks for, layer by layer, and which of its words ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prismquant.errors import PrismQuantError
from prismquant.numerics.rules import RangeRule
from prismquant.recipe.exporters.written_scope import WrittenLayer, WrittenScope
from prismquant.recipe.layer_config import LayerConfig, build, merge
from prismquant.recipe.resolve import resolve
from prismquant.recipe.rule import Fallback, LayerRule
from prismquant.recipe.schema import Recipe

DEFAULT = " (default)"


@dataclass(frozen=True, eq=False)
class LayerWork:
    """Work on layers, of which there is one for all that get the same by the same rules.

    Attributes:
        config: What is done; without weights nothing is.
        fallback: What to do where a format cannot hold the layer.
        rules: Indices of the rules that mean the layer.
    """

    config: LayerConfig
    fallback: Fallback
    rules: tuple[int, ...]

    @property
    def quantized(self) -> bool:
        """Whether anything is done."""
        return self.config.weights is not None


def work_of(recipe: Recipe, scope: WrittenScope) -> dict[WrittenLayer, LayerWork]:
    """Work on every layer of a scope.

    Raises:
        RecipeError: The rules of a layer do not go together.
    """
    found: dict[WrittenLayer, LayerWork] = {}
    known: dict[tuple[int, ...], LayerWork] = {}
    for layer in scope.layers:
        one = resolve(recipe, modality=layer.modality, role=layer.role, name=layer.name)
        # The rules that mean a layer say all that is done to it.
        work = known.setdefault(one.rules, LayerWork(one.config, one.fallback, one.rules))
        found[layer] = work
    return found


class RulePlaces:
    """Places in a recipe where the fields of its layers are said.

    Args:
        recipe: An ordinary recipe.
        own: The recipe without its first alternative, whose rules and transforms come last.
    """

    def __init__(self, recipe: Recipe, own: Recipe) -> None:
        self.recipe = recipe
        self._own = {"rules": len(own.rules), "transforms": len(own.transforms)}

    def of_rule(self, index: int) -> str:
        """Place of a rule."""
        return self._place("rules", index)

    def of_transform(self, index: int) -> str:
        """Place of a transform."""
        return self._place("transforms", index)

    def _place(self, kind: str, index: int) -> str:
        own = self._own[kind]
        return f"{kind}[{index}]" if index < own else f"choose[0].{kind}[{index - own}]"

    def of(self, work: LayerWork, name: str) -> str:
        """Place of a layer's field, or of a key in it (``options.damping``).

        Of a field that no rule says: in the rule that gives the layer its format, and marked as a
        default.
        """
        field, _, key = name.partition(".")
        for index in reversed(work.rules):
            if says(self.recipe.rules[index], field, key):
                return f"{self.of_rule(index)}.{name}"
        giving = [i for i in work.rules if says(self.recipe.rules[i], "weights", "")]
        return f"{self.of_rule(giving[-1] if giving else 0)}.{name}{DEFAULT}"

    def said(self, work: LayerWork, name: str) -> bool:
        """Whether a rule says a field of a layer."""
        return not self.of(work, name).endswith(DEFAULT)


def says(rule: LayerRule, field: str, key: str) -> bool:
    """Whether a rule says a field, or a key in it."""
    if field not in rule.model_fields_set:
        return False
    value = getattr(rule, field)
    return not key or (isinstance(value, Mapping) and key in value)


def in_effect(
    recipe: Recipe, index: int, name: str, work: Mapping[WrittenLayer, LayerWork]
) -> bool:
    """Whether any layer that is quantized would get something else without a word of a rule.

    Args:
        recipe: The recipe.
        index: Of the rule.
        name: A field, or a key in it (``options.damping``).
        work: What is done to each layer.
    """
    meant = [one for one in set(work.values()) if one.quantized and index in one.rules]
    return any(_config(recipe, one, (index, name)) != _config(recipe, one, None) for one in meant)


def _config(recipe: Recipe, work: LayerWork, without: tuple[int, str] | None) -> Any:
    """A layer's configuration, as if a word of a rule were not said."""
    partials, fallback = [], None
    left_out, word = without or (-1, "")
    field, _, key = word.partition(".")
    for index in work.rules:
        rule = recipe.rules[index]
        said = {name: getattr(rule, name) for name in rule.model_fields_set}
        if index == left_out and key:
            said[field] = {name: one for name, one in said[field].items() if name != key}
        elif index == left_out:
            said.pop(field, None)
        partials.append(said)
        fallback = said.get("fallback", fallback)
    try:
        config = build(merge(partials))
        plain = replace(
            config,
            weight_range=_used(config.weight_range),
            activation_range=_used(config.activation_range),
        )
        return plain.settled(), fallback
    except (PrismQuantError, TypeError, ValueError):
        return None


def _used(rule: RangeRule) -> RangeRule:
    """A range rule with the defaults of all that its kind does not go by."""
    plain = RangeRule()
    return replace(rule, **{name: getattr(plain, name) for name in rule.idle})
