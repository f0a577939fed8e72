"""The ``quantization_config`` of a checkpoint in the compressed-tensors format, read strictly.

Whoever looks at a configuration (loading, evaluating, exporting, checking) looks at what is read
here: its groups, what it ignores, its cache and its transforms, with every key and every value
accounted for. Reading never fails. What is wrong becomes a :class:`Fault`, under the name of the
rule of ``prismquant check`` that tells it; :meth:`Section.require` raises them all together for
readers that cannot go on. So nothing that is refused is ever called fine.

Which group a layer belongs to is answered more than once, because transformers and vLLM match
targets in different orders and against different names.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prismquant.errors import FormatError, grouped
from prismquant.export.quantization_args import (
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
from prismquant.export.targets import LINEAR, MOST_PATTERNS, Matcher, Targets, is_broken
from prismquant.formats.packed import (
    FLOAT_QUANTIZED,
    INT_QUANTIZED,
    LAYOUTS,
    MXFP4_PACK_QUANTIZED,
    MXFP6_PACK_QUANTIZED,
    MXFP8_QUANTIZED,
    NAIVE_QUANTIZED,
    NVFP4_PACK_QUANTIZED,
    PACK_QUANTIZED,
)
from prismquant.patterns import shortened

CONFIG_KEY = "quantization_config"
METHOD = "compressed-tensors"

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

PACK, INT, FLOAT, NAIVE = PACK_QUANTIZED, INT_QUANTIZED, FLOAT_QUANTIZED, NAIVE_QUANTIZED
NVFP4, MXFP4 = NVFP4_PACK_QUANTIZED, MXFP4_PACK_QUANTIZED
MXFP6, MXFP8 = MXFP6_PACK_QUANTIZED, MXFP8_QUANTIZED
DENSE, MIXED = "dense", "mixed-precision"
# Formats of which a reader takes it that inputs are quantized too.
WITH_INPUTS = (NAIVE, INT, FLOAT, NVFP4)

# What real configurations have: every expert's path at most.
_MOST_NAMES = 200_000
_MOST_TOLD = 10


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a configuration.

    Attributes:
        rule: The rule of ``prismquant check`` that tells it.
        what: What is wrong, with the value.
        where: Which key, group or transform.
        remedy: What to do about it.
    """

    rule: str
    what: str
    where: str
    remedy: str = ""


@dataclass(frozen=True)
class Group:
    """One entry of ``config_groups``.

    Attributes:
        name: Its key.
        targets: Its layers.
        layout: Its own format, else that of the whole configuration; may be any text.
        own_format: Whether it says its format itself.
        weights, inputs, outputs: What is quantized; None for what is not, or is ill-formed.
        well_formed: Whether nothing in it is ill-formed.
    """

    name: str
    targets: Targets
    layout: str
    own_format: bool
    weights: Args | None
    inputs: Args | None
    outputs: Args | None
    well_formed: bool

    @property
    def scheme(self) -> tuple[Args | None, Args | None, Args | None, str]:
        """What layers of it have in common; names of groups are not part of it."""
        return (self.weights, self.inputs, self.outputs, self.layout)

    def describe(self) -> str:
        """In a few words."""
        weights = self.weights.describe() if self.weights else "no weights"
        inputs = f", inputs {self.inputs.describe()}" if self.inputs else ""
        outputs = f", outputs {self.outputs.describe()}" if self.outputs else ""
        return f"{weights}{inputs}{outputs} as {self.layout}"


@dataclass(frozen=True)
class Apply:
    """Where a transform is applied.

    Attributes:
        location: To what of a module, one of :data:`LOCATIONS`.
        targets, ignore: Of which modules.
        inverse: Whether it undoes another one.
    """

    location: str
    targets: Targets
    ignore: Targets
    inverse: bool


@dataclass(frozen=True)
class Transform:
    """One entry of ``transform_config``.

    Attributes:
        name: Its key.
        type: One of :data:`TRANSFORM_TYPES`.
        head_dim: Width of its blocks; None: that of the module.
        randomize: Whether its matrix is drawn anew for each module.
        applies: Where it is applied.
    """

    name: str
    type: str
    head_dim: int | None
    randomize: bool
    applies: tuple[Apply, ...]


@dataclass(frozen=True)
class Section:
    """A ``quantization_config``.

    Attributes:
        method: The quantization method, in lower case; empty where there is none.
        groups: Entries of ``config_groups`` that are objects, in order.
        ignore: What is left alone.
        cache: How keys and values are kept, None for in floating point or ill-formed.
        transforms: Well-formed entries of ``transform_config``.
        faults: What is wrong; of other methods than compressed-tensors nothing is looked at.
        matcher: Compares names with its targets.
    """

    method: str = ""
    groups: tuple[Group, ...] = ()
    ignore: Targets = field(default_factory=Targets)
    cache: Args | None = None
    transforms: tuple[Transform, ...] = ()
    faults: tuple[Fault, ...] = ()
    matcher: Matcher = field(default_factory=Matcher, repr=False, compare=False)

    @functools.cached_property
    def owners(self) -> Mapping[str, Group]:
        """Target -> the last group that has it."""
        return {target: group for group in self.groups for target in group.targets}

    def require(self) -> None:
        """Go on only with a configuration that is understood completely.

        Raises:
            FormatError: It is of another method, or lists all that is wrong with it.
        """
        if self.method not in ("", METHOD):
            raise FormatError(
                f"quantization method {shortened(self.method)} cannot be read",
                where=CONFIG_KEY,
                remedy=f"only {METHOD} checkpoints and unquantized ones can be loaded; if the "
                f"weights are in floating point, delete {CONFIG_KEY} from config.json",
            )
        if not self.faults:
            return
        told = grouped(dict.fromkeys(f"{fault.where}: {fault.what}" for fault in self.faults))
        lines = [f"  - {one}" for one in told[:_MOST_TOLD]]
        lines += [f"  - and {len(told) - _MOST_TOLD} more"] * (len(told) > _MOST_TOLD)
        remedies = {fault.remedy for fault in self.faults}
        raise FormatError(
            "\n".join([f"{CONFIG_KEY} cannot be read:", *lines]),
            where="config.json",
            remedy=remedies.pop() if len(remedies) == 1 else "correct them, or restore the file",
        )


# ---------------------------------------------------------------------------------------- reading


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


def _read_groups(raw: Mapping[str, Any], faults: list[Fault]) -> tuple[Group, ...]:
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


def _read_group(name: str, raw: Any, default: Any, faults: list[Fault]) -> Group | None:
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
    return Group(
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


def _read_transforms(raw: Any, faults: list[Fault]) -> tuple[Transform, ...]:
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


def _read_transform(name: str, raw: Any, rule: str, faults: list[Fault]) -> Transform | None:
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
    return Transform(name, str(kind), size, raw.get("randomize", False), kept)


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
    groups: Sequence[Group], ignore: Targets, transforms: Sequence[Transform]
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


# --------------------------------------------------------------------------------------- matching


def group_in_transformers(name: str, section: Section) -> Group | None:
    """The group of a linear layer as the compressed-tensors library finds it.

    Exact names come before patterns and those before the class; ties go by the alphabet.
    """
    matcher = section.matcher
    if LINEAR in section.ignore.names or section.ignore.meets(name, matcher):
        return None
    owners = section.owners
    if name in owners:
        return owners[name]
    patterns = sorted(target for target in owners if target.startswith("re:"))
    named = next((target for target in patterns if matcher.matches(name, target)), None)
    return owners.get(named or LINEAR)


def group_in_prismquant(names: Collection[str], section: Section) -> Group | None:
    """The group of the linear layer of these names as ``prismquant.load`` finds it.

    Where several groups aim at it, its own name counts more than a pattern, and a pattern more
    than the name of a class; ties go by the order of the groups.
    """
    matcher = section.matcher
    found = [(group.targets.hit(names, matcher), group) for group in section.groups]
    hits = [(hit, place) for place, (hit, _) in enumerate(found) if hit is not None]
    if not hits or section.ignore.hit(names, matcher):
        return None
    return section.groups[min(hits)[1]]


def groups_by_name(name: str, section: Section) -> list[Group]:
    """All groups that have a layer among their targets, by its name rather than its class."""
    return [group for group in section.groups if group.targets.meets(name, section.matcher)]
