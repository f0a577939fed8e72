"""Rules about layers that servers fuse into one, and about shapes over several GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from prismquant.check.checkpoint import CheckedLayer, Checkpoint
from prismquant.check.findings import Problem, gathered
from prismquant.formats.section import (
    FLOAT,
    NAIVE,
    PACK,
    SchemeGroup,
    groups_by_name,
)
from prismquant.models.arch import Modality

_SIZES = (2, 4, 8)
_WORD = 32
_GLOBALS = ("weight_global_scale", "input_global_scale")


def schemes(checkpoint: Checkpoint) -> list[Problem]:
    """Fused layers that do not share a scheme."""
    found = []
    for members in checkpoint.fused():
        described = {layer.called: _described(_first(checkpoint, layer)) for layer in members}
        if len(set(described.values())) > 1:
            listed = "; ".join(f"{layer.role}: {described[layer.called]}" for layer in members)
            remedy = "give them one scheme: servers load them as one matrix"
            found.append((f"fused layers differ: {listed}", members[0].called, remedy))
    return gathered(found)


def torn(checkpoint: Checkpoint) -> list[Problem]:
    """Fused layers of which vLLM ignores some."""
    remedy = "ignore all of q, k and v, or gate and up, or none of them"
    return gathered(
        ("vLLM refuses fused layers of which only some are ignored", layer.called, remedy)
        for layer in checkpoint.layers
        if layer.in_vllm is not None and layer.in_vllm.torn
    )


def global_scales(checkpoint: Checkpoint) -> list[Problem]:
    """Fused NVFP4 layers with different global scales."""
    found = []
    for members in checkpoint.fused():
        for suffix in _GLOBALS:
            values = [checkpoint.scalar(f"{layer.disk}.{suffix}") for layer in members]
            known = {value for value in values if value is not None}
            if len(known) > 1:
                listed = ", ".join(f"{value[0]:g}" for value in sorted(known))
                what = f"fused layers have different {suffix}: servers take the largest for all"
                remedy = "quantize them with one global scale"
                found.append((what, f"{members[0].disk} ({listed})", remedy))
    return gathered(found)


def groups_divide(checkpoint: Checkpoint) -> list[Problem]:
    """Groups that do not divide a layer's input."""
    found = []
    for group, members in checkpoint.of_group():
        size = group.weights.group_size if group.weights else None
        for layer in members:
            if size is not None and layer.in_features % size:
                legal = [g for g in (128, 64, 32, 16) if layer.in_features % g == 0]
                hint = f"group_size {legal[0]}, or " if legal else ""
                what = f"groups of {size} do not divide {layer.in_features} input features"
                remedy = f"quantize it with {hint}a scale a channel"
                found.append((what, layer.called, remedy))
    return gathered(found)


def blocks_divide(checkpoint: Checkpoint) -> list[Problem]:
    """Blocks that a fused layer's parts do not fill."""
    found = []
    for members in checkpoint.fused():
        for layer in members[:-1]:
            block = _block(layer)
            if block is not None and layer.out_features % block[0]:
                what = f"{layer.out_features} rows of a fused part are no multiple of {block[0]}"
                remedy = "use a scale a channel: blocks would span two of the fused parts"
                found.append((what, layer.called, remedy))
    return gathered(found)


def short_blocks(checkpoint: Checkpoint) -> list[Problem]:
    """Blocks that the columns do not fill, for which kernels differ."""
    return gathered(
        (
            f"{layer.in_features} input features are no multiple of the block's {block[1]}",
            layer.called,
            "use a scale a channel for this layer",
        )
        for layer in checkpoint.quantized
        if (block := _block(layer)) is not None and layer.in_features % block[1]
    )


def tensor_parallel(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Over how many GPUs the layers can be split."""
    if not checkpoint.quantized:
        return
    failing = {size: _obstacles(checkpoint, size) for size in _SIZES}
    works = [str(size) for size, found in failing.items() if not found]
    for size, found in failing.items():
        if found:
            yield Problem(
                f"tensor parallelism of {size} does not work: {'; '.join(found)}",
                tuple(name for names in found.values() for name in names),
                f"sizes that work: {', '.join(['1', *works])}",
            )


def _obstacles(checkpoint: Checkpoint, size: int) -> dict[str, list[str]]:
    """Reasons that layers of the language model cannot be split over so many GPUs."""
    found: dict[str, list[str]] = {}
    heads = _heads(checkpoint)
    if heads % size:
        found[f"{heads} attention heads cannot be split"] = ["num_attention_heads"]
    for group, members in checkpoint.of_group():
        for layer in members:
            if layer.site is not None and layer.site.modality is Modality.LLM:
                why = _split_fault(group, layer, size)
                if why:
                    found.setdefault(why, []).append(layer.called)
    return found


def _heads(checkpoint: Checkpoint) -> int:
    """Attention heads of the language model; 0, which any number divides, where none are told."""
    config = checkpoint.model.config if checkpoint.model is not None else None
    return int(getattr(getattr(config, "text_config", config), "num_attention_heads", 0))


def _split_fault(group: SchemeGroup, layer: CheckedLayer, size: int) -> str:
    weights = group.weights
    split = layer.in_features if layer.row_parallel else layer.out_features
    if layer.is_head or weights is None:
        return ""
    if split % size:
        return f"{split} features cannot be split"
    part = split // size
    if not layer.row_parallel:
        uneven = weights.block is not None and part % weights.block[0]
        return f"{part} rows are no multiple of the block" if uneven else ""
    if weights.group_size is not None and part % weights.group_size:
        return f"groups of {weights.group_size} do not divide {part} input features"
    if weights.block is not None and part % weights.block[1]:
        return f"blocks of {weights.block[1]} do not divide {part} input features"
    if group.layout == PACK and part * weights.bits % _WORD:
        return f"{part} codes of {weights.bits} bits do not fill whole words"
    return ""


def _block(layer: CheckedLayer) -> tuple[int, int] | None:
    group = layer.group
    if group is None or group.weights is None or group.layout not in (FLOAT, NAIVE):
        return None
    return group.weights.block


def _first(checkpoint: Checkpoint, layer: CheckedLayer) -> SchemeGroup | None:
    """The first group that names a layer, as servers look for the parts of a fused one."""
    if checkpoint.ignore.meets(layer.called, checkpoint.matcher):
        return None
    named = groups_by_name(layer.called, checkpoint.read)
    return named[0] if named else layer.in_transformers


def _described(group: SchemeGroup | None) -> str:
    return group.describe() if group else "floating point"
