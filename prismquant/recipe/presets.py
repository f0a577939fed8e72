"""Recipes with a name.

A plain name covers what servers expect to be quantized: the attention and MLP projections of the
language model. ``-all`` adds the vision tower, the patch embedding and the projector. ``lm_head``
and the embeddings are always left alone. The patch embedding keeps its input in floating point: no
checkpoint format can declare a quantized input for a convolution.
"""

from __future__ import annotations

from typing import Any

_LLM = {"modality": "llm", "role": ["attn", "mlp"]}
_VISION = {"modality": ["vision", "projector"]}
_PATCH = {"role": "patch_embed"}


def _preset(weights: str, activations: str | None, *, weight_range: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"match": _LLM, "weights": weights, "weight_range": weight_range}
    return {"rules": [rule | ({"activations": activations} if activations else {})]}


def _with_vision(preset: dict[str, Any], **changes: Any) -> dict[str, Any]:
    rule = preset["rules"][0]
    # Widths such as 3420 and 4304 occur in vision towers: no group of 128 divides them.
    tower = rule | {"match": _VISION, "group_fallback": "channel"} | changes
    patch = {"match": _PATCH, "activations": "none"}
    return {"rules": [rule, tower, patch]}


_W8A8 = _preset("int8-channel", "int8-token", weight_range="minmax")
_W8A8_STATIC = _preset("int8-channel", "int8-tensor", weight_range="minmax")
_W4A16 = _preset("int4-g128", None, weight_range="mse")
_W4A8 = _preset("int4-channel", "int8-token", weight_range="mse")
_W4A8_STATIC = _preset("int4-channel", "int8-tensor", weight_range="mse")
_W3A16 = _preset("int3-g128", None, weight_range="mse")

PRESETS: dict[str, dict[str, Any]] = {
    "w8a8": _W8A8,
    "w8a8-all": _with_vision(_W8A8),
    "w8a8-static": _W8A8_STATIC,
    "w8a8-static-all": _with_vision(_W8A8_STATIC),
    "w4a16": _W4A16,
    "w4a16-all": _with_vision(_W4A16),
    "w4a8": _W4A8,
    "w4a8-all": _with_vision(_W4A8),
    "w4a8-static": _W4A8_STATIC,
    "w4a8-static-all": _with_vision(_W4A8_STATIC),
    "w3a16": _W3A16,
    "w3a16-all": _with_vision(_W3A16),
    "vision-w8a8-llm-w4a8": _with_vision(
        _W4A8, weights="int8-channel", activations="int8-token", weight_range="minmax"
    ),
}
