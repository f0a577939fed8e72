"""Rules about experts: what transformers makes of checkpoints that store each by itself."""

from __future__ import annotations

from collections.abc import Iterator

from prismquant.check.checkpoint import CheckedLayer, Checkpoint
from prismquant.check.findings import Problem, gathered
from prismquant.formats.section import FLOAT, INT, NAIVE, PACK, SchemeGroup

# Layouts of which transformers makes stacks of experts.
_STACKED = (PACK, FLOAT, NAIVE)


def unread(checkpoint: Checkpoint) -> list[Problem]:
    """Quantized experts of which transformers makes no stacks."""
    model = checkpoint.model
    if model is None:
        return []
    kept = model.arch.experts_stay_stacked
    why = (
        "transformers 5.24 looks for stacks of experts in this family, finds none, and fills all "
        "experts with random numbers"
        if kept
        else "transformers 5.24 makes no stacks of experts that are stored like this"
    )
    remedy = "load it with prismquant.load or vLLM; or leave the experts in floating point"
    return gathered(
        (why, layer.called, remedy if kept else "load it with prismquant.load or vLLM")
        for layer in _quantized(checkpoint)
        if kept or (layer.group is not None and layer.group.layout not in _STACKED)
    )


def single(checkpoint: Checkpoint) -> list[Problem]:
    """Experts in floating point that are stored one by one, where transformers reads stacks."""
    model = checkpoint.model
    if model is None or not model.arch.experts_stay_stacked:
        return []
    return gathered(
        (
            "transformers 5.24 looks for stacks of experts in this family, finds none, and fills "
            "all experts with random numbers",
            layer.called,
            "load it with prismquant.load or vLLM",
        )
        for layer in checkpoint.layers
        if layer.site is not None
        and layer.site.expert is not None
        and layer.group is None
        and f"{layer.disk}.weight" in checkpoint.tensors
    )


def served(checkpoint: Checkpoint) -> list[Problem]:
    """Experts whose inputs have scales that vLLM's kernels for experts do not take."""
    return gathered(
        (
            f"vLLM 0.33 has no kernel for experts with {layer.group.inputs.strategy} scales of "
            "inputs and such weights",
            layer.called,
            "let inputs of experts be dynamic, with a scale a token (int8-token, fp8-token)",
        )
        for layer in _quantized(checkpoint)
        if layer.group is not None
        and layer.group.inputs is not None
        and layer.group.weights is not None
        and not _served(layer.group)
    )


def _served(group: SchemeGroup) -> bool:
    """Whether scales of inputs and weights are those of a kernel; other formats have rules."""
    weights, inputs = group.weights, group.inputs
    if weights is None or inputs is None or group.layout not in (INT, FLOAT, NAIVE):
        return True
    by_token = inputs.strategy == "token" and bool(inputs.dynamic)
    if inputs.type == "int":
        return by_token and weights.strategy == "channel"
    return (weights.strategy, inputs.strategy) in (("tensor", "tensor"), ("block", "group")) or (
        by_token and weights.strategy == "channel"
    )


def float_inputs(checkpoint: Checkpoint) -> list[Problem]:
    """Quantized inputs of experts, which transformers dequantizes into stacks."""
    return gathered(
        (
            "transformers 5.24 leaves inputs of experts in floating point",
            layer.called,
            "evaluate it with prismquant.load",
        )
        for layer in _quantized(checkpoint)
        if layer.group is not None
        and layer.group.inputs is not None
        and layer.group.layout in _STACKED
    )


def _quantized(checkpoint: Checkpoint) -> Iterator[CheckedLayer]:
    for layer in checkpoint.layers:
        if layer.site is not None and layer.site.expert is not None and layer.group is not None:
            yield layer
