"""Recipes of other tools' documented examples, retyped, each with a family that it is about."""

from __future__ import annotations

from typing import Any

_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
_INT4_CHANNEL = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
}
_INT8_TOKEN = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}
_PROJECTIONS = [f"re:.*{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
_W4A8_DICT: dict[str, Any] = {
    "*weight_quantizer": {"num_bits": 4, "axis": 0, "narrow_range": True, "enable": True},
    "*input_quantizer": {
        "num_bits": 8,
        "type": "dynamic",
        "block_sizes": {-1: None},
        "narrow_range": True,
    },
    "default": {"enable": False},
}
_AUTHORS_IGNORED = {
    name: {"enable": False} for name in ("*lm_head*", "*visual*", "*vpm*", "*resampler*")
}
_MI = {"device": "cuda", "offload": "cpu", "skip_layers": ["lm_head"]}
_MI_SIGNS = {"w_has_zero": False, "a_has_zero": False, "w_unsign": True, "a_unsign": True}
_MQUANT = (
    "python exam/quant_qwen2vl.py --model_name Qwen2-VL-7B-Instruct --quant --quant_llm "
    "--quant_visual_clip --quant_cross_attention --rotate --rotate_visual_clip "
    "--rotate_visual_cross_attn --rotate_llm --online_visual_hadamard --online_llm_hadamard "
    "--visual_w_clip --llm_w_clip --visual_static --llm_static --act_order --visual_split "
    "--llm_w_bits 4 --visual_a_bits 8 --llm_a_bits 8 "
)


def _stage(**modifiers: Any) -> dict[str, Any]:
    return {"quant_stage": {"quant_modifiers": modifiers}}


def _mi(algo: str, calibrate: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    config = {"algo": algo, "kwargs": kwargs | _MI}
    return {"quant_config": config | ({"calibrate_config": calibrate} if calibrate else {})}


_LINEAR = {"targets": "Linear", "ignore": ["lm_head"]}
EXAMPLES: dict[str, tuple[str, Any]] = {
    "llm-compressor: w4a16, GPTQ": ("llama", _stage(GPTQModifier=_LINEAR | {"scheme": "W4A16"})),
    "llm-compressor: w8a8, SmoothQuant and GPTQ": (
        "llama",
        _stage(
            SmoothQuantModifier={"smoothing_strength": 0.8},
            GPTQModifier=_LINEAR | {"scheme": "W8A8"},
        ),
    ),
    "llm-compressor: fp8, dynamic": (
        "llama",
        _stage(QuantizationModifier=_LINEAR | {"scheme": "FP8_DYNAMIC"}),
    ),
    "llm-compressor: nvfp4": (
        "llama",
        _stage(QuantizationModifier=_LINEAR | {"scheme": "NVFP4"}),
    ),
    "llm-compressor: awq, asymmetric": (
        "llama",
        _stage(AWQModifier=_LINEAR | {"scheme": "W4A16_ASYM"}),
    ),
    "llm-compressor: fp8 with a cache": (
        "llama",
        _stage(
            QuantizationModifier={
                "ignore": ["lm_head"],
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": _FP8,
                        "input_activations": _FP8,
                    }
                },
                "kv_cache_scheme": _FP8,
            }
        ),
    ),
    "llm-compressor: qwen2_vl, w4a16": (
        "qwen2_vl",
        {
            "recipe": _stage(
                GPTQModifier={
                    "targets": "Linear",
                    "scheme": "W4A16",
                    "ignore": ["lm_head", "re:visual.*", "re:model.visual.*"],
                }
            ),
            "max_seq_length": 2048,
            "num_calibration_samples": 512,
            "sequential_targets": ["Qwen2VLDecoderLayer"],
        },
    ),
    "llm-compressor: qwen3_vl, w4a8": (
        "qwen3_vl",
        _stage(
            QuantizationModifier={
                "ignore": ["lm_head", "vpm", "resampler.*"],
                "config_groups": {
                    "group_0": {
                        "targets": _PROJECTIONS,
                        "weights": _INT4_CHANNEL,
                        "input_activations": _INT8_TOKEN,
                    }
                },
            }
        ),
    ),
    **{
        f"modelopt: {name}": ("qwen2_5_vl", name)
        for name in (
            *("INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG"),
            *("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "MXFP4_DEFAULT_CFG"),
        )
    },
    "modelopt: w4a8, word for word": (
        "qwen3_vl",
        {"quant_cfg": _W4A8_DICT, "algorithm": "max"},
    ),
    "modelopt: w4a8, with its author's ignore list": (
        "qwen3_vl",
        {"quant_cfg": _W4A8_DICT | _AUTHORS_IGNORED, "algorithm": "max"},
    ),
    "mi-optimize: rtn": (
        "llama",
        _mi(
            "rtn",
            {"name": "ptb", "split": "train", "nsample": 1, "seqlen": 2048},
            w_dtype="int8",
            a_dtype="int8",
            w_groupsize=-1,
            a_groupsize=-1,
            **{"a_qtype": "per_tensor", "w_qtype": "per_channel", **_MI_SIGNS},
            quantization_type="static",
            block_sequential=True,
            layer_sequential=True,
        ),
    ),
    "mi-optimize: gptq": (
        "llama",
        _mi(
            "gptq",
            {"name": "wikitext2", "split": "train", "nsamples": 64, "seqlen": 2048, "seed": 42},
            w_dtype="int4",
            a_dtype="float16",
            blocksize=128,
            percdamp=0.01,
            actorder=True,
            w_groupsize=-1,
            w_qtype="per_channel",
            block_sequential=True,
            layer_sequential=True,
        ),
    ),
    "mi-optimize: smoothquant": (
        "llama",
        _mi(
            "smoothquant",
            w_dtype="int4",
            a_dtype="int8",
            w_groupsize=128,
            alpha=0.5,
            w_qtype="per_channel",
            a_qtype="per_token",
            quant_out=False,
        ),
    ),
    "mi-optimize: zeroquant": (
        "qwen2",
        _mi(
            "zeroquant",
            w_dtype="int8",
            a_dtype="int8",
            w_groupsize=128,
            a_groupsize=-1,
            **{"a_qtype": "per_token", "w_qtype": "per_group", **_MI_SIGNS},
            quantization_type="dynamic",
            block_sequential=True,
        ),
    ),
    "mquant: vision W8A8, language W4A8": ("qwen2_vl", f"{_MQUANT} --visual_w_bits 8"),
    "mquant: both W4A8": (
        "qwen2_vl",
        f"{_MQUANT} --visual_w_bits 4 --dataset_name OCRBench --nsamples 128 --calib_num 128",
    ),
    "mquant: VideoLLaMA3, weights alone": (
        "video_llama_3",
        "--quant --quant_visual_clip --quant_visual_projector --quant_llm --visual_w_bits 4 "
        "--llm_w_bits 4 --visual_a_bits 16 --llm_a_bits 16 --w_groupsize 128 --act_order",
    ),
}
"""Family and recipe by the tool's name and the example's."""
