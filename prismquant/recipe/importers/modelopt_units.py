"""Parts of configurations that ModelOpt brings along, by the path that an import names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prismquant.recipe.importers.modelopt_presets import (
    DEFAULT_DISABLED,
    MAMBA_MOE_DISABLED,
    PRESETS,
)


def _blocks(bits: str, size: int, scale: str, kind: str = "dynamic") -> dict[str, Any]:
    return {"num_bits": bits, "block_sizes": {-1: size, "type": kind, "scale_bits": scale}}


_FP8 = {"num_bits": "e4m3", "axis": None}
_NVFP4 = _blocks("e2m1", 16, "e4m3")
_FOUR_OVER_SIX: dict[str, Any] = {
    "num_bits": "e2m1",
    "block_sizes": {-1: 16, "type": "static", "scale_bits": "e4m3", "four_over_six": True},
}
_NUMBERS: Mapping[str, dict[str, Any]] = {
    "fp8": _FP8,
    "int4_per_block": {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
    "int8": {"num_bits": 8, "axis": None},
    "int8_per_channel": {"num_bits": 8, "axis": 0},
    "mxfp4": _blocks("e2m1", 32, "e8m0"),
    "mxfp6": _blocks("e3m2", 32, "e8m0"),
    "mxfp8": _blocks("e4m3", 32, "e8m0"),
    "mxint8": {"num_bits": 8} | {"block_sizes": _blocks("", 32, "e8m0")["block_sizes"]},
    "nvfp4": _NVFP4,
    "nvfp4_bs32": _blocks("e2m1", 32, "e4m3"),
    "nvfp4_four_over_six": _FOUR_OVER_SIX,
    "nvfp4_static": _blocks("e2m1", 16, "e4m3", "static"),
}


def _entries(cfg: Mapping[str, Any], *patterns: str) -> list[dict[str, Any]]:
    return [{"quantizer_name": pattern, "cfg": dict(cfg)} for pattern in patterns]


def _both(cfg: Mapping[str, Any], *layers: str) -> list[dict[str, Any]]:
    kinds = ("weight_quantizer", "input_quantizer")
    return [one for layer in layers for kind in kinds for one in _entries(cfg, f"{layer}{kind}")]


_KEYS_AND_VALUES = "*[kv]_bmm_quantizer"
_AFFINE = {"bias": {-2: None, -4: None, "type": "static"}}
_ATTENTION = ("*[qkv]_bmm_quantizer", "*softmax_quantizer", "*p_bmm_quantizer")
_UNITS: Mapping[str, Any] = {
    "attention_qkv_fp8": _entries(_FP8, *_ATTENTION),
    "base_disable_all": {"quantizer_name": "*", "enable": False},
    "block_sparse_moe_nvfp4": _both(_NVFP4, "*block_sparse_moe*"),
    "default_disabled_quantizers": DEFAULT_DISABLED,
    "experts_nvfp4": _both(_NVFP4, "*.experts.*"),
    "kv_fp8": _entries(_FP8, _KEYS_AND_VALUES),
    "kv_fp8_affine": [
        *_entries(_FP8, _KEYS_AND_VALUES),
        *_entries(_FP8 | _AFFINE, _KEYS_AND_VALUES),
    ],
    "kv_fp8_cast": _entries(_FP8 | {"use_constant_amax": True}, _KEYS_AND_VALUES),
    "kv_nvfp4": _entries(_NVFP4, _KEYS_AND_VALUES),
    "kv_nvfp4_affine": [
        *_entries(_NVFP4, _KEYS_AND_VALUES),
        *_entries(_NVFP4 | _AFFINE, _KEYS_AND_VALUES),
    ],
    "kv_nvfp4_cast": _entries(_NVFP4 | {"use_constant_amax": True}, _KEYS_AND_VALUES),
    "kv_nvfp4_rotate": [
        {"quantizer_name": "*q_bmm_quantizer", "cfg": {"rotate": True}, "enable": False},
        *_entries(_NVFP4 | {"rotate": True}, "*k_bmm_quantizer"),
        *_entries(_NVFP4, "*v_bmm_quantizer"),
    ],
    "mamba_moe_disabled_quantizers": MAMBA_MOE_DISABLED,
    "mixer_mlp_nvfp4": _both(_NVFP4, "*.mixer.up_proj.", "*.mixer.down_proj."),
    "w4_nvfp4": _entries(_NVFP4, "*weight_quantizer"),
    "w4a4_nvfp4_nvfp4": _both(_NVFP4, "*"),
    "w4a4_nvfp4_nvfp4_four_over_six": [
        *_entries(_FOUR_OVER_SIX, "*weight_quantizer"),
        *_entries(_NVFP4, "*input_quantizer"),
    ],
    "w8a8_fp8_fp8": _both(_FP8, "*"),
}
_LEFT_IN_A_SEARCH = (
    *("*block_sparse_moe.gate*", "*linear_attn.conv1d*", "*self_attention.conv1d*"),
    *("*linear_attn.in_proj_a*", "*linear_attn.in_proj_b*", "*mixer.conv1d*", "*mlp.gate.*"),
    *("*mlp.shared_expert_gate.*", "*output_layer*", "*proj_out.*", "*router*", "output.*"),
    *("*embed_vision*", "*vision_tower*", "*visual*", "*shared_expert_gate*"),
)
_SEARCHES: Mapping[str, list[str]] = {
    "base_disabled_layers": list(_LEFT_IN_A_SEARCH),
    "base_cost_excluded_layers": ["*visual*", "*mtp*", "*vision_tower*"],
}
# Names of files that are not those of the configurations in lower case, less their ending.
_DEFAULTS = ("fp8", "int8", "nvfp4", "mxfp4", "mxfp6", "mxfp8", "mxint8", "nvfp4_svdquant")
_FILES = {f"{name}_default": name for name in _DEFAULTS}


def _file(name: str) -> str:
    short = name.removesuffix("_CFG").lower()
    return _FILES.get(short, short)


UNITS: Mapping[str, Any] = {
    **{f"configs/numerics/{name}": one for name, one in _NUMBERS.items()},
    **{f"configs/ptq/units/{name}": one for name, one in _UNITS.items()},
    **{
        f"configs/ptq/presets/model/{_file(name)}": one
        for name, one in PRESETS.items()
        if not name.endswith("KV_CFG")
    },
    **{
        f"configs/ptq/presets/kv/{name.removeprefix('kv_')}": {"quant_cfg": one}
        for name, one in _UNITS.items()
        if name.startswith("kv_")
    },
    **{f"configs/auto_quantize/units/{name}": one for name, one in _SEARCHES.items()},
}
"""Entries, attributes, configurations and lists of layers, by path."""
