"""Qwen3.5 with experts, and one that is shared, in blocks of linear and of gated attention."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

TOKENS: dict[str, str] = {}
# Blocks are those of the dense family, and experts those of another.
SPARSE = SLOW = True


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Its configuration and its processor."""
    values = tiny_vlm.config_of("qwen3_vl", transformers).to_dict()
    del values["model_type"]
    for key in ("model_type", "deepstack_visual_indexes"):
        values["vision_config"].pop(key)
    values["text_config"] = parts.text(tokenizer) | {
        "model_type": "qwen3_5_moe_text",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "head_dim": tiny_vlm.HIDDEN // tiny_vlm.HEADS,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
    }
    start, end = "<|vision_start|>", "<|vision_end|>"
    pads = (f"{start}<|{kind}_pad|>{end}" for kind in ("image", "video"))
    tokenizer.chat_template = tiny_vlm.chat_template(*pads)
    processor = tiny_vlm.processor_of("qwen3_vl", transformers, tokenizer)
    return transformers.Qwen3_5MoeConfig(**values), processor
