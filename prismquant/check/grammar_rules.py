"""Rules about the grammar of a compressed-tensors configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prismquant.check import modelopt_rules as modelopt
from prismquant.check import packed_int_rules as packed_int
from prismquant.check.checkpoint import COMPRESSED_TENSORS, Checkpoint
from prismquant.check.findings import Problem, faults_under, gathered
from prismquant.errors import shortened
from prismquant.formats.packed import LAYOUTS
from prismquant.formats.quantization_args import Args
from prismquant.formats.section import (
    DENSE,
    FLOAT,
    INT,
    MIXED,
    MXFP4,
    MXFP6,
    MXFP8,
    NAIVE,
    NVFP4,
    PACK,
    SchemeGroup,
)
from prismquant.formats.section_grammar import TOP_KEYS

_METHODS = (COMPRESSED_TENSORS, *modelopt.METHODS, *packed_int.METHODS)
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
            f"known methods: {', '.join(_METHODS)}; delete quantization_config if the weights are "
            "in floating point",
        )


def unknown_top_keys(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Keys of the section itself, which readers pass over."""
    near = {fault.remedy for fault in checkpoint.faults if fault.rule == "config.misspelt"}
    keys = tuple(sorted(set(checkpoint.section) - TOP_KEYS)) if not near else ()
    if keys:
        remedy = "harmless; keep what is yours in a file of its own"
        yield Problem("quantization_config has keys that readers pass over", keys, remedy)


def missing_weights(checkpoint: Checkpoint) -> list[Problem]:
    """Groups without weights: vLLM reads them of every group but those of attention."""
    remedy = "give the group weights, or leave its layers out of all groups"
    said = checkpoint.section.get("config_groups") or {}
    return gathered(
        ("a group has no weights", group.name, remedy)
        for group in checkpoint.groups
        if said[group.name].get("weights") is None and not _of_attention(group)
    )


def reordered(checkpoint: Checkpoint) -> list[Problem]:
    """Groups of columns that are no neighbours, which readers gave up in 2026."""
    remedy = "export it as dense and quantize again; a static activation order needs no index"
    return gathered(
        ("weights have groups of columns of their own (actorder: group)", group.name, remedy)
        for group in checkpoint.groups
        if group.weights is not None and group.weights.reordered
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
    found = [
        (f"{shortened(group.layout)} is no format of a group", group.name, known)
        for group in checkpoint.groups
        if group.layout not in (*LAYOUTS, DENSE)
    ]
    return faults_under("config.format-name")(checkpoint) or gathered(found)


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


def _misfit(group: SchemeGroup, weights: Args) -> str:
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


def _of_attention(group: SchemeGroup) -> bool:
    return len(group.targets.entries) == 1 and group.targets.entries[0].endswith("Attention")
