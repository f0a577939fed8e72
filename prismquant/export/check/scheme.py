"""What a compressed-tensors configuration says, read without failing at what is wrong in it.

A group's arguments become :class:`Args` where they are well formed and None where they are not;
what is wrong with them is the grammar's to tell. Which group a layer belongs to is answered twice,
because transformers and vLLM match targets in different orders and against different names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

PACK, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
MXFP6, MXFP8 = "mxfp6-pack-quantized", "mxfp8-quantized"
DENSE, MIXED = "dense", "mixed-precision"
LAYOUTS = (PACK, INT, FLOAT, NAIVE, NVFP4, MXFP4, MXFP6, MXFP8)
# Formats of which a reader takes it that inputs are quantized too.
WITH_INPUTS = (NAIVE, INT, FLOAT, NVFP4)

_LINEAR = "Linear"


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
    """

    bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None = None
    block: tuple[int, int] | None = None
    dynamic: bool | str = False
    scale_dtype: str | None = None

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
        targets: Module paths, ``re:`` patterns or class names.
        layout: Its own format, else that of the whole configuration; may be any text.
        own_format: Whether it says its format itself.
        weights, inputs, outputs: What is quantized; None for what is not, or is ill-formed.
        well_formed: Whether nothing in it is ill-formed.
    """

    name: str
    targets: tuple[str, ...]
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


def args_faults(raw: Any, role: str) -> list[str]:
    """What is wrong with the arguments of ``weights``, ``input_activations`` and so on.

    Args:
        raw: What the configuration says; null is no fault.
        role: Which of a group's entries it is.

    Returns:
        A phrase a fault.
    """
    if raw is None:
        return []
    if not isinstance(raw, Mapping):
        return [f"is a {type(raw).__name__}, not an object"]
    faults = [f"has the unknown key {key!r}" for key in sorted(set(raw) - ARGS_KEYS)]
    bits, kind = raw.get("num_bits", 8), raw.get("type", "int")
    if not _is_count(bits):
        faults.append(f"has num_bits {bits!r}")
    if kind not in ("int", "float"):
        faults.append(f"has type {kind!r}, neither int nor float")
    elif kind == "float" and bits not in (4, 6, 8):
        faults.append(f"has floating-point numbers of {bits!r} bits")
    size, block = raw.get("group_size"), raw.get("block_structure")
    if size is not None and not (_is_count(size) or size == -1):
        faults.append(f"has group_size {size!r}")
    elif (strategy := _strategy(raw)) not in STRATEGIES:
        faults.append(f"has strategy {strategy!r}")
    else:
        faults += _strategy_faults(strategy, size, block, raw.get("dynamic", False), role)
    if raw.get("actorder") not in (None, False, "weight", "static"):
        faults.append(f"has actorder {raw['actorder']!r}, which readers no longer know")
    elif raw.get("actorder") and role != "weights":
        faults.append("has an actorder, which only weights may have")
    return faults


def _strategy_faults(
    strategy: str, size: int | None, block: Any, dynamic: Any, role: str
) -> list[str]:
    faults = []
    if strategy in _GROUPED and not _is_count(size):
        faults.append(f"has strategy {strategy} without a positive group_size")
    if strategy not in _GROUPED and _is_count(size):
        faults.append(f"has group_size {size} with strategy {strategy}")
    if strategy == "block" and not _is_block(block):
        faults.append(f"has strategy block with block_structure {block!r}")
    if strategy != "block" and block is not None:
        faults.append(f"has a block_structure with strategy {strategy}")
    if strategy == "token" and not dynamic:
        faults.append("has strategy token without dynamic: true")
    if dynamic not in (True, False, None, "local"):
        faults.append(f"has dynamic {dynamic!r}")
    elif dynamic and strategy not in _DYNAMIC:
        faults.append(f"has dynamic {dynamic!r} with strategy {strategy}")
    elif dynamic == "local" and strategy != "tensor_group":
        faults.append(f"has dynamic 'local' with strategy {strategy}, not tensor_group")
    if role == "weights" and dynamic:
        faults.append(f"has dynamic {dynamic!r}: weights are static")
    if role == "input_activations" and strategy not in _INPUTS:
        faults.append(f"has strategy {strategy}, which inputs cannot have")
    return faults


def read_args(raw: Any, role: str) -> Args | None:
    """The arguments of one role, or None where there are none or they are ill-formed."""
    if raw is None or args_faults(raw, role):
        return None
    block = raw.get("block_structure")
    size = raw.get("group_size")
    scale_dtype = raw.get("scale_dtype")
    return Args(
        bits=raw.get("num_bits", 8),
        type=raw.get("type", "int"),
        symmetric=bool(raw.get("symmetric", True)),
        strategy=_strategy(raw),
        group_size=size if _is_count(size) else None,
        block=(block[0], block[1]) if block is not None else None,
        dynamic=raw.get("dynamic") or False,
        scale_dtype=str(scale_dtype).removeprefix("torch.") if scale_dtype else None,
    )


def read_groups(section: Mapping[str, Any]) -> tuple[Group, ...]:
    """All groups that have the shape of one."""
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping):
        return ()
    return tuple(
        _read_group(name, raw, section.get("format"))
        for name, raw in groups.items()
        if isinstance(raw, Mapping)
    )


def _read_group(name: str, raw: Mapping[str, Any], default: Any) -> Group:
    targets = raw.get("targets")
    listed = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
    args = {role: read_args(raw.get(role), role) for role in ROLES}
    sound = all((args[role] is None) == (raw.get(role) is None) for role in ROLES)
    own = raw.get("format")
    return Group(
        name=name,
        targets=tuple(targets) if listed and targets else (),
        layout=str(own if own is not None else default),
        own_format=own is not None,
        weights=args["weights"],
        inputs=args["input_activations"],
        outputs=args["output_activations"],
        well_formed=sound and listed and args["weights"] is not None,
    )


# --------------------------------------------------------------------------------------- matching


def matches(name: str, pattern: str) -> bool:
    """Whether a module path is the one named, or fits a ``re:`` pattern from its start."""
    if pattern.startswith("re:"):
        compiled = _compiled(pattern[3:])
        return compiled is not None and compiled.match(name) is not None
    return name == pattern


def broken_pattern(pattern: str) -> bool:
    """Whether a pattern cannot be compiled."""
    return pattern.startswith("re:") and _compiled(pattern[3:]) is None


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None


def group_in_transformers(
    name: str, groups: Sequence[Group], ignore: Sequence[str]
) -> Group | None:
    """The group of a linear layer as the compressed-tensors library finds it.

    Exact names come before patterns and those before the class; ties go by the alphabet.
    """
    if any(matches(name, pattern) or pattern == _LINEAR for pattern in ignore):
        return None
    owner = {target: group for group in groups for target in group.targets}
    ordered = sorted(owner, key=lambda target: ("re:" in target, target))
    named = next((target for target in ordered if matches(name, target)), None)
    target = named or (_LINEAR if _LINEAR in owner else None)
    return owner[target] if target else None


def groups_by_name(name: str, groups: Sequence[Group]) -> list[Group]:
    """All groups that have a layer among their targets, by its name rather than its class."""
    return [group for group in groups if any(matches(name, target) for target in group.targets)]


def _strategy(raw: Mapping[str, Any]) -> str:
    strategy = raw.get("strategy")
    if strategy is not None:
        return str(strategy).lower()
    size = raw.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(item) for item in value)
