"""The tensors that a checkpoint must have on disk: names, shapes and dtypes, from headers alone.

Loading and exporting refuse what is found here; ``prismquant check`` tells it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from prismquant.errors import FormatError, grouped
from prismquant.export.compressed_tensors.reader import StoredLayer
from prismquant.formats.quantization_args import Args
from prismquant.formats.section import (
    FLOAT,
    INT,
    MXFP4,
    MXFP6,
    MXFP8,
    NAIVE,
    NVFP4,
    PACK,
    SIGNS,
    SPLIT_INDEX,
    SPLIT_WEIGHT,
    Fault,
    SchemeGroup,
)
from prismquant.headers import TensorInfo

if TYPE_CHECKING:
    from prismquant.models.names import NameMap

REAL = (torch.bfloat16, torch.float16, torch.float32)
SCALES = (*REAL, torch.float64)
_E4M3, _E8M0 = (torch.float8_e4m3fn,), (torch.uint8, torch.float8_e8m0fnu)
_WORD = 32
# Tensors that PrismQuant alone reads, and what they are.
OURS: Mapping[str, str] = {
    SIGNS: "signs before a rotation",
    SPLIT_INDEX: "columns in floating point",
    SPLIT_WEIGHT: "columns in floating point",
}
# Tensors by which a layer is seen to be stored in codes.
_CODES = ("weight_packed", "weight_scale", "weight_global_scale", "qweight")
_MOST_SHOWN = 10
_AGAIN = "export the layer again"
VLLM_EXTRA = "tensors.vllm-extra"
"""The rule about tensors that harm no reader but vLLM, which stops at what it does not know."""


@dataclass(frozen=True)
class Expected:
    """One tensor.

    Attributes:
        shapes: Those that readers take; the first is the usual one.
        dtypes: Likewise.
        required: Whether readers miss it.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    required: bool = True


def by_layer(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Prefix -> suffix -> tensor, for all tensors of a checkpoint."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        prefix, _, suffix = name.rpartition(".")
        found.setdefault(prefix, {})[suffix] = info
    return found


def layer_faults(
    prefix: str,
    group: SchemeGroup,
    shape: tuple[int, int],
    held: Mapping[str, TensorInfo],
    private: Collection[str] = (),
) -> Iterator[Fault]:
    """Faults of the tensors of a quantized layer.

    Args:
        prefix: Its name on disk.
        group: Its group; well formed.
        shape: ``(out, in)``.
        held: What lies there, by suffix.
        private: Sides (``input``, ``output``) of which our own section tells the format.
    """
    wanted = expected_tensors(group, *shape)
    if not wanted:
        return
    described, (rows, columns) = group.describe(), shape
    for suffix, one in wanted.items():
        info = held.get(suffix)
        if info is None:
            if one.required:
                remedy = f"their group says {described}; correct the group, or {_AGAIN}"
                yield Fault("tensors.missing", f"quantized layers have no {suffix}", prefix, remedy)
            continue
        if suffix == "weight_packed" and _is_old_packing(group, shape, info):
            what = "codes are padded to whole words, as compressed-tensors before 0.18 did"
            remedy = f"{_AGAIN} with compressed-tensors >= 0.18: readers take a dense stream"
            yield Fault("tensors.old-packing", what, f"{prefix}.{suffix}", remedy)
        elif info.shape not in one.shapes:
            what = (
                f"{suffix} is {list(info.shape)} where {described} of a {rows} x {columns} layer "
                f"makes it {list(one.shapes[0])}"
            )
            remedy = f"correct the group's arguments, or {_AGAIN}"
            yield Fault("tensors.shape", what, prefix, remedy)
        if info.dtype not in one.dtypes:
            names = " or ".join(short(dtype) for dtype in one.dtypes)
            what = f"{suffix} is {short(info.dtype)}, {group.layout} has {names}"
            yield Fault("tensors.dtype", what, prefix, _AGAIN)
    for suffix in sorted(set(held) - set(wanted) - set(OURS) - {"bias"}):
        yield _extra(suffix, prefix, private)


def _extra(suffix: str, prefix: str, private: Collection[str]) -> Fault:
    side, _, kind = suffix.partition("_")
    if side in private and kind in ("scale", "global_scale", "zero_point"):
        what = f"only prismquant.load reads the {suffix} of formats that it alone declares"
        return Fault(VLLM_EXTRA, what, prefix, "vLLM fails with a KeyError: use dynamic inputs")
    if kind == "zero_point" and side in ("input", "output"):
        # Some writers store zeros for symmetric inputs and outputs.
        what = f"symmetric layers have an {suffix}"
        return Fault(VLLM_EXTRA, what, prefix, "delete it: vLLM fails with a KeyError")
    remedy = "delete it, or declare in the group what it is for"
    what = f"quantized layers have an extra {suffix}"
    if suffix == "weight_zero_point":
        what = "symmetric layers have a weight_zero_point"
        remedy = "delete it: vLLM fails with a KeyError; or declare the weights asymmetric"
    elif suffix == "weight_g_idx":
        what = "layers have a weight_g_idx, but no group of columns of their own (actorder)"
        remedy = "delete it: a static activation order needs none; or declare actorder: group"
    return Fault("tensors.extra", what, prefix, remedy)


def plain_faults(
    wanted: Iterable[tuple[str, tuple[int, ...]]], tensors: Mapping[str, TensorInfo]
) -> Iterator[Fault]:
    """Faults of tensors that are not quantized.

    Args:
        wanted: Their names on disk and shapes, as the model has them.
        tensors: What lies there.
    """
    for name, shape in wanted:
        info = tensors.get(name)
        if info is None:
            if not is_stored_packed(name.removesuffix(".weight"), tensors):
                remedy = "copy them from the original checkpoint"
                yield Fault("tensors.plain", "the model's tensors are missing", name, remedy)
        elif info.shape != shape:
            what = f"a tensor is {list(info.shape)}, the model has {list(shape)}"
            remedy = "correct config.json, or copy the original tensor"
            yield Fault("tensors.plain-shape", what, name, remedy)
        elif info.dtype not in SCALES:
            what = f"a tensor is {short(info.dtype)}, but nothing says that it is quantized"
            remedy = "add its layer to a group, or store it in floating point"
            yield Fault("tensors.plain-shape", what, name, remedy)


def layer_faults_of(
    layers: Iterable[StoredLayer], tensors: Mapping[str, TensorInfo]
) -> Iterator[Fault]:
    """Faults of the tensors of linear layers, from their headers."""
    held = by_layer(tensors)
    for layer in layers:
        own, sides = (
            held.get(layer.prefix, {}),
            (("input", layer.inputs), ("output", layer.outputs)),
        )
        if layer.scheme is None or layer.scheme.group is None:
            if is_stored_packed(layer.prefix, tensors):
                yield ungrouped_fault(layer.prefix)
        else:
            private = [side for side, spec in sides if spec is not None]
            found = layer_faults(layer.prefix, layer.scheme.group, layer.shape, own, private)
            yield from (fault for fault in found if fault.rule != VLLM_EXTRA)
            try:
                layer.scheme.weights.scale_shape(*layer.shape)
            except FormatError as error:
                yield Fault("shapes.group", error.what, layer.prefix, error.remedy or "")
        for side, spec in sides:
            suffix = f"{side}_global_scale" if spec and spec.scale == "e4m3" else f"{side}_scale"
            if spec is not None and spec.calibrated and suffix not in own:
                what = f"{side}s of {spec.describe()} have no {suffix}"
                yield Fault("tensors.missing", what, layer.prefix, "calibrate again")


def model_faults(
    model: nn.Module,
    names: NameMap,
    layers: Iterable[StoredLayer],
    tensors: Mapping[str, TensorInfo],
) -> Iterator[Fault]:
    """Faults of everything that is not in codes."""
    coded = {f"{layer.name}.weight" for layer in layers if layer.scheme is not None}
    tied: dict[str, str] = {}
    if getattr(model.config, "tie_word_embeddings", False):
        keys: dict[str, str] = getattr(model, "_tied_weights_keys", None) or {}
        tied = keys | {source: target for target, source in keys.items()}
    wanted = (
        (names.to_disk(name), tuple(value.shape))
        for name, value in model.state_dict().items()
        if name not in coded
        # Of two tied tensors one is enough.
        and not (name in tied and names.to_disk(tied[name]) in tensors)
    )
    return plain_faults(wanted, tensors)


def require_tensors(folder: Path, faults: Sequence[Fault]) -> None:
    """Refuse tensors that are not what the configuration says.

    Raises:
        FormatError: Lists what is wrong, each once, with the layers that it concerns.
    """
    if not faults:
        return
    findings = grouped(f"{fault.where}: {fault.what}" for fault in faults)
    lines = [f"  - {one}" for one in findings[:_MOST_SHOWN]]
    lines += [f"  - and {len(findings) - _MOST_SHOWN} more"] * (len(findings) > _MOST_SHOWN)
    raise FormatError(
        "\n".join(["tensors are not what the configuration says:", *lines]),
        where=str(folder),
        remedy=faults[0].remedy,
        findings=findings,
    )


def is_stored_packed(prefix: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """True if the layer of this name on disk has tensors that only quantized ones have."""
    return any(f"{prefix}.{suffix}" in tensors for suffix in _CODES)


def ungrouped_fault(prefix: str) -> Fault:
    """That a layer is stored quantized although no group has it."""
    what = "layers are stored quantized, but no group has them"
    remedy = "add the layer to the group whose scheme it has"
    return Fault("tensors.ungrouped", what, prefix, remedy)


def expected_tensors(group: SchemeGroup, rows: int, columns: int) -> dict[str, Expected]:
    """The tensors of one layer by suffix; empty for a layout without a rule.

    Args:
        group: Its group; well formed.
        rows, columns: Out and in features.
    """
    weights = group.weights
    if weights is None:
        return {}
    tensors = _weight_tensors(group.layout, weights, rows, columns)
    if not tensors:
        return {}
    return tensors | _static("input", group) | _static("output", group)


def scale_shapes(args: Args, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """Shapes that the scale of a weight may have."""
    if args.strategy == "tensor":
        return ((1,), (), (1, 1))
    if args.strategy == "block" and args.block is not None:
        high, wide = args.block
        return ((-(-rows // high), -(-columns // wide)),)
    if args.per_block and args.group_size:
        return ((rows, -(-columns // args.group_size)),)
    return ((rows, 1), (rows,))


def _weight_tensors(layout: str, args: Args, rows: int, columns: int) -> dict[str, Expected]:
    plain = ((rows, columns),)
    scales = scale_shapes(args, rows, columns)
    if layout == PACK:
        return _packed(args, rows, columns)
    if layout == INT:
        tensors = {
            "weight": Expected(plain, (torch.int8,)),
            "weight_scale": Expected(scales, SCALES),
        }
        if not args.symmetric:
            tensors["weight_zero_point"] = Expected(scales, (torch.int8,))
        return tensors
    if layout in (FLOAT, NAIVE):
        return {
            "weight": Expected(plain, _E4M3),
            "weight_scale": Expected(scales, SCALES),
        }
    if layout == NVFP4:
        return {
            "weight_packed": Expected(((rows, -(-columns // 2)),), (torch.uint8,)),
            "weight_scale": Expected(scales, _E4M3),
            "weight_global_scale": Expected(((1,), ()), SCALES),
        }
    if layout == MXFP4:
        return {
            "weight_packed": Expected(((rows, -(-columns // 2)),), (torch.uint8,)),
            "weight_scale": Expected(scales, _E8M0),
        }
    if layout == MXFP6:
        return {
            "weight_packed": Expected(((rows, -(-columns * 3 // 4)),), (torch.uint8,)),
            "weight_scale": Expected(scales, _E8M0),
        }
    if layout == MXFP8:
        return {"weight": Expected(plain, _E4M3), "weight_scale": Expected(scales, _E8M0)}
    return {}


def _packed(args: Args, rows: int, columns: int) -> dict[str, Expected]:
    scales = scale_shapes(args, rows, columns)[:1]
    tensors = {
        "weight_packed": Expected(((rows, _words(columns, args.bits)),), (torch.int32,)),
        "weight_scale": Expected(scales, SCALES),
        "weight_shape": Expected(((2,),), (torch.int64, torch.int32)),
    }
    if not args.symmetric:
        shape = (_words(rows, args.bits), scales[0][1])
        tensors["weight_zero_point"] = Expected((shape,), (torch.int32,))
    if args.reordered:
        tensors["weight_g_idx"] = Expected(((columns,),), (torch.int32, torch.int64))
    return tensors


def _static(side: str, group: SchemeGroup) -> dict[str, Expected]:
    """Scales that were found by calibration."""
    args = group.inputs if side == "input" else group.outputs
    if args is None:
        return {}
    if args.strategy == "tensor_group":
        known = args.dynamic in ("local", False)
        return {f"{side}_global_scale": Expected(((1,), ()), SCALES)} if known else {}
    if args.dynamic:
        return {}
    shapes: tuple[tuple[int, ...], ...] = ((1,), (), (1, 1))
    tensors = {f"{side}_scale": Expected(shapes, SCALES)}
    if not args.symmetric:
        tensors[f"{side}_zero_point"] = Expected(shapes, (torch.int8,))
    return tensors


def _is_old_packing(group: SchemeGroup, shape: tuple[int, int], info: TensorInfo) -> bool:
    """True if codes of 3, 5, 6 or 7 bits are packed as libraries before 0.18 did."""
    weights = group.weights
    if weights is None or group.layout != PACK or weights.bits not in (3, 5, 6, 7):
        return False
    rows, columns = shape
    # No code straddled two words.
    words = -(-columns // (_WORD // weights.bits))
    return words != _words(columns, weights.bits) and info.shape == (rows, words)


def short(dtype: torch.dtype | None) -> str:
    """A dtype's name without its module."""
    return str(dtype).removeprefix("torch.")


def _words(count: int, bits: int) -> int:
    return -(-count * bits // _WORD)
