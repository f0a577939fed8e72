"""A found mix as an ordinary recipe: general rules first, then their exceptions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prismquant.errors import PlanError
from prismquant.numerics.rules import RangeRule
from prismquant.recipe.match import Match
from prismquant.recipe.plain_yaml import write_yaml, yaml_comment
from prismquant.recipe.resolve import resolve
from prismquant.recipe.schema import Recipe, parse_recipe
from prismquant.search.allocate import Mix
from prismquant.search.constraints import Constraints
from prismquant.search.name_patterns import name_patterns
from prismquant.search.offers import layer_formats
from prismquant.search.sensitivity import FLOAT, IN_NATS, FormatOption, Sensitivity
from prismquant.version import __version__

Rule = dict[str, Any]

FIRST_WORDS = "# Found by prismquant search"
"""Beginning of every recipe of a search, by which an earlier one is known."""

_SKIP = json.dumps({"skip": True})


@dataclass(frozen=True)
class _Treated:
    """A layer with what a recipe is to say of it.

    Attributes:
        name, modality, role: Of the layer.
        said: Fields of a rule, as JSON.
    """

    name: str
    modality: str
    role: str
    said: str


@dataclass(frozen=True)
class WrittenRecipe:
    """A recipe with the words in which it is written.

    Attributes:
        recipe: The recipe.
        text: The same as YAML, with a comment above it.
    """

    recipe: Recipe
    text: str


def recipe_of(
    found: Sensitivity,
    mix: Mix,
    constraints: Constraints,
    name: str,
    comment: Sequence[str] = (),
    source: Mapping[str, str] | None = None,
) -> WrittenRecipe:
    """The recipe of a mix: laid over the model it gives every layer the format of the mix.

    Args:
        found: The sensitivity.
        mix: The mix.
        constraints: Of these, over how many devices layers are cut.
        name: The recipe's.
        comment: Lines of the comment; what could end a line within them is left out.
        source: Name and checksum of the sensitivity's file; None: the recipe does not name it.

    Raises:
        PlanError: The mix leaves everything alone.
    """
    require_changes(mix)
    layers = _treated(found, mix)
    cache = next((found.formats[f].cache for f in _caches(found, mix)), None)
    solver: Rule = {"solver": found.solver}
    if found.solver_options:
        solver["options"] = dict(found.solver_options)
    body: dict[str, Any] = {"version": 1, "name": name}
    body |= {"kv_cache": dict(cache)} if cache else {}
    body["rules"] = [solver, *_rules(layers)] if any(x.said != _SKIP for x in layers) else []
    if found.method in IN_NATS:
        body["predicted"] = dict(mix.losses)
    if source is not None:
        body["sensitivity"] = dict(source)
    if constraints.tensor_parallel > 1:
        body["tensor_parallel"] = constraints.tensor_parallel
    recipe = parse_recipe(body, source=name)
    _require_exact(recipe, found, mix)
    return WrittenRecipe(recipe, yaml_comment(comment) + write_yaml(body))


def require_changes(mix: Mix) -> None:
    """Refuse a mix that no recipe is needed for.

    Raises:
        PlanError: It leaves everything alone.
    """
    if not mix.changes:
        raise PlanError(
            "the best mix leaves everything alone: no recipe is needed for it",
            remedy="ask for less: fewer bits, bytes or milliseconds, or a higher loss",
        )


def provenance(
    found: Sensitivity, mix: Mix, constraints: Constraints, source: str, digest: str
) -> list[str]:
    """Lines that say where a recipe comes from, and what was predicted of it.

    Args:
        found: The sensitivity.
        mix: The mix.
        constraints: What was asked for.
        source: Name of the sensitivity's file.
        digest: SHA-256 of it.
    """
    weights = constraints.weights or found.weights
    scored = ", ".join(f"{kind} {weight:g}" for kind, weight in weights.items() if weight)
    losses = ", ".join(f"{kind} {loss:.6g}" for kind, loss in mix.losses.items())
    used = Counter(mix.formats.values())
    gap = f"{mix.gap:,.0f} bytes" if mix.minimised == "bytes" else f"{mix.gap:.3g} of loss"
    return [
        f"{FIRST_WORDS.removeprefix('# ')} {__version__}.",
        f"sensitivity: {source}, sha256 {digest}",
        f"  of {found.model}, method {found.method}, solver {found.solver}, "
        f"by prismquant {found.written_by}",
        f"asked for: {'; '.join(constraints.describe()) or 'a point of the whole front'}",
        f"scored by: {scored}",
        f"predicted: loss {mix.loss:.6g} ({losses})",
        f"stored: {mix.stored_bytes:,} bytes, {mix.bits:.4f} bits per weight",
        f"proved: no other mix within these bounds is better by more than {gap}",
        "units: " + ", ".join(f"{count} as {name}" for name, count in used.most_common()),
    ]


def chosen_options(found: Sensitivity, formats: Mapping[str, str]) -> dict[str, FormatOption]:
    """Option of each unit, by the unit's name.

    Args:
        found: The sensitivity.
        formats: Name of the option of each unit.
    """
    return {
        unit.name: next(o for o in unit.options if o.format == formats[unit.name])
        for unit in found.units
    }


def _caches(found: Sensitivity, mix: Mix) -> list[str]:
    """Names of the formats of keys and values that were chosen."""
    chosen = [mix.formats[unit.name] for unit in found.units if unit.kind == "kv_cache"]
    return [name for name in chosen if name != FLOAT]


def _treated(found: Sensitivity, mix: Mix) -> list[_Treated]:
    options = chosen_options(found, mix.formats)
    keys = {
        key: {k for c in found.formats.values() for k in getattr(c, key) or {}}
        for key in ("weight_range", "activation_range")
    }
    said: dict[tuple[str, str | None], str] = {}
    layers = []
    for unit in found.units:
        option = options[unit.name]
        for layer in unit.layers:
            meant = (option.format, option.formats.get(layer.name))
            if meant not in said:
                said[meant] = json.dumps(_fields(layer.name, option, found, keys))
            layers.append(_Treated(layer.name, unit.modality, layer.role, said[meant]))
    return layers


def _fields(
    layer: str, option: FormatOption, found: Sensitivity, keys: Mapping[str, set[str]]
) -> Rule:
    """All that a rule says of a layer's format, so that nothing of an earlier rule is left."""
    weights, inputs = layer_formats(layer, option, found)
    if weights is None:
        return {"skip": True}
    choice = found.formats[option.format]
    said: Rule = {"weights": weights.name, "activations": inputs.name if inputs else "none"}
    said["weight_range"] = _range(choice.weight_range, keys["weight_range"])
    if inputs is not None and inputs.calibrated and keys["activation_range"]:
        said["activation_range"] = _range(choice.activation_range, keys["activation_range"])
    return said


def _range(given: Mapping[str, Any] | None, keys: set[str]) -> str | Rule:
    """A range rule by its kind, or with those of its fields that any format of the file says."""
    rule = RangeRule(**(given or {}))
    own = {key: value for key, value in asdict(rule).items() if key in keys - rule.idle.keys()}
    return rule.kind if own.keys() <= {"kind"} else {"kind": rule.kind} | own


def _rules(layers: Sequence[_Treated]) -> list[Rule]:
    """Rules by modality, then by role, then by name, each for what those before it get wrong."""
    rules: list[Rule] = []
    state = dict.fromkeys((layer.name for layer in layers), _SKIP)

    def say(match: Rule, said: str) -> None:
        short = {key: words[0] if len(words) == 1 else words for key, words in match.items()}
        rules.append({"match": short} | json.loads(said))
        meant = Match(**match)
        for layer in layers:
            if meant.matches(modality=layer.modality, role=layer.role, name=layer.name):
                state[layer.name] = said

    by_modality = _usual(layers, lambda layer: (layer.modality,))
    for said, keys in _inverted(by_modality).items():
        if said != _SKIP:
            say({"modality": [modality for (modality,) in keys]}, said)
    by_role = _usual(layers, lambda layer: (layer.modality, layer.role))
    differing = {key: said for key, said in by_role.items() if said != by_modality[key[:1]]}
    for said, keys in _inverted(differing).items():
        for modality in dict.fromkeys(modality for modality, _ in keys):
            say({"modality": [modality], "role": [r for m, r in keys if m == modality]}, said)
    wrong: dict[str, list[str]] = {}
    for layer in layers:
        if state[layer.name] != layer.said:
            wrong.setdefault(layer.said, []).append(layer.name)
    for said, names in wrong.items():
        say({"name": name_patterns(names)}, said)
    return rules


def _usual(layers: Iterable[_Treated], key: Any) -> dict[tuple[str, ...], str]:
    """Most common treatment of the layers of each key, the first of those that are as common."""
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for layer in layers:
        counts.setdefault(key(layer), Counter())[layer.said] += 1
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def _inverted(found: Mapping[tuple[str, ...], str]) -> dict[str, list[tuple[str, ...]]]:
    keys: dict[str, list[tuple[str, ...]]] = {}
    for key, said in found.items():
        keys.setdefault(said, []).append(key)
    return keys


def _require_exact(recipe: Recipe, found: Sensitivity, mix: Mix) -> None:
    """Make sure that the rules come to the formats of the mix."""
    options = chosen_options(found, mix.formats)
    for unit in found.units:
        for layer in unit.layers:
            wanted = layer_formats(layer.name, options[unit.name], found)
            config = resolve(
                recipe, modality=unit.modality, role=layer.role, name=layer.name
            ).config
            if (config.weights, config.activations) != wanted:
                raise PlanError(
                    f"the rules of the recipe come to {config.describe()}, not to the mix",
                    where=layer.name,
                    remedy="please report it, with the file of the sensitivity",
                )
