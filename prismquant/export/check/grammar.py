"""Rules about the grammar of a compressed-tensors configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prismquant.export.check import modelopt, packed_int
from prismquant.export.check.checkpoint import COMPRESSED_TENSORS, Checkpoint
from prismquant.export.check.findings import Problem, gathered
from prismquant.export.check.scheme import (
    ARGS_KEYS,
    DENSE,
    FLOAT,
    GROUP_KEYS,
    INT,
    LAYOUTS,
    MIXED,
    MXFP4,
    MXFP6,
    MXFP8,
    NAIVE,
    NVFP4,
    PACK,
    ROLES,
    TOP_KEYS,
    Args,
    Group,
    args_faults,
    broken_pattern,
)

_METHODS = (COMPRESSED_TENSORS, *modelopt.METHODS, *packed_int.METHODS)
_SPELLING = "known keys: " + ", ".join(sorted(ARGS_KEYS))
# layout -> (type, bits) of the weights that it holds; bits None for any.
_HOLDS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    PACK: ("int", (2, 3, 4, 5, 6, 7, 8)),
    INT: ("int", (2, 3, 4, 5, 6, 7, 8)),
    FLOAT: ("float", (8,)),
    NAIVE: ("float", (8,)),
    NVFP4: ("float", (4,)),
    MXFP4: ("float", (4,)),
    MXFP6: ("float", (6,)),
    MXFP8: ("float", (8,)),
}
# layout -> strategies of weights.
_STRATEGIES: Mapping[str, tuple[str, ...]] = {
    PACK: ("channel", "group"),
    INT: ("tensor", "channel", "group"),
    FLOAT: ("tensor", "channel", "group", "block"),
    NAIVE: ("tensor", "channel", "group", "block"),
    NVFP4: ("tensor_group",),
    MXFP4: ("group",),
    MXFP6: ("group",),
    MXFP8: ("group",),
}
_SIZES = {NVFP4: 16, MXFP4: 32, MXFP6: 32, MXFP8: 32}


def raw_groups(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """``config_groups`` as it stands, or nothing where it has another shape."""
    groups = checkpoint.section.get("config_groups")
    return groups if isinstance(groups, Mapping) else {}


def not_quantized(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A checkpoint in floating point."""
    if not checkpoint.section:
        what = "config.json has no quantization_config: the checkpoint is in floating point"
        yield Problem(what, ("config.json",), "nothing to do if it is meant to be")


def method(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A method for which there are no rules."""
    if checkpoint.section and checkpoint.method not in _METHODS:
        yield Problem(
            f"there are no rules for quant_method {checkpoint.method!r}",
            ("quant_method",),
            f"known methods: {', '.join(_METHODS)}",
        )


def missing_method(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A section that does not say what it is."""
    if checkpoint.section and not checkpoint.section.get("quant_method"):
        what = "quantization_config has no quant_method"
        yield Problem(what, ("quant_method",), f"write quant_method: {COMPRESSED_TENSORS}")


def group_shape(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Groups that are no objects, or whose targets are no list of names."""
    groups = checkpoint.section.get("config_groups")
    if groups is not None and not isinstance(groups, Mapping):
        yield Problem("config_groups is not an object", ("config_groups",), "name each group")
    for name, group in raw_groups(checkpoint).items():
        if not isinstance(group, Mapping):
            what = "a group is not an object with targets and weights"
            yield Problem(what, (name,), "write its targets and arguments out")
            continue
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            yield Problem("a group's targets are not a list of names", (name,), "list its layers")


def unknown_keys(checkpoint: Checkpoint) -> list[Problem]:
    """Keys of arguments that no reader knows: all of them refuse the checkpoint."""
    return gathered(
        (f"{role} has the unknown key {key!r}", name, f"delete it; {_SPELLING}")
        for name, group in raw_groups(checkpoint).items()
        if isinstance(group, Mapping)
        for role in ROLES
        if isinstance(group.get(role), Mapping)
        for key in sorted(set(group[role]) - ARGS_KEYS)
    )


def unknown_group_keys(checkpoint: Checkpoint) -> list[Problem]:
    """Keys of groups that the compressed-tensors library refuses and vLLM passes over."""
    remedy = f"delete it; keys of a group: {', '.join(sorted(GROUP_KEYS))}"
    return gathered(
        (f"a group has the unknown key {key!r}", name, remedy)
        for name, group in raw_groups(checkpoint).items()
        if isinstance(group, Mapping)
        for key in sorted(set(group) - GROUP_KEYS)
    )


def unknown_top_keys(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Keys of the section itself, which readers pass over."""
    keys = tuple(sorted(set(checkpoint.section) - TOP_KEYS))
    if keys:
        remedy = "harmless; keep what is yours in a file of its own"
        yield Problem("quantization_config has keys that readers pass over", keys, remedy)


def arguments(checkpoint: Checkpoint) -> list[Problem]:
    """Arguments that contradict each other."""
    found = []
    for name, group in raw_groups(checkpoint).items():
        if isinstance(group, Mapping):
            for role in ROLES:
                faults = [f for f in args_faults(group.get(role), role) if "unknown key" not in f]
                found += [(f"{role} {fault}", name, _remedy(fault)) for fault in faults]
    return gathered(found)


def missing_weights(checkpoint: Checkpoint) -> list[Problem]:
    """Groups without weights: vLLM reads them of every group but those of attention."""
    remedy = "give the group weights, or leave its layers out of all groups"
    return gathered(
        ("a group has no weights", name, remedy)
        for name, group in raw_groups(checkpoint).items()
        if isinstance(group, Mapping) and not group.get("weights") and not _of_attention(group)
    )


def own_format(checkpoint: Checkpoint) -> list[Problem]:
    """Groups that leave their format to the top level, which newer readers do not look at."""
    remedy = "write the format into every group: readers infer another one where it is missing"
    return gathered(
        ("a group does not say its format", group.name, remedy)
        for group in checkpoint.groups
        if not group.own_format
    )


def format_name(checkpoint: Checkpoint) -> list[Problem]:
    """Formats that are none, or that a group cannot have."""
    known = f"formats of a group: {', '.join(LAYOUTS)}, {DENSE}"
    return gathered(
        (f"{group.layout!r} is no format of a group", group.name, known)
        for group in checkpoint.groups
        if group.layout not in (*LAYOUTS, DENSE)
    )


def top_format(checkpoint: Checkpoint) -> Iterator[Problem]:
    """The format of the whole, against those of its groups."""
    layouts = {group.layout for group in checkpoint.groups if group.own_format}
    if not layouts:
        return
    meant = layouts.pop() if len(layouts) == 1 else MIXED
    said = checkpoint.section.get("format")
    if said != meant:
        what = f"the top-level format is {said!r}, but the groups make it {meant!r}"
        yield Problem(what, ("format",), f"write format: {meant}")


def format_holds(checkpoint: Checkpoint) -> list[Problem]:
    """Weights that their format cannot hold."""
    found = []
    for group in checkpoint.groups:
        if group.well_formed and group.weights is not None and group.layout in LAYOUTS:
            why = _misfit(group, group.weights)
            if why:
                found.append((f"{group.layout} {why}", group.name, _fitting(group.weights)))
    return gathered(found)


def status(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Whether the weights are said to be packed."""
    said = checkpoint.section.get("quantization_status")
    if said != "compressed":
        what = f"quantization_status is {said!r}: weights are not expected in packed form"
        yield Problem(what, ("quantization_status",), "write quantization_status: compressed")


def sparsity(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Sparsity, which is gone."""
    section = checkpoint.section.get("sparsity_config")
    if isinstance(section, Mapping) and section.get("targets"):
        what = "sparsity_config has targets: readers dropped sparse formats"
        yield Problem(what, ("sparsity_config",), "store the weights dense and write {}")


def patterns(checkpoint: Checkpoint) -> list[Problem]:
    """``re:`` patterns that do not compile."""
    listed = [(t, group.name) for group in checkpoint.groups for t in group.targets]
    listed += [(pattern, "ignore") for pattern in checkpoint.ignore]
    return gathered(
        (f"{pattern!r} is no regular expression", where, "correct the pattern")
        for pattern, where in listed
        if broken_pattern(pattern)
    )


def no_inputs(checkpoint: Checkpoint) -> list[Problem]:
    """Plain int8 weights without quantized inputs."""
    remedy = "store weight-only integers as pack-quantized"
    return gathered(
        (f"{group.layout} integers have no input_activations", group.name, remedy)
        for group in checkpoint.groups
        if group.well_formed
        and group.weights is not None
        and group.weights.type == "int"
        and group.layout in (INT, NAIVE)
        and group.inputs is None
    )


def _misfit(group: Group, weights: Args) -> str:
    kind, bits = _HOLDS[group.layout]
    if weights.type != kind or weights.bits not in bits:
        return f"cannot hold {weights.type}{weights.bits} weights"
    if weights.strategy not in _STRATEGIES[group.layout]:
        return f"cannot hold weights of strategy {weights.strategy}"
    size = _SIZES.get(group.layout)
    if size is not None and weights.group_size != size:
        return f"has groups of {size}, not {weights.group_size}"
    if not weights.symmetric and group.layout not in (PACK, INT):
        return "holds symmetric weights only"
    return ""


def _fitting(weights: Args) -> str:
    fitting = [
        layout
        for layout, (kind, bits) in _HOLDS.items()
        if kind == weights.type and weights.bits in bits and weights.strategy in _STRATEGIES[layout]
    ]
    return f"{weights.describe()} fits {', '.join(fitting) or 'no format'}"


def _of_attention(group: Mapping[str, Any]) -> bool:
    targets = group.get("targets")
    return isinstance(targets, list) and len(targets) == 1 and str(targets[0]).endswith("Attention")


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
