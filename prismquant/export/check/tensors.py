"""Rules about tensors: missing ones, extra ones, and their shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from prismquant.export.check.checkpoint import COMPRESSED_TENSORS, Checkpoint, Layer
from prismquant.export.check.expected import (
    REAL,
    SCALES,
    Expected,
    expected_tensors,
    padded_words,
)
from prismquant.export.check.findings import Problem, gathered
from prismquant.export.check.scheme import DENSE, PACK, Group
from prismquant.headers import TensorInfo

_AGAIN = "export the layer again"
_OURS = {
    "input_signs": "the signs before a rotation at run time",
    "split_index": "columns that stay in floating point",
    "split_weight": "columns that stay in floating point",
}
_PACKED_SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale", "qweight")
# Of attention modules, of no linear layer.
_CACHE_SUFFIXES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")


def missing(checkpoint: Checkpoint) -> list[Problem]:
    """Tensors that a quantized layer must have."""
    return gathered(
        (
            f"quantized layers have no {suffix}",
            layer.disk,
            f"their group says {group.describe()}; correct the group, or {_AGAIN}",
        )
        for group, layer, suffix, wanted in _wanted(checkpoint)
        if wanted.required and f"{layer.disk}.{suffix}" not in checkpoint.tensors
    )


def shapes(checkpoint: Checkpoint) -> list[Problem]:
    """Tensors of another shape than the model and the group give them."""
    found = []
    for group, layer, suffix, wanted in _wanted(checkpoint):
        info = checkpoint.tensors.get(f"{layer.disk}.{suffix}")
        if info is None or info.shape in wanted.shapes or _is_old_packing(group, layer, info):
            continue
        what = (
            f"{suffix} is {list(info.shape)} where {group.describe()} of a "
            f"{layer.out_features} x {layer.in_features} layer makes it {list(wanted.shapes[0])}"
        )
        found.append((what, layer.disk, f"correct the group's arguments, or {_AGAIN}"))
    return gathered(found)


def dtypes(checkpoint: Checkpoint) -> list[Problem]:
    """Tensors of a dtype that their layout does not have."""
    found = []
    for group, layer, suffix, wanted in _wanted(checkpoint):
        info = checkpoint.tensors.get(f"{layer.disk}.{suffix}")
        if info is not None and info.dtype not in wanted.dtypes:
            names = " or ".join(_short(dtype) for dtype in wanted.dtypes)
            what = f"{suffix} is {_short(info.dtype)}, {group.layout} has {names}"
            found.append((what, layer.disk, _AGAIN))
    return gathered(found)


def rounded_scales(checkpoint: Checkpoint) -> list[Problem]:
    """Scales wider than the model's dtype, in which vLLM keeps those of packed integers."""
    dtype = checkpoint.model.dtype if checkpoint.model is not None else None
    remedy = f"store them as {_short(dtype)}" if dtype is not None else ""
    return gathered(
        (
            f"vLLM rounds {_short(info.dtype)} scales to the model's {_short(dtype)}",
            layer.disk,
            remedy,
        )
        for group, layer, suffix, _ in _wanted(checkpoint)
        if dtype is not None and group.layout == PACK and suffix == "weight_scale"
        if (info := checkpoint.tensors.get(f"{layer.disk}.{suffix}")) is not None
        and info.dtype in SCALES
        and info.dtype != dtype
        and torch.finfo(info.dtype).eps < torch.finfo(dtype).eps
    )


def old_packing(checkpoint: Checkpoint) -> list[Problem]:
    """Codes of 3, 5, 6 or 7 bits as libraries before 0.18 packed them."""
    remedy = "export it again with compressed-tensors >= 0.18: newer readers take a dense stream"
    return gathered(
        ("codes are padded to whole words, as compressed-tensors before 0.18 did", name, remedy)
        for group, layer, suffix, _ in _wanted(checkpoint)
        if suffix == "weight_packed"
        and (info := checkpoint.tensors.get(name := f"{layer.disk}.{suffix}")) is not None
        and _is_old_packing(group, layer, info)
    )


def extra(checkpoint: Checkpoint) -> list[Problem]:
    """Tensors of a quantized layer that its group does not speak of."""
    found = []
    for layer, suffix in _surplus(checkpoint):
        if suffix == "weight_zero_point":
            what = "symmetric layers have a weight_zero_point"
            remedy = "delete it: vLLM fails with a KeyError; or declare the weights asymmetric"
        elif suffix == "weight_g_idx":
            what = "layers have a weight_g_idx, which readers no longer know"
            remedy = "delete it; a static activation order needs none"
        else:
            what = f"quantized layers have an extra {suffix}"
            remedy = "delete it, or declare in the group what it is for"
        found.append((what, layer.disk, remedy))
    return gathered(found)


def only_ours(checkpoint: Checkpoint) -> list[Problem]:
    """What PrismQuant alone reads."""
    remedy = "serve it with prismquant.load, or quantize again without (see the plan's remarks)"
    pairs = (name.rpartition(".")[::2] for name in sorted(checkpoint.tensors))
    found = {
        (f"only prismquant.load reads {_OURS[suffix]}", prefix, remedy): None
        for prefix, suffix in pairs
        if suffix in _OURS
    }
    return gathered(found)


def float_layers(checkpoint: Checkpoint) -> list[Problem]:
    """Layers that are stored quantized although no group has them."""
    grouped = {layer.disk for layer in checkpoint.layers if layer.group is not None}
    remedy = "add the layer to the group whose scheme it has"
    return gathered(
        ("layers are stored quantized, but no group has them", layer.disk, remedy)
        for layer in checkpoint.layers
        if layer.disk not in grouped
        and any(f"{layer.disk}.{suffix}" in checkpoint.tensors for suffix in _PACKED_SUFFIXES)
    )


def plain_missing(checkpoint: Checkpoint) -> list[Problem]:
    """Parameters in floating point that are not there."""
    return gathered(
        ("the model's tensors are missing", name, "copy them from the original checkpoint")
        for name, _ in _plain(checkpoint)
        if name not in checkpoint.tensors and not _stored_packed(checkpoint, name)
    )


def plain_shapes(checkpoint: Checkpoint) -> list[Problem]:
    """Parameters in floating point of another shape or kind."""
    found = []
    for name, shape in _plain(checkpoint):
        info = checkpoint.tensors.get(name)
        if info is None:
            continue
        if info.shape != shape:
            what = f"a tensor is {list(info.shape)}, the model has {list(shape)}"
            found.append((what, name, "correct config.json, or copy the original tensor"))
        elif info.dtype not in REAL:
            what = f"a tensor is {_short(info.dtype)}, but nothing says that it is quantized"
            found.append((what, name, "add its layer to a group, or store it in floating point"))
    return gathered(found)


def unknown(checkpoint: Checkpoint) -> list[Problem]:
    """Tensors that belong to nothing in the model."""
    model = checkpoint.model
    if model is None:
        return []
    owners = {name.rpartition(".")[0] for name in model.shapes}
    owners |= {layer.name for layer in checkpoint.layers}
    attentions = checkpoint.attentions()
    found = []
    for name in sorted(checkpoint.tensors):
        prefix, _, suffix = name.rpartition(".")
        if prefix in attentions and suffix in _CACHE_SUFFIXES:
            continue
        known = model.names.knows(name) and model.names.to_module(prefix + ".x")[:-2] in owners
        if not known and not _is_transform(prefix):
            found.append(("tensors belong to nothing in the model", name, "delete them"))
    return gathered(found)


def bad_scalars(checkpoint: Checkpoint) -> list[Problem]:
    """Scales of inputs that no calibration can have given."""
    found = []
    for layer, suffix, values in _static_scales(checkpoint):
        if any(not math.isfinite(value) or value <= 0 for value in values):
            what = f"{suffix} is {values[0]:g}: not a positive number"
            found.append((what, layer.disk, "calibrate again; see the run's record of this layer"))
    return gathered(found)


def uncalibrated(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Static scales that are all the value they begin with."""
    seen: dict[str, list[tuple[str, tuple[float, ...]]]] = {}
    for layer, suffix, values in _static_scales(checkpoint):
        seen.setdefault(suffix, []).append((layer.disk, values))
    for suffix, entries in seen.items():
        if len(entries) > 1 and all(value == 1 for _, values in entries for value in values):
            yield Problem(
                f"every {suffix} is exactly 1: inputs were never calibrated",
                tuple(name for name, _ in entries),
                "quantize with calibration data, or use dynamic inputs",
            )


def _wanted(checkpoint: Checkpoint) -> Iterator[tuple[Group, Layer, str, Expected]]:
    for group, members in checkpoint.of_group():
        for layer in members:
            wanted = expected_tensors(group, layer.out_features, layer.in_features)
            for suffix, one in wanted.items():
                yield group, layer, suffix, one


def _surplus(checkpoint: Checkpoint) -> Iterator[tuple[Layer, str]]:
    stored: dict[str, list[str]] = {}
    for name in sorted(checkpoint.tensors):
        prefix, _, suffix = name.rpartition(".")
        stored.setdefault(prefix, []).append(suffix)
    for group, members in checkpoint.of_group():
        for layer in members:
            wanted = expected_tensors(group, layer.out_features, layer.in_features)
            for suffix in stored.get(layer.disk, []):
                if wanted and suffix not in wanted and suffix != "bias" and suffix not in _OURS:
                    yield layer, suffix


def _static_scales(checkpoint: Checkpoint) -> Iterator[tuple[Layer, str, tuple[float, ...]]]:
    for _, layer, suffix, _ in _wanted(checkpoint):
        if suffix.endswith("_scale") and suffix != "weight_scale":
            values = checkpoint.scalar(f"{layer.disk}.{suffix}")
            if values:
                yield layer, suffix, values


def _plain(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names on disk and shapes of what is not quantized."""
    model = checkpoint.model
    if model is None:
        return
    packed = {
        f"{layer.name}.weight" for layer in checkpoint.layers if _has_codes(checkpoint, layer)
    }
    tied = f"{model.arch.head}.weight" if model.tied else None
    for name, shape in model.shapes.items():
        if name not in packed and name != tied:
            yield model.names.to_disk(name), shape


def _has_codes(checkpoint: Checkpoint, layer: Layer) -> bool:
    """Whether a layer's weight is another rule's matter: quantized, or of another method."""
    if checkpoint.method not in ("", COMPRESSED_TENSORS):
        return True
    return layer.group is not None and layer.group.layout != DENSE


def _stored_packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a layer lies there in another form, which another rule tells."""
    prefix = name.removesuffix(".weight")
    return any(f"{prefix}.{suffix}" in checkpoint.tensors for suffix in _PACKED_SUFFIXES)


def _is_old_packing(group: Group, layer: Layer, info: TensorInfo) -> bool:
    weights = group.weights
    if weights is None or group.layout != PACK or weights.bits not in (3, 5, 6, 7):
        return False
    if info.dtype != torch.int32 or len(info.shape) != 2:
        return False
    words = padded_words(layer.in_features, weights.bits)
    dense = -(-layer.in_features * weights.bits // 32)
    return words != dense and info.shape == (layer.out_features, words)


def _is_transform(prefix: str) -> bool:
    return prefix.rpartition(".")[2].endswith(("_input", "_output"))


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
