"""Formats on offer to a search, by name.

    WEIGHTS                  int4-g128, int8-channel, nvfp4a16, ..   inputs stay in floating point
    WEIGHTS+ACTIVATIONS      int4-channel+int8-token, fp8-channel+fp8-tensor, mxfp8+none, ..
    kv:CACHE                 kv:fp8, kv:int8-head, ..                keys and values

WEIGHTS and ACTIVATIONS are names of :mod:`prismquant.formats.spec`, CACHE one of
:mod:`prismquant.formats.kv_formats`. A recipe's name stands for the formats of weights and inputs
that it sets, where it sets nothing else: ``w4a8``, ``w8a8``, ``fp8``, ``mxfp8``. Such a name comes
first: ``nvfp4`` and ``mxfp4`` quantize inputs, too, as the recipes do, and ``nvfp4+none`` or
``nvfp4a16`` weights alone. To leave a unit alone is always on offer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prismquant.arguments import as_items
from prismquant.errors import ArgumentError, PrismQuantError, RecipeError, shortened, suggest
from prismquant.formats.kv_formats import KVCacheSpec, kv_cache_spec
from prismquant.formats.spec import PRESETS as FORMATS
from prismquant.formats.spec import NumberSpec, spec
from prismquant.recipe.presets import PRESETS as RECIPES
from prismquant.recipe.resolve import resolve
from prismquant.recipe.schema import load_recipe, parse_recipe
from prismquant.search.sensitivity import FLOAT, Choice

MAX_FORMATS = 64
"""More formats than this are a mistake."""

_CACHE = "kv:"
_NONE = "none"
_WHERE = "formats (--formats)"
# A recipe that says more than these is more than a format.
_FORMAT_FIELDS = {"match", "weights", "activations", "weight_range", "fallback"}


def formats_on_offer(names: str | Iterable[str]) -> dict[str, Choice]:
    """The formats of these names.

    Args:
        names: Names, or texts in which commas stand between names.

    Returns:
        The formats by name, in the order in which they were named.

    Raises:
        ArgumentError: A name is not one, or two names mean the same; says what was probably meant.
    """
    given = as_items(names)
    for text in given:
        if not isinstance(text, str):
            raise ArgumentError(f"{text!r} is not the name of a format", where=_WHERE)
    wanted = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not 1 <= len(wanted) <= MAX_FORMATS:
        raise ArgumentError(
            f"{len(wanted)} formats are named, not 1 to {MAX_FORMATS}",
            where=_WHERE,
            remedy="name some, e.g. --formats int4-g128,int8-channel,w8a8",
        )
    found: dict[str, Choice] = {}
    for name in wanted:
        choice = _choice(name)
        same = next((other for other, known in found.items() if known == choice), None)
        if same is not None:
            what = "is named twice" if same == name else f"means the same as {same!r}"
            raise ArgumentError(f"{name!r} {what}", where=_WHERE, remedy="name it once")
        found[name] = choice
    return found


def rule_of(choice: Choice) -> dict[str, Any]:
    """Fields of a recipe's rule that gives layers a format.

    Args:
        choice: The format, of layers.

    Returns:
        All that a rule says of formats, also that inputs stay in floating point; a shape that does
        not fit takes the nearest format that does.
    """
    return {
        "weights": dict(choice.weights or {}),
        "activations": dict(choice.activations) if choice.activations else _NONE,
        "weight_range": choice.weight_range,
        "fallback": "nearest",
    }


def require_sound(choice: Choice, name: str) -> None:
    """Refuse a format that no recipe can say.

    Args:
        choice: The format.
        name: What it is called.

    Raises:
        PrismQuantError: It is of nothing, or of layers and of a cache at once; or its fields are
            those of no format.
    """
    if (choice.weights is None) == (choice.cache is None):
        raise RecipeError("it is of weights or of a cache, of one of the two", where=name)
    if choice.cache is not None:
        KVCacheSpec.from_dict(choice.cache)
        return
    for fields in (choice.weights, choice.activations):
        if fields is not None:
            NumberSpec.from_dict(fields)
    rule = rule_of(choice)
    if choice.activation_range is not None:
        rule["activation_range"] = dict(choice.activation_range)
    resolve(
        parse_recipe({"rules": [rule]}, source=name), modality="llm", role="mlp.down", name=name
    )


def numbers_of(choice: Choice) -> tuple[NumberSpec | None, NumberSpec | None]:
    """Number formats of weights and inputs; None: floating point."""
    weights, inputs = choice.weights, choice.activations
    return (
        NumberSpec.from_dict(weights) if weights else None,
        NumberSpec.from_dict(inputs) if inputs else None,
    )


def _choice(name: str) -> Choice:
    if name == FLOAT:
        raise ArgumentError(
            f"{name!r} need not be named: to leave a unit alone is always on offer", where=_WHERE
        )
    if name.startswith(_CACHE):
        try:
            return Choice(cache=kv_cache_spec(name.removeprefix(_CACHE)).to_dict())
        except PrismQuantError as error:
            raise _refused(name, error.what, error.remedy) from error
    if name in RECIPES:
        return _of_recipe(name)
    weights, plus, activations = name.partition("+")
    made = Choice(
        weights=_number(name, weights).to_dict(),
        activations=_number(name, activations).to_dict() if plus and activations != _NONE else None,
    )
    return _sound(name, made, {"kind": _usual_range(_number(name, weights))})


def _of_recipe(name: str) -> Choice:
    """The formats that a recipe sets, where it sets nothing else."""
    said = RECIPES[name]
    beyond = [key for key in said if key != "rules"]
    beyond += [key for rule in said["rules"] for key in rule if key not in _FORMAT_FIELDS]
    if beyond or len(said["rules"]) > 1:
        why = f"it sets {beyond[0]}, too" if beyond else "it sets formats layer by layer"
        plain = [known for known in RECIPES if _is_plain(known)]
        raise _refused(
            name, f"the recipe {name!r} is more than a format: {why}", suggest("", plain)
        )
    rule = load_recipe(name).rules[0]
    activations = rule.activations if isinstance(rule.activations, dict) else None
    return Choice(rule.weights, activations, weight_range=rule.weight_range)


def _is_plain(name: str) -> bool:
    rules = RECIPES[name]["rules"]
    return set(RECIPES[name]) == {"rules"} and len(rules) == 1 and set(rules[0]) <= _FORMAT_FIELDS


def _number(name: str, part: str) -> NumberSpec:
    try:
        return spec(part)
    except PrismQuantError as error:
        # A recipe is no part of a name.
        known = {*FORMATS, *(filter(_is_plain, RECIPES) if part == name else ())}
        raise _refused(name, error.what, suggest(part, known)) from error


def _usual_range(weights: NumberSpec) -> str:
    """The range rule that recipes use: 8-bit integers have no need of a search."""
    return "minmax" if weights.kind == "int" and weights.bits == 8 else "mse"


def _sound(name: str, choice: Choice, weight_range: Mapping[str, Any]) -> Choice:
    """The choice with its range, where a recipe's rule can say it."""
    made = Choice(choice.weights, choice.activations, weight_range=weight_range)
    try:
        require_sound(made, name)
    except PrismQuantError as error:
        raise _refused(name, error.what, error.remedy) from error
    return made


def _refused(name: str, what: str, remedy: str | None) -> ArgumentError:
    return ArgumentError(what, where=f"{_WHERE}, {shortened(name)}", remedy=remedy)
