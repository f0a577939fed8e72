"""Recipes with a name.

A plain name covers what servers expect to be quantized: the attention and MLP projections of the
language model. ``-all`` adds the vision tower, the patch embedding and the projector. ``lm_head``
and the embeddings are always left alone. The patch embedding keeps its input in floating point: no
checkpoint format can declare a quantized input for a convolution.

A method's name before the setting says the method: ``smoothquant-gptq-w4a8``, ``awq-w4a16``.
Without one, codes come from GPTQ; with static activations scale is first moved by SmoothQuant,
because one outlier channel would otherwise set the one scale of a whole input.

``auto-`` before the setting leaves the method open: calibration samples that no statistic saw
choose among several ways, each of which every reader takes.
"""

from __future__ import annotations

from typing import Any

from prismquant.recipe.plain_yaml import write_yaml

Preset = dict[str, Any]

_LLM = {"modality": "llm", "role": ["attn", "mlp"]}
_VISION = {"modality": ["vision", "projector"]}
_PATCH = {"role": "patch_embed"}


def _preset(weights: str, activations: str | None, *, weight_range: str, **fields: Any) -> Preset:
    rule: Preset = {"match": _LLM, "weights": weights, "weight_range": weight_range} | fields
    return {"rules": [rule | ({"activations": activations} if activations else {})]}


def _with_vision(preset: Preset, **changes: Any) -> Preset:
    rule = preset["rules"][0]
    # Widths such as 3420 and 4304 occur in vision towers: no group of 128 divides them.
    tower = rule | {"match": _VISION, "fallback": "channel"} | changes
    patch = {"match": _PATCH, "activations": "none"}
    return preset | {"rules": [rule, tower, patch]}


def _with(preset: Preset, *transforms: Preset, **fields: Any) -> Preset:
    """The preset with transforms, and with fields in each of its rules that set a format."""
    rules = [rule | fields if "weights" in rule else rule for rule in preset["rules"]]
    return preset | {"rules": rules} | ({"transforms": list(transforms)} if transforms else {})


_SMOOTHQUANT: Preset = {"name": "smoothquant"}
_AWQ: Preset = {"name": "awq"}
_ROTATION: Preset = {"name": "rotation", "match": {"modality": "llm"}}
_ONLINE = _ROTATION | {"options": {"online": True}}
# As MQuant does: Hadamard matrices without signs, and the column that stands out is split off.
_UNSIGNED: Preset = {"name": "rotation", "options": {"online": True, "signs": False}}
_SPLIT: Preset = {"name": "split", "match": {"role": "mlp.down"}}
_RTN: Preset = {"solver": "rtn"}
_AWQ_CLIP: Preset = {"solver": "rtn", "options": {"scale_weighting": "group"}}

_W8A8 = _preset("int8-channel", "int8-token", weight_range="minmax")
_W8A8_STATIC = _with(_preset("int8-channel", "int8-tensor", weight_range="minmax"), _SMOOTHQUANT)
_W4A16 = _preset("int4-g128", None, weight_range="mse")
_W4A8 = _preset("int4-channel", "int8-token", weight_range="mse")
_W4A8_STATIC = _with(_preset("int4-channel", "int8-tensor", weight_range="mse"), _SMOOTHQUANT)
_W3A16 = _preset("int3-g128", None, weight_range="mse")
_W2A16 = _preset("int2-g64-asym", None, weight_range="mse")
_W8A16 = _preset("int8-channel", None, weight_range="minmax")
_W4AFP8 = _preset("int4-g128", "fp8-token", weight_range="mse")
_FP8 = _preset("fp8-channel", "fp8-token", weight_range="mse")
_FP8_STATIC = _with(_preset("fp8-channel", "fp8-tensor", weight_range="mse"), _SMOOTHQUANT)
_FP8_BLOCK = _preset("fp8-b128", "fp8-g128-dyn", weight_range="mse", fallback="nearest")
_NVFP4 = _preset("nvfp4", "nvfp4-dyn", weight_range="mse")
_NVFP4A16 = _preset("nvfp4", None, weight_range="mse")
_MXFP4 = _preset("mxfp4", "mxfp4-dyn", weight_range="mse")
_MXFP4A16 = _preset("mxfp4", None, weight_range="mse")
_MXFP6A16 = _preset("mxfp6", None, weight_range="mse")
# Servers round the scales of MXFP8 inputs up.
_MXFP8 = _preset("mxfp8", "mxfp8-ceil-dyn", weight_range="mse")
_MXINT8 = _preset("mxint8", "mxint8-dyn", weight_range="minmax")

PRESETS: dict[str, Preset] = {
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
    "w8a16": _W8A16,
    "w4afp8": _W4AFP8,
    "fp8": _FP8,
    "fp8-all": _with_vision(_FP8),
    "fp8-static": _FP8_STATIC,
    "fp8-block": _FP8_BLOCK,
    "fp8-kv": _FP8 | {"kv_cache": "fp8"},
    "nvfp4": _NVFP4,
    "nvfp4-all": _with_vision(_NVFP4),
    "nvfp4a16": _NVFP4A16,
    "mxfp4": _MXFP4,
    "mxfp4-all": _with_vision(_MXFP4),
    "mxfp4a16": _MXFP4A16,
    "mxfp6a16": _MXFP6A16,
    "mxfp8": _MXFP8,
    "mxfp8-all": _with_vision(_MXFP8),
    "mxint8": _MXINT8,
    "vision-w8a8-llm-w4a8": _with_vision(
        _W4A8, weights="int8-channel", activations="int8-token", weight_range="minmax"
    ),
    "smoothquant-w8a8": _with(_W8A8, _SMOOTHQUANT, **_RTN),
    "smoothquant-w8a8-static": _with(_W8A8_STATIC, **_RTN),
    "smoothquant-gptq-w4a8": _with(_W4A8, _SMOOTHQUANT),
    "smoothquant-gptq-w4a16": _with(_W4A16, _SMOOTHQUANT),
    "smoothquant-gptq-w3a16": _with(_W3A16, _SMOOTHQUANT),
    "awq-w4a16": _with(_W4A16, _AWQ, **_AWQ_CLIP),
    "awq-gptq-w4a16": _with(_W4A16, _AWQ, correction="auto"),
    "awq-gptq-w3a16": _with(_W3A16, _AWQ, correction="auto"),
    "awq-gptq-w2a16": _with(_W2A16, _AWQ, correction="auto"),
    "rotation-gptq-w4a8": _with(_W4A8, _ONLINE),
    "mquant-w4a8-static": _with(_with_vision(_W4A8_STATIC), _UNSIGNED, _SPLIT),
    "zeroquant-w4a8": _with(
        _preset("int4-g128", "int8-token", weight_range="minmax"), **_RTN, tuner="zeroquant"
    ),
    "zeroquant-w3a16": _with(_W3A16, **_RTN, tuner="zeroquant"),
    "autoround-w2a16": _with(_W2A16, **_RTN, tuner="autoround"),
}

# Below 8 bits correction is always on: it chooses its own strength on tokens held out, so it costs
# time but hardly ever loss. Of methods that lose alike the first is taken.
_ALTERNATIVES: dict[str, Preset] = {
    "plain": {},
    "rotation": {"transforms": [_ROTATION]},
    "smoothquant": {"transforms": [_SMOOTHQUANT]},
    "rotation-smoothquant": {"transforms": [_ROTATION, _SMOOTHQUANT]},
    "awq": {"transforms": [_AWQ]},
}


def _automatic(preset: Preset, *names: str, corrected: bool = False) -> Preset:
    """A setting that leaves a choice among methods."""
    correction = {"rules": [{"correction": "auto"}]} if corrected else {}
    choose = [{"name": name} | _ALTERNATIVES[name] | correction for name in names]
    return {"rules": preset["rules"], "choose": choose}


# Few, for each takes its time: those that were the best on some model. At 8 bits moved scale loses
# no more than no transform at all anywhere, for edges that it does not help are left alone.
AUTOMATIC: dict[str, Preset] = {
    "auto-w4a16": _automatic(_W4A16, "plain", "rotation", "awq", corrected=True),
    "auto-w3a16": _automatic(_W3A16, "plain", "rotation", "awq", corrected=True),
    "auto-w4a8": _automatic(_W4A8, "plain", "rotation", "smoothquant", "awq", corrected=True),
    "auto-w8a8": _automatic(_W8A8, "smoothquant", "rotation", "rotation-smoothquant"),
    "auto-w8a8-static": _automatic(_W8A8_STATIC, "smoothquant", "rotation-smoothquant"),
}
"""Recipes that leave a choice of method."""

NAMED: dict[str, Preset] = PRESETS | AUTOMATIC
"""All recipes with a name."""


def preset_yaml(name: str) -> str:
    """A preset as a YAML file, in the words it is written in."""
    return write_yaml({"version": 1, "name": name, **NAMED[name]})
