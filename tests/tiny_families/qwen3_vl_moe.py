"""Qwen3-VL with experts in every block."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

SPARSE = True
TOKENS: dict[str, str] = {}


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = tiny_vlm.config_of("qwen3_vl", transformers)
    text = config.text_config.to_dict() | {
        "model_type": "qwen3_vl_moe_text",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,  # transformers always does, vLLM asks
        "moe_intermediate_size": 128,
    }
    values = config.to_dict() | {"text_config": text}
    del values["model_type"]
    values["vision_config"].pop("model_type")
    processor = parts.qwen_processor(transformers, tokenizer)
    return transformers.Qwen3VLMoeConfig(**values), processor
