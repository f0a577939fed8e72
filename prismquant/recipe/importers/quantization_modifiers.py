"""Modifiers of llm-compressor that quantize layers: their schemes, targets and what they ignore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prismquant.errors import suggest
from prismquant.recipe.importers.ledger import Ledger, in_quotes, joined, shown
from prismquant.recipe.importers.module_lists import (
    listed_modules,
    together,
    too_long_together,
)
from prismquant.recipe.importers.module_names import CONVOLUTION, NamedModules, excluding
from prismquant.recipe.importers.scheme_arguments import (
    ARGUMENTS,
    OBSERVER_ARGUMENTS,
    OBSERVERS,
    Numbers,
    Side,
    numbers,
    observed,
    observer_rule,
)
from prismquant.recipe.importers.scheme_presets import SCHEMES
from prismquant.recipe.importers.source_section import Setting, SourceSection, Table, idle

Fields = dict[str, Any]

QUANTIZATION: Table = (
    Setting("targets", "[Linear]", "match"),
    Setting("ignore", "[]", "skip: true"),
    Setting("scheme", "null", "weights, activations"),
    Setting("config_groups", "null", "weights, activations, outputs"),
    Setting("kv_cache_scheme", "null", "kv_cache"),
    Setting("weight_observer", "null", "weight_range"),
    Setting("input_observer", "null", "activation_range"),
    Setting("output_observer", "null", "activation_range"),
    Setting("observer", "null", "weight_range, activation_range"),
    Setting(
        "bypass_divisibility_checks",
        "false",
        "fallback: nearest",
        "no group is ever cut off: the next smaller group that fits is taken",
    ),
    idle("disable_quantization_observer_epoch", "nothing is trained"),
    idle("num_calibration_steps", "all samples are used", "calibration.samples"),
)
"""Keys that all modifiers have which quantize."""

_SCHEME: Table = (
    Setting("targets", "", "match"),
    Setting("weights", "null", "weights"),
    Setting("input_activations", "null", "activations"),
    Setting("output_activations", "null", "outputs"),
    idle("format", "the bytes on disk follow from the formats"),
)
_SIDES: Mapping[str, Side] = {
    "weights": "weights",
    "input_activations": "activations",
    "output_activations": "outputs",
}
_OBSERVED = {
    "weights": ("weight_observer", "weights"),
    "input_activations": ("input_observer", "input"),
    "output_activations": ("output_observer", "output"),
}
# Precedence of targets there: of a name over an expression over a class.
_PRECEDENCE = ("class", "expression", "name")
_PATCH = {"role": "patch_embed"}


@dataclass(frozen=True)
class TargetedGroup:
    """Layers, and what a modifier does to them.

    Attributes:
        targets: The layers.
        fields: Of our rule.
    """

    targets: tuple[NamedModules, ...]
    fields: Fields


@dataclass(frozen=True)
class QuantizationStep:
    """All that one modifier quantizes.

    Attributes:
        groups: Layers by what is done to them.
        ignored: Layers that it leaves as they are.
        kv_cache: Ours; None where it asks for none.
    """

    groups: tuple[TargetedGroup, ...]
    ignored: tuple[NamedModules, ...]
    kv_cache: Fields | None


def quantization_step(section: SourceSection, method: Fields, order: str) -> QuantizationStep:
    """Layers that a modifier quantizes, with notes on the keys of :data:`QUANTIZATION`.

    Args:
        section: The modifier's keys.
        method: Fields of our rule that name the method and its options.
        order: Of GPTQ's columns, where a group says none; empty for other methods.
    """
    ignored = listed_modules(section, "ignore", (), "skip: true")
    targets: tuple[NamedModules, ...] = ()
    if "config_groups" not in section:
        targets = listed_modules(section, "targets", ("Linear",), "match")
    else:
        section.dropped("targets", "each group has its own")
    if section.flag("bypass_divisibility_checks", False):
        method = method | {"fallback": "nearest"}
        section.changed(
            "bypass_divisibility_checks", "fallback: nearest", "no group is ever cut off"
        )
    else:
        section.honoured("bypass_divisibility_checks", "fallback: error")
    observers = _observers(section)
    groups = [(found, sides) for found, sides in _groups(section, targets, observers) if sides]
    orders = [sides["weights"].order for _, sides in groups if "weights" in sides]
    if order and all(orders) and {*orders} - {order}:
        section.ledger.overruled(section.at("actorder"), "that of the group counts")
    made = [TargetedGroup(found, _rule(sides, method, order, section)) for found, sides in groups]
    return QuantizationStep(tuple(made), ignored, _kv_cache(section))


def rules_of(steps: Sequence[QuantizationStep], ledger: Ledger) -> list[Fields]:
    """Rules of all steps, so that each layer gets what it gets there.

    Of one step a name counts more than an expression, and that more than a class; of two targets of
    one kind the first in alphabetical order. A later step counts more than an earlier one, but for
    what it ignores. With us later rules win, so all is turned round.

    Args:
        steps: In their order.
        ledger: Where it is noted that they cannot be told apart.
    """
    steps = [step for step in steps if step.groups]
    if not steps:
        return []
    shared = set.intersection(*({one.pattern for one in step.ignored} for step in steps))
    rules: list[Fields] = []
    alone: list[str] = []
    for step in steps:
        kept = [one.pattern for one in step.ignored if one.pattern not in shared]
        if too_long_together(kept):
            ledger.wrong("ignore", too_long_together(kept))
            return []
        alone += [one for one in kept if one not in alone]
        rules += _rules_of(step, kept)
    if alone:
        # Changes nothing, as the rules after it leave them out; but what means no layer is told.
        rules.insert(0, {"match": {"name": alone}, "skip": True})
    if len(rules) > 1:
        rules = [rule | {"optional": True} for rule in rules]
    skipped = [one.pattern for one in steps[0].ignored if one.pattern in shared]
    if skipped:
        rules.append({"match": {"name": skipped}, "skip": True, "optional": True})
    for rule in rules:
        if "name" in rule["match"]:
            rule["match"]["name"] = together(rule["match"]["name"])
    targets = [target for step in steps for group in step.groups for target in group.targets]
    if not any(one.pattern == CONVOLUTION or "patch_embed" in one.entry for one in targets):
        rules.append({"match": _PATCH, "skip": True, "optional": True})
    return rules


def _rules_of(step: QuantizationStep, kept: list[str]) -> list[Fields]:
    pairs = [(target, group.fields) for group in step.groups for target in group.targets]
    rules: list[Fields] = []
    for kind in _PRECEDENCE:
        own = [pair for pair in pairs if pair[0].kind == kind]
        for target, fields in sorted(own, key=lambda pair: pair[0].entry, reverse=True):
            match = _match(target, kept)
            if rules and match.keys() == {"name"} and _same(rules[-1], fields):
                rules[-1]["match"]["name"].insert(0, *match["name"])
            else:
                rules.append({"match": match} | fields)
    return rules


def _same(rule: Fields, fields: Fields) -> bool:
    return rule["match"].keys() == {"name"} and rule == {"match": rule["match"]} | fields


def _match(target: NamedModules, kept: list[str]) -> Fields:
    if target.kind != "class":
        return {"name": [excluding(target.pattern, kept)]}
    match: Fields = dict(_PATCH) if target.pattern == CONVOLUTION else {}
    return match | ({"name": [excluding("re:.*", kept)]} if kept else {})


def _observers(section: SourceSection) -> dict[str, str]:
    """Observers that the modifier names, by the key of the scheme."""
    listed: Mapping[str, Any] = {}
    if "observer" in section:
        listed = section.ledger.mapping(section.at("observer"), section.content["observer"])
        known = [short for _, short in _OBSERVED.values()]
        section.ledger.refuse_unknown(section.at("observer"), listed, known)
    named = {}
    for side, (key, short) in _OBSERVED.items():
        if key in section and listed:
            section.wrong(key, "give either this or `observer`")
        place = section.at(key) if key in section else joined(section.at("observer"), short)
        value = section.content.get(key, listed.get(short))
        if value is not None and _known_observer(section.ledger, place, value, _SIDES[side]):
            named[side] = value
    return named


def _known_observer(ledger: Ledger, place: str, name: Any, side: Side) -> bool:
    """Whether an observer is known; notes what it becomes."""
    if not isinstance(name, str) or name not in OBSERVERS:
        ledger.wrong(place, f"{in_quotes(name)} is no observer; {suggest(str(name), OBSERVERS)}")
        return False
    rule, _, why = observer_rule(name, side, SourceSection(ledger, place, {}, OBSERVER_ARGUMENTS))
    key = "weight_range" if side == "weights" else "activation_range"
    if why:
        ledger.changed(place, name, f"{key}: {rule['kind']}", why)
    else:
        ledger.honoured(place, name, f"{key}: {rule['kind']}")
    return True


def _groups(
    section: SourceSection, targets: tuple[NamedModules, ...], observers: Mapping[str, str]
) -> list[tuple[tuple[NamedModules, ...], dict[Side, Numbers]]]:
    """Targets, and the formats that they get, group by group."""
    scheme, groups = section.content.get("scheme"), section.content.get("config_groups")
    if scheme is not None and groups is not None:
        section.wrong("scheme", "give either this or config_groups")
    if isinstance(scheme, str):
        return [(targets, _named_scheme(section, section.at("scheme"), scheme, observers))]
    place = section.at("scheme" if scheme is not None else "config_groups")
    content = scheme if scheme is not None else groups
    if content is None:
        return []
    listed = section.ledger.mapping(place, content)
    if scheme is not None and listed.keys() & _SIDES.keys():
        return [(targets, _scheme(section.ledger, place, listed, observers))]
    found = []
    for name, one in listed.items():
        within = joined(place, name)
        if name.upper() in SCHEMES:
            own = SourceSection(section.ledger, place, {name: one}, [Setting(name)])
            meant = listed_modules(own, name, (), "match")
            found.append((meant, _named_scheme(section, within, name, observers)))
        elif scheme is not None:
            section.ledger.wrong(within, f"unknown scheme; {suggest(name.upper(), SCHEMES)}")
        else:
            own = SourceSection(section.ledger, within, one, _SCHEME)
            if "targets" not in own:
                section.ledger.wrong(within, "it has no targets")
            found.append(
                (
                    listed_modules(own, "targets", (), "match"),
                    _scheme(section.ledger, within, own.content, observers),
                )
            )
    return found


def _named_scheme(
    section: SourceSection, place: str, name: str, observers: Mapping[str, str]
) -> dict[Side, Numbers]:
    """Formats of a scheme by its name."""
    if name.upper() not in SCHEMES:
        section.ledger.wrong(place, f"unknown scheme {name!r}; {suggest(name.upper(), SCHEMES)}")
        return {}
    sides = _scheme(Ledger("", ""), place, SCHEMES[name.upper()], observers)
    told = ", ".join(f"{side}: {one.spec.name}" for side, one in sides.items() if one.spec)
    ceil = any(one.spec is not None and one.spec.scale == "e8m0-ceil" for one in sides.values())
    if ceil:
        why = (
            "scales of inputs are rounded up, as servers do; the simulation there rounds to nearest"
        )
        section.ledger.changed(place, name, told, why)
    else:
        section.ledger.honoured(place, name, told or "no rule")
    return sides


def _scheme(
    ledger: Ledger, place: str, content: Mapping[str, Any], observers: Mapping[str, str]
) -> dict[Side, Numbers]:
    """Formats of a scheme, side by side."""
    found: dict[Side, Numbers] = {}
    for key, side in _SIDES.items():
        value = content.get(key)
        if value is None:
            if key in content:
                ledger.honoured(joined(place, key), None, f"{side}: none")
            continue
        own = SourceSection(ledger, joined(place, key), value, ARGUMENTS)
        found[side] = numbers(own, side, observers.get(key))
    if content and "weights" not in found:
        ledger.wrong(place, "weights in floating point leave nothing for a server to load")
    return found


def _rule(
    sides: Mapping[Side, Numbers], method: Fields, order: str, section: SourceSection
) -> Fields:
    """Fields of our rule for a group."""
    weights = sides.get("weights")
    fields: Fields = {}
    for side in _SIDES.values():
        spec = sides[side].spec if side in sides else None
        fields[side] = "none" if spec is None else spec.name
    if weights is None:
        return fields
    fields["weight_range"] = weights.range_rule
    ranges = [one.range_rule for side, one in sides.items() if side != "weights" and one.range_rule]
    if ranges:
        fields["activation_range"] = ranges[0]
        if ranges[-1] != ranges[0]:
            section.ledger.wrong(section.place, "inputs and outputs need one observer here")
    options = dict(method.get("options", {}))
    options["scale_weighting"] = weights.weighting
    if order:
        options["order"] = weights.order or order
    return fields | method | {"options": options}


def _kv_cache(section: SourceSection) -> Fields | None:
    """Our cache of keys and values, with notes on all of its keys."""
    if "kv_cache_scheme" not in section:
        return None
    own = SourceSection(
        section.ledger, section.at("kv_cache_scheme"), section.content["kv_cache_scheme"], ARGUMENTS
    )
    kind = own.word("type", "int", ("int", "float"))
    bits = own.integer("num_bits", 8, 1, 16)
    name = "fp8" if kind == "float" else f"int{bits}"
    if name not in ("fp8", "int8", "int4") or (kind == "float" and bits != 8):
        own.wrong("num_bits", f"a cache is fp8, int8 or int4, not {kind} of {bits} bits")
        return None
    granularity = own.word("strategy", "tensor", ("tensor", "attn_head"))
    if not own.flag("symmetric", True):
        own.wrong("symmetric", "a cache is symmetric about zero")
    if own.flag("dynamic", False):
        own.wrong("dynamic", "the scales of a cache are static")
    cache = {"format": name, "granularity": "head" if granularity == "attn_head" else "tensor"}
    told = f"kv_cache: {shown(cache)}"
    for key in (
        "num_bits",
        "type",
        "symmetric",
        "strategy",
        "dynamic",
        "group_size",
        "scale_dtype",
    ):
        own.honoured(key, told)
    own.dropped("actorder", "a cache has no columns to order")
    rule, _ = observed(own, "activations", "kv_cache.range")
    return cache | {"range": rule}
