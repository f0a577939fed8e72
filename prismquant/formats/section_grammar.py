"""Reads a ``quantization_config`` with every key and every value accounted for.

Reading never fails: what is wrong becomes a
:class:`~prismquant.formats.section.Fault` of the section.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prismquant.errors import shortened
from prismquant.formats.packed import LAYOUTS
from prismquant.formats.quantization_args import (
    ARGS_KEYS,
    Args,
    args_faults,
    args_remedy,
    is_count,
    is_dtype,
    is_number,
    kind_of,
    read_args,
    shown,
)
from prismquant.formats.section import (
    CONFIG_KEY,
    DENSE,
    METHOD,
    MOST_PATTERNS,
    Apply,
    DeclaredTransform,
    Fault,
    SchemeGroup,
    Section,
    Targets,
    is_broken,
)

GROUP_KEYS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
ROLES = ("weights", "input_activations", "output_activations")
TOP_KEYS = frozenset(
    {
        *("quant_method", "version", "format", "quantization_status", "global_compression_ratio"),
        *("ignore", "kv_cache_scheme", "sparsity_config", "transform_config", "config_groups"),
        *("moe_sparsity_config", "total_num_heads", "total_num_kv_heads", "run_compressed"),
    }
)
TRANSFORM_KEYS = frozenset({"type", "apply", "randomize", "requires_grad", "head_dim", "precision"})
APPLY_KEYS = frozenset({"targets", "location", "inverse", "ignore"})
LOCATIONS = ("input", "weight_input", "weight_output", "output", "k_cache", "q_attn")
TRANSFORM_TYPES = ("hadamard", "random-hadamard", "random-matrix")

# What real configurations have: every expert's path at most.
_MOST_NAMES = 200_000


def read_section(config: Mapping[str, Any]) -> Section:
    """Read the ``quantization_config`` of a ``config.json``.

    Args:
        config: The content of the file.
    """
    raw = config.get(CONFIG_KEY)
    if raw is None or raw == {}:
        return Section()
    if not isinstance(raw, Mapping):
        fault = Fault(
            "config.type", f"it is {kind_of(raw)}, not an object", CONFIG_KEY, "delete it"
        )
        return Section(METHOD, faults=(fault,))
    named = raw.get("quant_method")
    faults: list[Fault] = []
    if not isinstance(named, str) or not named:
        faults.append(
            Fault(
                "config.method-missing",
                "quantization_config has no quant_method"
                if not named
                else f"quant_method is {shown(named)}, not a name",
                "quant_method",
                f"write quant_method: {METHOD}",
            )
        )
    elif named.lower() != METHOD:
        return Section(named.lower())
    faults += _top_faults(raw)
    groups = _read_groups(raw, faults)
    ignore = _targets(raw.get("ignore"), "ignore", "config.type", faults)
    cache = _read_cache(raw.get("kv_cache_scheme"), faults)
    transforms = _read_transforms(raw.get("transform_config"), faults)
    faults += _pattern_faults(groups, ignore, transforms)
    return Section(METHOD, groups, ignore, cache, transforms, tuple(faults))


def _top_faults(raw: Mapping[str, Any]) -> Iterator[Fault]:
    """Keys that are probably misspelt, and values of another type than every reader expects."""
    for key in sorted(set(map(str, raw)) - TOP_KEYS):
        if near := difflib.get_close_matches(key, TOP_KEYS, n=1, cutoff=0.8):
            what = f"the key {shown(key)} is unknown, and all but {near[0]!r}"
            yield Fault("config.misspelt", what, CONFIG_KEY, f"did you mean {near[0]!r}?")
    wanted: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("format", lambda v: isinstance(v, str), "a name"),
        ("quantization_status", lambda v: isinstance(v, str), "a name"),
        ("global_compression_ratio", is_number, "a number"),
        ("sparsity_config", lambda v: isinstance(v, Mapping), "an object"),
    )
    for key, fits, kind in wanted:
        value = raw.get(key)
        if value is not None and not fits(value):
            what = f"{key} is {shown(value)}, not {kind}"
            yield Fault("config.type", what, key, f"write {kind}, or null")


def _read_groups(raw: Mapping[str, Any], faults: list[Fault]) -> tuple[SchemeGroup, ...]:
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping):
        what = "it is missing" if groups is None else f"it is {kind_of(groups)}, not an object"
        faults.append(Fault("config.group-shape", what, "config_groups", "name each group"))
        return ()
    default = raw.get("format")
    return tuple(
        group
        for name, entry in groups.items()
        if (group := _read_group(str(name), entry, default, faults)) is not None
    )


def _read_group(name: str, raw: Any, default: Any, faults: list[Fault]) -> SchemeGroup | None:
    if not isinstance(raw, Mapping):
        what = f"a group is {kind_of(raw)}, not an object with targets and weights"
        remedy = "write its targets and arguments out"
        faults.append(Fault("config.group-shape", what, _place(name), remedy))
        return None
    before = len(faults)
    faults += _unknown(raw, GROUP_KEYS, "a group", "config.group-key", _place(name))
    if raw.get("targets") is None:
        what = "a group has no targets"
        faults.append(Fault("config.group-shape", what, _place(name), "list its layers"))
    targets = _targets(raw.get("targets"), "targets", "config.group-shape", faults, name)
    args = {role: _read_role(raw.get(role), role, name, faults) for role in ROLES}
    own = raw.get("format")
    if own is not None and not isinstance(own, str):
        what = f"a group's format is {shown(own)}, not a name"
        known = f"formats of a group: {', '.join(LAYOUTS)}, {DENSE}"
        faults.append(Fault("config.format-name", what, _place(name), known))
        own = ""
    return SchemeGroup(
        name=name,
        targets=targets,
        layout=str(own if own is not None else default),
        own_format=own is not None,
        weights=args["weights"],
        inputs=args["input_activations"],
        outputs=args["output_activations"],
        well_formed=len(faults) == before and args["weights"] is not None,
    )


def _read_role(raw: Any, role: str, name: str, faults: list[Fault]) -> Args | None:
    if isinstance(raw, Mapping):
        faults += _unknown(raw, ARGS_KEYS, role, "config.unknown-key", _place(name))
    faults += [
        Fault("config.arguments", f"{role} {fault}", _place(name), args_remedy(fault))
        for fault in args_faults(raw, role)
    ]
    return read_args(raw, role)


def _read_cache(raw: Any, faults: list[Fault]) -> Args | None:
    key, role = "kv_cache_scheme", "output_activations"
    found = [f"{key} {fault}" for fault in args_faults(raw, role)]
    if isinstance(raw, Mapping):
        found += [one.what for one in _unknown(raw, ARGS_KEYS, key, "", key)]
    remedy = "write num_bits 8, type float, symmetric true, dynamic false, strategy tensor"
    faults += [Fault("kv.arguments", what, key, remedy) for what in found]
    return None if found else read_args(raw, role)


def _read_transforms(raw: Any, faults: list[Fault]) -> tuple[DeclaredTransform, ...]:
    key, rule = "transform_config", "transforms.grammar"
    if raw is None or raw == {}:
        return ()
    groups = raw.get("config_groups", {}) if isinstance(raw, Mapping) else None
    if not isinstance(groups, Mapping):
        faults.append(Fault(rule, f"{key} has no config_groups", key, "write {}"))
        return ()
    faults += _unknown(raw, {"config_groups"}, key, rule, key)
    read = (_read_transform(str(name), one, rule, faults) for name, one in groups.items())
    return tuple(transform for transform in read if transform is not None)


def _read_transform(
    name: str, raw: Any, rule: str, faults: list[Fault]
) -> DeclaredTransform | None:
    before, place = len(faults), _place(name)
    if not isinstance(raw, Mapping):
        what = f"a transform is {kind_of(raw)}, not an object"
        faults.append(Fault(rule, what, place, "write its type and targets out"))
        return None
    faults += _unknown(raw, TRANSFORM_KEYS, "a transform", rule, place)
    kind, size = raw.get("type"), raw.get("head_dim")
    if kind not in TRANSFORM_TYPES:
        known = f"known types: {', '.join(TRANSFORM_TYPES)}"
        faults.append(Fault(rule, f"a transform has type {shown(kind)}", place, known))
    if size is not None and not is_count(size):
        what = f"a transform has head_dim {shown(size)}"
        faults.append(Fault(rule, what, place, "write the width of its blocks, or null"))
    for flag in ("randomize", "requires_grad"):
        if not isinstance(raw.get(flag, False), bool):
            what = f"a transform has {flag} {shown(raw[flag])}"
            faults.append(Fault(rule, what, place, "write true or false"))
    if (dtype := raw.get("precision")) is not None and not is_dtype(dtype):
        what = f"a transform has precision {shown(dtype)}"
        faults.append(Fault(rule, what, place, "name a dtype, e.g. torch.float32"))
    listed = raw.get("apply", [])
    if not isinstance(listed, list):
        what = f"a transform's apply is {kind_of(listed)}, not a list"
        faults.append(Fault(rule, what, place, "list where it is applied"))
        listed = []
    applies = [_read_apply(name, one, rule, faults) for one in listed]
    if len(faults) > before:
        return None
    kept = tuple(one for one in applies if one is not None)
    return DeclaredTransform(name, str(kind), size, raw.get("randomize", False), kept)


def _read_apply(name: str, raw: Any, rule: str, faults: list[Fault]) -> Apply | None:
    place = _place(name)
    if not isinstance(raw, Mapping):
        what = f"a transform is applied to {kind_of(raw)}, not an object"
        faults.append(Fault(rule, what, place, "write targets and location"))
        return None
    faults += _unknown(raw, APPLY_KEYS, "a transform", rule, place)
    location, inverse = raw.get("location"), raw.get("inverse", False)
    if location not in LOCATIONS:
        known = f"known locations: {', '.join(LOCATIONS)}"
        faults.append(Fault(rule, f"a transform has location {shown(location)}", place, known))
    if not isinstance(inverse, bool):
        what = f"a transform has inverse {shown(inverse)}"
        faults.append(Fault(rule, what, place, "write true or false"))
    if raw.get("targets") is None:
        faults.append(Fault(rule, "a transform has no targets", place, "list its modules"))
    targets, ignore = (
        # One name may stand for a list of one.
        _targets([value] if isinstance(value, str) else value, key, rule, faults, name)
        for key, value in (("targets", raw.get("targets")), ("ignore", raw.get("ignore")))
    )
    return Apply(str(location), targets, ignore, inverse is True)


def _targets(
    raw: Any, key: str, rule: str, faults: list[Fault], name: str | None = None
) -> Targets:
    """A list of names; None is an empty one."""
    if raw is None:
        return Targets()
    place = key if name is None else _place(name)
    if not isinstance(raw, list) or not all(isinstance(entry, str) for entry in raw):
        what = f"{key} is {shown(raw)}, not a list of names"
        faults.append(Fault(rule, what, place, "list its layers"))
        return Targets()
    found = Targets(tuple(raw))
    if len(raw) > _MOST_NAMES or len(found.patterns) > MOST_PATTERNS:
        what = f"{key} has {len(raw)} entries, {len(found.patterns)} of them patterns"
        remedy = f"write at most {_MOST_NAMES} names and {MOST_PATTERNS} patterns"
        faults.append(Fault(rule, what, place, remedy))
        return Targets()
    return found


def _pattern_faults(
    groups: Sequence[SchemeGroup], ignore: Targets, transforms: Sequence[DeclaredTransform]
) -> Iterator[Fault]:
    listed = [(group.targets, _place(group.name)) for group in groups]
    listed += [(ignore, "ignore")]
    for transform in transforms:
        for apply in transform.applies:
            listed += [(one, _place(transform.name)) for one in (apply.targets, apply.ignore)]
    for targets, place in listed:
        for entry in targets.patterns:
            if is_broken(entry[3:]):
                what = f"{shortened(entry)} is no regular expression"
                yield Fault("config.pattern", what, place, "correct the pattern")


def _unknown(
    raw: Mapping[str, Any], known: Iterable[str], what: str, rule: str, place: str
) -> list[Fault]:
    keys = sorted(set(map(str, raw)) - set(known))
    listed = ", ".join(sorted(known))
    return [
        Fault(rule, f"{what} has the unknown key {shown(key)}", place, _did_you_mean(key, listed))
        for key in keys
    ]


def _did_you_mean(key: str, known: str) -> str:
    near = difflib.get_close_matches(key, known.split(", "), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"delete it; known keys: {known}"


def _place(name: str) -> str:
    return name if len(name) <= 80 else name[:78] + ".."
