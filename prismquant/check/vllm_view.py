"""vLLM's view of a checkpoint: its module paths, the group and the scheme that it gives a layer.

Written from the behaviour of vLLM 0.33. It renames plain paths of a configuration as it renames
tensors, but not patterns; it looks a fused layer up by its own name first and by its parts' second;
last it looks for a target inside the name of the layer's class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prismquant.formats.quantization_args import Args
from prismquant.formats.section import (
    INT,
    PACK,
    WITH_INPUTS,
    Matcher,
    SchemeGroup,
    Section,
    Targets,
)
from prismquant.models.reader_names import FusedLayer, VllmNames

VERSION = "0.33"
_HEAD_CLASS, _OTHER_CLASS = "ParallelLMHead", "ParallelLinear"
_WHOLE = ("tensor", "channel", "block")


def rename(name: str, names: VllmNames) -> str:
    """The path in vLLM of a tensor or module."""
    for old, new in names.prefixes:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def _rename_target(target: str, names: VllmNames) -> str:
    """A target as vLLM compares it: patterns and class names stay as they are."""
    return rename(target, names) if "." in target and not target.startswith("re:") else target


@dataclass(frozen=True)
class Renamed:
    """Names of a configuration, as vLLM compares them with its own paths.

    Attributes:
        ignore: What is left alone.
        owners: Target -> group, in the order of the configuration.
        matcher: Compares paths with both.
    """

    ignore: Targets
    owners: Mapping[str, SchemeGroup]
    matcher: Matcher


def renamed(section: Section, names: VllmNames) -> Renamed:
    """A configuration's names in vLLM."""
    ignore = Targets(tuple(_rename_target(pattern, names) for pattern in section.ignore))
    owners = {_rename_target(t, names): group for t, group in section.owners.items()}
    return Renamed(ignore, owners, section.matcher)


@dataclass(frozen=True)
class Found:
    """Scheme group that vLLM finds for one of its layers.

    Attributes:
        group: The group whose scheme all parts get; None for floating point.
        torn: Whether some parts are ignored and others are not, which it refuses.
    """

    group: SchemeGroup | None
    torn: bool = False


def find_group(
    parts: Sequence[str],
    fused: FusedLayer | None,
    section: Renamed,
    names: VllmNames,
    *,
    head: bool = False,
) -> Found:
    """The group of a layer, or of the parts of a fused one.

    Args:
        parts: What the configuration calls them, in the order in which they are fused.
        fused: What they are fused into; None for a layer by itself.
        section: The configuration with names of its own.
        names: What vLLM calls the architecture's parts.
        head: Whether it is the language model's head.
    """
    called = [one for part in parts for one in names.looked_up(part) or (part,)]
    paths = [rename(f"{one}.", names).removesuffix(".") for one in called]
    if head and names.head is not None:
        paths = [names.head]
    whole = f"{paths[0].rpartition('.')[0]}.{fused.name}" if fused else paths[0]
    kind = fused.kind if fused else _HEAD_CLASS if head else _OTHER_CLASS
    matcher, owner = section.matcher, section.owners
    if section.ignore.meets(whole, matcher):
        return Found(None)
    hits = [section.ignore.meets(path, matcher) for path in paths]
    if any(hits):
        return Found(None, torn=not all(hits))
    firsts = [_first(path, owner, matcher) for path in (whole, *paths)]
    if firsts[0] is not None:
        return Found(owner[firsts[0]])
    if firsts[1] is not None and None not in firsts[1:]:
        return Found(owner[firsts[1]])
    by_class = next((t for t in owner if _names_class(t, kind, matcher)), None)
    return Found(owner[by_class] if by_class else None)


def _first(path: str, owner: Mapping[str, SchemeGroup], matcher: Matcher) -> str | None:
    """The first target, in their order, that means a path."""
    patterns = (t for t in owner if t == path or t.startswith("re:"))
    return next((t for t in patterns if matcher.matches(path, t)), None)


def _names_class(target: str, kind: str, matcher: Matcher) -> bool:
    if target.startswith("re:"):
        return matcher.matches(kind, target)
    return target.lower() in kind.lower()


# ---------------------------------------------------------------------------------------- schemes


def scheme_class(group: SchemeGroup) -> str | None:
    """Name of the class that vLLM runs a group with on a recent GPU; None where it has none.

    On a GPU before SM89 FP8 runs with 16-bit inputs, and W4A8 with FP8 inputs needs exactly SM90.
    """
    weights, inputs, outputs = group.weights, group.inputs, group.outputs
    if weights is None:
        return None
    if is_nvfp4(weights):
        return "CompressedTensorsW4A4Fp4" if inputs is None or is_nvfp4(inputs) else None
    if is_mx(weights, 4):
        return "CompressedTensorsW4A8Mxfp4" if _fp8_inputs(inputs) else "CompressedTensorsW4A4Mxfp4"
    if is_mx(weights, 8) and weights.scale_dtype == "uint8":
        return "CompressedTensorsW8A8Mxfp8"
    if is_w4a8_fp8(group):
        return "CompressedTensorsW4A8Fp8"
    if _has_quantized_outputs(weights, inputs, outputs, group.layout):
        return "CompressedTensorsWNA8O8Int"
    if is_packed_with_int_inputs(group) and inputs is not None and inputs.bits in (4, 8):
        return f"CompressedTensorsWNA{inputs.bits}Int"
    if inputs is None and weights.strategy in ("channel", "group") and group.layout == PACK:
        return "CompressedTensorsWNA16" if weights.type == "int" and weights.bits > 1 else None
    return _plain_class(group, weights, inputs) if group.layout in WITH_INPUTS else None


def _plain_class(group: SchemeGroup, weights: Args, inputs: Args | None) -> str | None:
    """Layouts with a code a byte."""
    if weights.type == "float":
        if not weights.symmetric or weights.strategy not in _WHOLE:
            return None
        known = inputs is not None and inputs.type == "float"
        static = inputs is not None and inputs.symmetric and inputs.strategy == "tensor"
        if known and inputs is not None and (inputs.dynamic or static):
            return "CompressedTensorsW8A8Fp8"
        return "CompressedTensorsW8A16Fp8"
    if inputs is None or not weights.symmetric:
        return None
    when = {"token": True, "tensor": False}.get(inputs.strategy)
    if when is None or bool(inputs.dynamic) != when or inputs.bits != 8:
        return None
    if weights.bits == 8 and weights.strategy in ("tensor", "channel"):
        return "CompressedTensorsW8A8Int8"
    if is_w4a8_bytes(group):
        return "CompressedTensorsW4A8Int"
    return None


def is_nvfp4(args: Args | None) -> bool:
    """Whether numbers are NVFP4."""
    return (
        args is not None
        and (args.type, args.bits, args.strategy) == ("float", 4, "tensor_group")
        and args.group_size == 16
        and args.symmetric
    )


def is_mx(args: Args | None, bits: int) -> bool:
    """Whether numbers are floating-point codes of so many bits in blocks of 32."""
    return (
        args is not None
        and (args.type, args.bits, args.strategy) == ("float", bits, "group")
        and args.group_size == 32
        and args.symmetric
    )


def is_w4a8_fp8(group: SchemeGroup) -> bool:
    """Whether weights are int4 in groups and inputs FP8 per token."""
    weights, inputs = group.weights, group.inputs
    return (
        weights is not None
        and inputs is not None
        and (weights.type, weights.bits, weights.strategy) == ("int", 4, "group")
        and (inputs.type, inputs.bits, inputs.strategy) == ("float", 8, "token")
        and weights.symmetric
        and inputs.symmetric
    )


def is_packed_with_int_inputs(group: SchemeGroup) -> bool:
    """Whether packed integer weights meet integer inputs that are quantized at run time."""
    weights, inputs = group.weights, group.inputs
    return (
        weights is not None
        and inputs is not None
        and group.layout == PACK
        and weights.type == inputs.type == "int"
        and weights.strategy in ("channel", "group")
        and inputs.symmetric
        and bool(inputs.dynamic)
        and inputs.strategy in ("token", "group")
    )


def is_w4a8_bytes(group: SchemeGroup) -> bool:
    """Whether int4 weights lie in bytes of their own and meet int8 inputs."""
    weights, inputs = group.weights, group.inputs
    return (
        weights is not None
        and inputs is not None
        and group.layout in WITH_INPUTS
        and (weights.type, weights.bits) == ("int", 4)
        and weights.strategy in ("channel", "group")
        and weights.symmetric
        and (inputs.type, inputs.bits, inputs.strategy) == ("int", 8, "token")
        and bool(inputs.dynamic)
    )


def lacks_inputs(group: SchemeGroup) -> bool:
    """Whether vLLM insists on quantized inputs that the group does not have."""
    integers = group.weights is not None and group.weights.type == "int"
    return group.layout in WITH_INPUTS and integers and group.inputs is None


def _fp8_inputs(inputs: Args | None) -> bool:
    return (
        inputs is not None
        and (inputs.type, inputs.bits) == ("float", 8)
        and bool(inputs.dynamic)
        and inputs.strategy in ("token", "group")
        and inputs.symmetric
    )


def _has_quantized_outputs(
    weights: Args, inputs: Args | None, outputs: Args | None, layout: str
) -> bool:
    static = ("int", 8, "tensor")
    return (
        weights.type == "int"
        and weights.strategy in ("channel", "group")
        and layout in (PACK, INT)
        and all(
            args is not None
            and (args.type, args.bits, args.strategy) == static
            and not args.dynamic
            for args in (inputs, outputs)
        )
    )
