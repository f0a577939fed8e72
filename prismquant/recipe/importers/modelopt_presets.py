"""Configurations that ModelOpt knows by name, entry by entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Entry = dict[str, Any]

_NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
_NVFP4_STATIC = {
    "num_bits": (2, 1),
    "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)},
}
_FOUR_OVER_SIX = {
    "num_bits": (2, 1),
    "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3), "four_over_six": True},
}
_NVFP4_32 = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (4, 3)}}
_FP8 = {"num_bits": (4, 3), "axis": None}
_INT4 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
_INT8_ROWS = {"num_bits": 8, "axis": 0}
_INT8 = {"num_bits": 8, "axis": None}

DISABLED_LAYERS = (
    "*block_sparse_moe.gate*",
    "*linear_attn.conv1d*",
    "*self_attention.conv1d*",
    "*linear_attn.in_proj_a*",
    "*linear_attn.in_proj_b*",
    "*lm_head*",
    "*mixer.conv1d*",
    "*mlp.gate.*",
    "*mlp.shared_expert_gate.*",
    "*output_layer*",
    "*proj_out.*",
    "*router*",
    "mtp.*",
    "output.*",
    "*embed_vision*",
    "*vision_tower*",
    "*visual*",
    "*vision_model*",
    "*multi_modal_projector*",
)
"""Layers that every named configuration leaves alone."""

_DISABLED_CLASSES = (
    "nn.BatchNorm1d",
    "nn.BatchNorm2d",
    "nn.BatchNorm3d",
    "nn.LeakyReLU",
    "nn.Embedding",
)
_MLP = (
    "*mlp*",
    "*.mixer.up_proj.",
    "*.mixer.down_proj.",
    "*block_sparse_moe*",
    "*.experts.*",
)


DEFAULT_DISABLED: list[Entry] = [
    *({"quantizer_name": name, "enable": False} for name in DISABLED_LAYERS),
    *({"quantizer_name": "*", "parent_class": name, "enable": False} for name in _DISABLED_CLASSES),
]
"""Entries that end every named configuration."""

MAMBA_MOE_DISABLED: list[Entry] = [
    {"quantizer_name": name, "enable": False}
    for name in (
        *("*fc1_latent_proj*", "*fc2_latent_proj*", "*q_proj*", "*k_proj*", "*v_proj*"),
        *("*o_proj*", "*self_attention.linear_qkv*", "*self_attention.linear_proj*"),
    )
]
"""Entries of hybrids of attention and state spaces, whose attention stays in floating point."""
_CONSERVATIVE: list[Entry] = [
    {"quantizer_name": name, "enable": False} for name in ("*mixer.in_proj*", "*mixer.out_proj*")
]


def _mx(bits: Any) -> Entry:
    return {"num_bits": bits, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}


def _config(
    weights: Any,
    inputs: Any,
    algorithm: Any,
    parts: tuple[str, ...] = ("*",),
    more: Sequence[Entry] = (),
) -> Entry:
    entries: list[Entry] = [{"quantizer_name": "*", "enable": False}]
    for part in parts:
        entries.append({"quantizer_name": f"{part}weight_quantizer", "cfg": weights})
        if inputs is not None:
            entries.append({"quantizer_name": f"{part}input_quantizer", "cfg": inputs})
        elif part == "*":
            entries.append({"quantizer_name": "*input_quantizer", "enable": False})
    return {"quant_cfg": [*entries, *DEFAULT_DISABLED, *more], "algorithm": algorithm}


_BLOCK = {"num_bits": (4, 3), "axis": None, "block_sizes": {-1: 128, -2: 128}}
_TOKEN = {"num_bits": (4, 3), "axis": None, "type": "dynamic", "block_sizes": {-1: None}}
_FULL = {"method": "awq_full", "alpha_step": 0.1}
_LITE = {"method": "awq_lite", "alpha_step": 0.1}
_SWEEP = {"method": "mse", "fp8_scale_sweep": True}
_HESSIAN = {"method": "local_hessian", "fp8_scale_sweep": True}
_SIXTH = {
    "method": "mse",
    "fp8_scale_sweep": False,
    "start_multiplier": 1.0,
    "stop_multiplier": 1.5,
    "step_size": 0.5,
}
_HYBRID = [*MAMBA_MOE_DISABLED, *_CONSERVATIVE]
_EXPERTS = ("*block_sparse_moe*", "*.experts.*")

PRESETS: Mapping[str, Entry] = {
    "INT8_DEFAULT_CFG": _config(_INT8_ROWS, _INT8, "max"),
    "INT8_SMOOTHQUANT_CFG": _config(_INT8_ROWS, _INT8, "smoothquant"),
    "INT8_WEIGHT_ONLY_CFG": _config(_INT8_ROWS, None, "max"),
    "INT4_AWQ_CFG": _config(_INT4, None, _LITE),
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": _config(_INT4, None, "max"),
    "W4A8_AWQ_BETA_CFG": _config([_INT4, _FP8], _FP8, "awq_lite"),
    "FP8_DEFAULT_CFG": _config(_FP8, _FP8, "max"),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": _config({"num_bits": (4, 3), "axis": 0}, _TOKEN, "max"),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": _config(_BLOCK, None, "max"),
    "NVFP4_DEFAULT_CFG": _config(_NVFP4, _NVFP4, "max"),
    "NVFP4_AWQ_LITE_CFG": _config(_NVFP4, _NVFP4, "awq_lite"),
    "NVFP4_AWQ_CLIP_CFG": _config(_NVFP4, _NVFP4, {"method": "awq_clip"}),
    "NVFP4_AWQ_FULL_CFG": _config(_NVFP4, _NVFP4, _FULL),
    "NVFP4_SVDQUANT_DEFAULT_CFG": _config(_NVFP4, _NVFP4, {"method": "svdquant", "lowrank": 32}),
    "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG": _config(_NVFP4_STATIC, _NVFP4, _SWEEP),
    "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG": _config(_NVFP4_STATIC, _NVFP4, _HESSIAN),
    "NVFP4_FOUR_OVER_SIX_CFG": _config(_FOUR_OVER_SIX, _NVFP4, _SIXTH),
    "NVFP4_MLP_ONLY_CFG": _config(_NVFP4, _NVFP4, "max", _MLP),
    "NVFP4_EXPERTS_ONLY_CFG": _config(_NVFP4, _NVFP4, "max", _EXPERTS),
    "NVFP4_OMLP_ONLY_CFG": _config(_NVFP4, _NVFP4, "max", ("*o_proj*", *_MLP)),
    "NVFP4_MLP_WEIGHT_ONLY_CFG": _config(_NVFP4_32, None, "max", ("*mlp*", "*block_sparse_moe*")),
    "W4A16_NVFP4_CFG": _config(_NVFP4, None, "max"),
    "W4A8_NVFP4_FP8_CFG": _config(_NVFP4_32, _FP8, "max"),
    "MXFP4_DEFAULT_CFG": _config(_mx((2, 1)), _mx((2, 1)), None),
    "MXFP4_MLP_WEIGHT_ONLY_CFG": _config(_mx((2, 1)), None, None, ("*mlp*", "*block_sparse_moe*")),
    "MXFP6_DEFAULT_CFG": _config(_mx((3, 2)), _mx((3, 2)), None),
    "MXFP8_DEFAULT_CFG": _config(_mx((4, 3)), _mx((4, 3)), None),
    "MXINT8_DEFAULT_CFG": _config(_mx(8), _mx(8), None),
    "W4A8_MXFP4_FP8_CFG": _config(_mx((2, 1)), _FP8, None),
    "MAMBA_MOE_FP8_AGGRESSIVE_CFG": _config(_FP8, _FP8, "max", more=MAMBA_MOE_DISABLED),
    "MAMBA_MOE_FP8_CONSERVATIVE_CFG": _config(_FP8, _FP8, "max", more=_HYBRID),
    "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG": _config(_NVFP4, _NVFP4, "max", more=MAMBA_MOE_DISABLED),
    "MAMBA_MOE_NVFP4_CONSERVATIVE_CFG": _config(_NVFP4, _NVFP4, "max", more=_HYBRID),
    "FP8_KV_CFG": {"quant_cfg": [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": _FP8}]},
    "NVFP4_KV_CFG": {"quant_cfg": [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": _NVFP4}]},
}
"""Named configurations."""
