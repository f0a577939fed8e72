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
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prismquant.errors import FormatError, PrismQuantError, grouped
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
from prismquant.patterns import Pattern, compile_pattern, shortened

CONFIG_KEY = "quantization_config"
METHOD = "compressed-tensors"

ARGS_KEYS = frozenset(
    {
        *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"),
        *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
    }
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
STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_GROUPED = ("group", "tensor_group")
_DYNAMIC = ("token", "tensor", "tensor_group", "group")
_INPUTS = ("token", "tensor", "group", "tensor_group", "attn_head")
# Of each input feature there is a group, rather than of neighbours: readers dropped it in 2026.
_REORDERED = ("group", "dynamic")

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

_LINEAR = "Linear"
_DTYPE = re.compile(r"(?:torch\.)?(?:bfloat16|u?int(?:8|16|32|64)|float(?:16|32|64|8_e\w{3,9}))")
_MOST_BITS = 32
# Far above any real layer's width, and small enough for arithmetic on it to stay quick.
_MOST_COUNT = 1 << 24
# What real configurations have: some ten patterns, and every expert's path at most.
_MOST_NAMES = 200_000
_MOST_PATTERNS = 2_000
# For all patterns of a configuration on all layers of a model; honest ones take milliseconds.
_MOST_SECONDS = 3.0
_MOST_TOLD = 10
# What a target is, the most exact first.
NAME, PATTERN, CLASS = 1, 2, 3


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


class Matcher:
    """Compares names with targets: each pair once, all together in a limited time."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], bool] = {}
        self._spent = 0.0

    def matches(self, name: str, target: str) -> bool:
        """Whether a module path is the one named, or fits a ``re:`` pattern from its start.

        What is no regular expression fits nothing: that it is none, reading the section tells.

        Raises:
            FormatError: The patterns of the configuration take too long.
        """
        if not target.startswith("re:"):
            return name == target
        if (found := self._found.get((name, target))) is None:
            found = self._found[name, target] = self._tried(name, target[3:])
        return found

    def _tried(self, name: str, expression: str) -> bool:
        pattern = _compiled(expression)
        if pattern is None:
            return False
        begun = time.process_time()
        try:
            if self._spent > _MOST_SECONDS:
                raise PrismQuantError("all patterns together take too long")
            return pattern.match(name)
        except PrismQuantError as error:
            self._spent = math.inf
            raise FormatError(
                error.what,
                where=CONFIG_KEY,
                remedy="name layers by their paths, or by patterns without repeats inside repeats",
            ) from error
        finally:
            self._spent += time.process_time() - begun


def is_broken(expression: str) -> bool:
    """Whether a text is no regular expression, or one that is too large."""
    return _compiled(expression) is None


@functools.lru_cache(maxsize=_MOST_PATTERNS)
def _compiled(expression: str) -> Pattern | None:
    try:
        return compile_pattern(expression)
    except ValueError:
        return None


@dataclass(frozen=True)
class Targets:
    """Layers as a configuration names them: module paths, ``re:`` patterns, names of classes."""

    entries: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """What is no pattern."""
        return frozenset(entry for entry in self.entries if not entry.startswith("re:"))

    @functools.cached_property
    def patterns(self) -> tuple[str, ...]:
        """What is one, with its ``re:``."""
        return tuple(entry for entry in self.entries if entry.startswith("re:"))

    def meets(self, name: str, matcher: Matcher) -> bool:
        """Whether a layer is meant by its name, rather than by its class."""
        return name in self.names or any(matcher.matches(name, p) for p in self.patterns)

    def hit(self, names: Collection[str], matcher: Matcher) -> int | None:
        """How exactly the linear layer of these names is meant; None: it is not."""
        if not self.names.isdisjoint(names):
            return NAME
        if any(matcher.matches(name, p) for p in self.patterns for name in names):
            return PATTERN
        return CLASS if _LINEAR in self.names else None


@dataclass(frozen=True)
class Args:
    """How numbers are quantized.

    Attributes:
        bits: Width of a code.
        type: ``int`` or ``float``.
        symmetric: Whether zero is its own zero point.
        strategy: What shares a scale.
        group_size: Elements that share one, for the grouped strategies.
        block: Rows and columns of a block, for strategy ``block``.
        dynamic: Whether scales are found at run time; ``local`` for those of blocks only.
        scale_dtype: Dtype of the stored scale, as far as it is declared.
        reordered: Whether each input feature has a group of its own choice (``weight_g_idx``).
    """

    bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None = None
    block: tuple[int, int] | None = None
    dynamic: bool | str = False
    scale_dtype: str | None = None
    reordered: bool = False

    @property
    def per_block(self) -> bool:
        """Whether groups of input features have scales of their own."""
        return self.strategy in _GROUPED

    def describe(self) -> str:
        """In a few words, e.g. ``int4 group 128``."""
        size = f" {self.group_size}" if self.per_block else ""
        kind = "" if self.symmetric else " asymmetric"
        when = " dynamic" if self.dynamic else ""
        return f"{self.type}{self.bits} {self.strategy}{size}{kind}{when}"


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
    ignore: Targets = Targets()
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
        fault = Fault("config.type", f"it is {_a(raw)}, not an object", CONFIG_KEY, "delete it")
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
        ("global_compression_ratio", _is_number, "a number"),
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
        what = "it is missing" if groups is None else f"it is {_a(groups)}, not an object"
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
        what = f"a group is {_a(raw)}, not an object with targets and weights"
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
        Fault("config.arguments", f"{role} {fault}", _place(name), _remedy(fault))
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
        what = f"a transform is {_a(raw)}, not an object"
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
    if (dtype := raw.get("precision")) is not None and not _is_dtype(dtype):
        what = f"a transform has precision {shown(dtype)}"
        faults.append(Fault(rule, what, place, "name a dtype, e.g. torch.float32"))
    listed = raw.get("apply", [])
    if not isinstance(listed, list):
        what = f"a transform's apply is {_a(listed)}, not a list"
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
        what = f"a transform is applied to {_a(raw)}, not an object"
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
    if len(raw) > _MOST_NAMES or len(found.patterns) > _MOST_PATTERNS:
        what = f"{key} has {len(raw)} entries, {len(found.patterns)} of them patterns"
        remedy = f"write at most {_MOST_NAMES} names and {_MOST_PATTERNS} patterns"
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


# -------------------------------------------------------------------------------------- arguments


def args_faults(raw: Any, role: str) -> list[str]:
    """What is wrong with the arguments of ``weights``, ``input_activations`` and so on.

    Args:
        raw: What the configuration says; null is no fault, nor are unknown keys.
        role: Which of a group's entries it is.

    Returns:
        A phrase a fault.
    """
    if raw is None:
        return []
    if not isinstance(raw, Mapping):
        return [f"is {_a(raw)}, not an object"]
    bits, kind = raw.get("num_bits", 8), _lower(raw.get("type", "int"))
    faults = []
    if not is_count(bits) or bits > _MOST_BITS:
        faults.append(f"has num_bits {shown(bits)}")
    if kind not in ("int", "float"):
        faults.append(f"has type {shown(kind)}, neither int nor float")
    elif kind == "float" and bits not in (4, 6, 8):
        faults.append(f"has floating-point numbers of {shown(bits)} bits")
    if not isinstance(raw.get("symmetric", True), bool):
        faults.append(f"has symmetric {shown(raw['symmetric'])}, neither true nor false")
    size = raw.get("group_size")
    if size is not None and not (is_count(size) or _is_whole(size, -1)):
        faults.append(f"has group_size {shown(size)}")
    elif (strategy := _strategy(raw)) not in STRATEGIES:
        faults.append(f"has strategy {shown(strategy)}")
    else:
        faults += _strategy_faults(strategy, size, raw, role)
    faults += _order_faults(raw.get("actorder"), _strategy(raw), role)
    for key in ("scale_dtype", "zp_dtype"):
        if raw.get(key) is not None and not _is_dtype(raw[key]):
            faults.append(f"has {key} {shown(raw[key])}, which is no dtype")
    if not isinstance(raw.get("observer", ""), (str, type(None))):
        faults.append(f"has observer {shown(raw['observer'])}, not a name")
    if not isinstance(raw.get("observer_kwargs", {}), (Mapping, type(None))):
        faults.append(f"has observer_kwargs {shown(raw['observer_kwargs'])}, not an object")
    return faults


def _strategy_faults(
    strategy: str, size: int | None, raw: Mapping[str, Any], role: str
) -> list[str]:
    faults = []
    block, dynamic = raw.get("block_structure"), _lower(raw.get("dynamic", False))
    if strategy in _GROUPED and not is_count(size):
        faults.append(f"has strategy {strategy} without a positive group_size")
    if strategy not in _GROUPED and is_count(size):
        faults.append(f"has group_size {size} with strategy {strategy}")
    if strategy == "block" and _block(block) is None:
        faults.append(f"has strategy block with block_structure {shown(block)}")
    if strategy != "block" and block is not None:
        faults.append(f"has a block_structure with strategy {strategy}")
    if strategy == "token" and not dynamic:
        faults.append("has strategy token without dynamic: true")
    if not isinstance(dynamic, bool) and dynamic not in (None, "local"):
        faults.append(f"has dynamic {shown(dynamic)}")
    elif dynamic and strategy not in _DYNAMIC:
        faults.append(f"has dynamic {dynamic!r} with strategy {strategy}")
    elif dynamic == "local" and strategy != "tensor_group":
        faults.append(f"has dynamic 'local' with strategy {strategy}, not tensor_group")
    if role == "weights" and dynamic:
        faults.append(f"has dynamic {shown(dynamic)}: weights are static")
    if role == "input_activations" and strategy not in _INPUTS:
        faults.append(f"has strategy {strategy}, which inputs cannot have")
    return faults


def _order_faults(order: Any, strategy: Any, role: str) -> list[str]:
    if order is None or order is False:
        return []
    if order is not True and _lower(order) not in ("weight", "static", *_REORDERED):
        return [f"has actorder {shown(order)}"]
    if _lower(order) in (True, *_REORDERED) and strategy != "group":
        return [f"has actorder {shown(order)} with strategy {shown(strategy)}, not group"]
    return ["has an actorder, which only weights may have"] if role != "weights" else []


def read_args(raw: Any, role: str) -> Args | None:
    """The arguments of one role, or None where there are none or they are ill-formed."""
    if raw is None or args_faults(raw, role):
        return None
    size, order, scale_dtype = raw.get("group_size"), raw.get("actorder"), raw.get("scale_dtype")
    return Args(
        bits=raw.get("num_bits", 8),
        type=_lower(raw.get("type", "int")),
        symmetric=raw.get("symmetric", True),
        strategy=_strategy(raw),
        group_size=size if is_count(size) else None,
        block=_block(raw.get("block_structure")),
        dynamic=_lower(raw.get("dynamic")) or False,
        scale_dtype=scale_dtype.removeprefix("torch.") if scale_dtype else None,
        # Once `true` meant the same.
        reordered=order is True or _lower(order) in _REORDERED,
    )


def _remedy(fault: str) -> str:
    if "group_size" in fault:
        return "strategies group and tensor_group need group_size > 0, others need none"
    if "dynamic" in fault:
        return "inputs per token are dynamic: true, weights dynamic: false"
    if "block" in fault:
        return "strategy block needs block_structure [rows, columns], others need none"
    if "actorder" in fault:
        return "write actorder: null; a static order needs nothing in the checkpoint"
    return "correct the arguments; `prismquant quantize` writes legal ones"


def _strategy(raw: Mapping[str, Any]) -> Any:
    strategy = raw.get("strategy")
    if strategy is not None:
        return _lower(strategy)
    size = raw.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _block(value: Any) -> tuple[int, int] | None:
    """Rows and columns; older libraries also wrote ``128x128``."""
    if isinstance(value, str):
        parts = value.split("x")
        value = [int(part) for part in parts] if all(_is_digits(part) for part in parts) else None
    if isinstance(value, list) and len(value) == 2 and all(is_count(item) for item in value):
        return (value[0], value[1])
    return None


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 9


def is_count(value: Any) -> bool:
    """Whether a value of JSON is a positive whole number, of a size that layers have."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and 0 < value <= _MOST_COUNT


def _is_whole(value: Any, wanted: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == wanted


def _is_number(value: Any) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and (isinstance(value, int) or math.isfinite(value))


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and _DTYPE.fullmatch(value) is not None


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _place(name: str) -> str:
    return name if len(name) <= 80 else name[:78] + ".."


def shown(value: Any) -> str:
    """A value of a stranger, short enough for a line."""
    if isinstance(value, (list, Mapping)) and len(value) > 8:
        return f"{_a(value)} of {len(value)} entries"
    if isinstance(value, int) and value.bit_length() > 200:
        return "an enormous number"
    text = repr(value)
    return text if len(text) <= 60 else text[:58] + ".."


def _a(value: Any) -> str:
    """What a value of JSON is, e.g. ``a list``."""
    if isinstance(value, Mapping):
        return "an object"
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# --------------------------------------------------------------------------------------- matching


def group_in_transformers(name: str, section: Section) -> Group | None:
    """The group of a linear layer as the compressed-tensors library finds it.

    Exact names come before patterns and those before the class; ties go by the alphabet.
    """
    matcher = section.matcher
    if _LINEAR in section.ignore.names or section.ignore.meets(name, matcher):
        return None
    owners = section.owners
    if name in owners:
        return owners[name]
    patterns = sorted(target for target in owners if target.startswith("re:"))
    named = next((target for target in patterns if matcher.matches(name, target)), None)
    return owners.get(named or _LINEAR)


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
