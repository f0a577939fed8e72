"""Rules about tensors: missing ones, extra ones, their shapes, dtypes and values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prismquant.check.checkpoint import SCALE_SUFFIXES, CheckedLayer, Checkpoint
from prismquant.check.findings import Problem, gathered
from prismquant.export.compressed_tensors.expected import (
    OURS,
    SCALES,
    Expected,
    expected_tensors,
    is_stored_packed,
    short,
)
from prismquant.formats.quantized_layer import finite_fault, scale_fault
from prismquant.formats.section import METHOD, PACK, SchemeGroup
from prismquant.models.config import is_ignored

_DAMAGED = "copy the file again, or quantize again: what is computed with it is no number"
_UNTIE = "set tie_word_embeddings to false, also in text_config"
# Of attention modules, of no linear layer.
_CACHE_SUFFIXES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")


def rounded_scales(checkpoint: Checkpoint) -> list[Problem]:
    """Scales wider than the model's dtype, in which vLLM keeps those of packed integers."""
    dtype = checkpoint.model.dtype if checkpoint.model is not None else None
    remedy = f"store them as {short(dtype)}" if dtype is not None else ""
    return gathered(
        (
            f"vLLM rounds {short(info.dtype)} scales to the model's {short(dtype)}",
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


def only_ours(checkpoint: Checkpoint) -> list[Problem]:
    """Tensors that PrismQuant alone reads."""
    remedy = "serve it with prismquant.load, or quantize again without (see the plan's remarks)"
    pairs = (name.rpartition(".")[::2] for name in sorted(checkpoint.tensors))
    found = {
        (f"only prismquant.load reads {OURS[suffix]}", prefix, remedy): None
        for prefix, suffix in pairs
        if suffix in OURS
    }
    return gathered(found)


def tied_codes(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A head in codes that the configuration calls the embedding, of which readers make neither."""
    if (head := _untied_head(checkpoint)) and is_stored_packed(head, checkpoint.tensors):
        yield Problem(
            "the head is stored quantized, but tie_word_embeddings says that it is the embedding: "
            "readers stop at its tensors, or use them without a weight",
            (head,),
            _UNTIE,
        )


def tied_values(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A head with values of its own that vLLM passes over."""
    if (head := _untied_head(checkpoint)) and not is_stored_packed(head, checkpoint.tensors):
        yield Problem(
            "vLLM takes the embedding for the head, as tie_word_embeddings says, and passes over "
            "the head that is stored",
            (head,),
            _UNTIE,
        )


def _untied_head(checkpoint: Checkpoint) -> str | None:
    """Name on disk of a head that is stored although the configuration ties it."""
    model = checkpoint.model
    if model is None or not getattr(model.config, "tie_word_embeddings", False):
        return None
    prefix = model.names.to_disk(f"{model.arch.head}.weight").removesuffix(".weight")
    return (
        prefix if any(name.startswith(f"{prefix}.weight") for name in checkpoint.tensors) else None
    )


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
        of_cache = prefix in attentions and suffix in _CACHE_SUFFIXES
        if of_cache or is_ignored(model.arch, name):
            continue
        if name in model.carried:
            continue
        known = model.names.knows(name)
        known = known and model.names.to_module(name).rpartition(".")[0] in owners
        if not known and not _is_transform(prefix):
            found.append(("tensors belong to nothing in the model", name, "delete them"))
    return gathered(found)


def not_finite(checkpoint: Checkpoint) -> list[Problem]:
    """NaN and infinities in norms, biases and scales: in large tensors nobody looks for them."""
    found = []
    for name in sorted(checkpoint.small):
        # What groups speak of, other rules look at.
        if checkpoint.method == METHOD and name.rpartition(".")[2] in SCALE_SUFFIXES:
            continue
        tensor = checkpoint.read_tensor(name)
        if tensor is None:
            continue
        if tensor.dtype.itemsize == 1:
            fault = scale_fault(tensor, signed=True) if name.endswith("_scale") else None
        else:
            fault = finite_fault(tensor)
        if fault:
            found.append((f"a tensor {fault}", name, _DAMAGED))
    return gathered(found)


def bad_scales(checkpoint: Checkpoint) -> list[Problem]:
    """Scales of weights that are none: zero, or negative where they may have no sign."""
    found = []
    for group, layer, suffix, _ in _wanted(checkpoint):
        name = f"{layer.disk}.{suffix}"
        if suffix not in ("weight_scale", "weight_global_scale") or name not in checkpoint.small:
            continue
        weights, tensor = group.weights, checkpoint.read_tensor(name)
        signed = weights is not None and weights.type == "int" and weights.symmetric
        signed = signed and suffix == "weight_scale"
        if tensor is not None and (fault := scale_fault(tensor, signed=signed)):
            found.append((f"the {suffix} {fault}", layer.disk, _DAMAGED))
    return gathered(found)


def wrong_shapes(checkpoint: Checkpoint) -> list[Problem]:
    """Shapes and orders of columns, told in tensors, that are not those of the layer."""
    found = []
    for group, layer, suffix, wanted in _wanted(checkpoint):
        if suffix not in ("weight_shape", "weight_g_idx"):
            continue
        info = checkpoint.tensors.get(name := f"{layer.disk}.{suffix}")
        tensor = checkpoint.read_tensor(name) if name in checkpoint.small else None
        if tensor is None or info is None or info.shape not in wanted.shapes:
            continue
        shape = [layer.out_features, layer.in_features]
        if suffix == "weight_shape" and tensor.tolist() != shape:
            what = f"weight_shape is {tensor.tolist()}, the layer is {shape}"
            found.append((what, layer.disk, "correct weight_shape, or export the layer again"))
        elif suffix == "weight_g_idx" and not _are_even(tensor, group):
            size = group.weights.group_size if group.weights else None
            what = f"weight_g_idx does not give each group {size} columns"
            found.append((what, layer.disk, "export the layer again"))
    return gathered(found)


def unread(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Small tensors that are too many, or too large, to be read."""
    left = tuple(sorted(checkpoint.of_values - checkpoint.small))
    if left:
        yield Problem(
            f"{len(left)} scales, norms or biases are large: their values were not looked at",
            left,
            "prismquant.load and export read everything",
        )


def bad_scalars(checkpoint: Checkpoint) -> list[Problem]:
    """Scales and zero points of inputs and outputs that no calibration can have given."""
    found = []
    again = "calibrate again; see the run's record of this layer"
    for layer, suffix, values in _static_scales(checkpoint):
        if any(not math.isfinite(value) or value <= 0 for value in values):
            what = f"{suffix} is {values[0]:g}: not a positive number"
            found.append((what, layer.disk, again))
    for group, members in checkpoint.of_group():
        for side, args in (("input", group.inputs), ("output", group.outputs)):
            if args is None or args.dynamic or args.type != "int":
                continue
            most = 0 if args.symmetric else 1 << (args.bits - 1)
            for layer in members:
                values = checkpoint.scalar(f"{layer.disk}.{side}_zero_point") or ()
                if any(not -most <= value <= max(0, most - 1) for value in values):
                    what = f"{side}_zero_point is {values[0]:g}, which {args.describe()} has not"
                    found.append((what, layer.disk, again))
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


def _wanted(checkpoint: Checkpoint) -> Iterator[tuple[SchemeGroup, CheckedLayer, str, Expected]]:
    for group, members in checkpoint.of_group():
        for layer in members:
            wanted = expected_tensors(group, layer.out_features, layer.in_features)
            for suffix, one in wanted.items():
                yield group, layer, suffix, one


def _are_even(index: Tensor, group: SchemeGroup) -> bool:
    """Whether every group has as many columns as it should, or none has one (-1)."""
    size = group.weights.group_size if group.weights else None
    if size is None or index.is_floating_point() or bool((index == -1).all()):
        return size is not None and not index.is_floating_point()
    groups = len(index) // size
    inside = bool(((index >= 0) & (index < groups)).all())
    return inside and bool((index.long().bincount(minlength=groups) == size).all())


def _static_scales(checkpoint: Checkpoint) -> Iterator[tuple[CheckedLayer, str, tuple[float, ...]]]:
    for _, layer, suffix, _ in _wanted(checkpoint):
        if suffix.endswith("_scale") and suffix != "weight_scale":
            values = checkpoint.scalar(f"{layer.disk}.{suffix}")
            if values:
                yield layer, suffix, values


def _is_transform(prefix: str) -> bool:
    return prefix.rpartition(".")[2].endswith(("_input", "_output"))
