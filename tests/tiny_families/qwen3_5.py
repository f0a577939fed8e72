"""Qwen3.5: a block of linear attention, one of gated attention, and layers that draft tokens."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

TOKENS: dict[str, str] = {}
# Tensors of released checkpoints that no class of transformers has.
DROPPED: dict[str, tuple[int, ...]] = {
    "mtp.fc.weight": (tiny_vlm.HIDDEN, 2 * tiny_vlm.HIDDEN),
    "mtp.norm.weight": (tiny_vlm.HIDDEN,),
}


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Its configuration and its processor."""
    config = transformers.Qwen3_5Config(**values(transformers, tokenizer, "qwen3_5_text"))
    return config, parts.qwen_processor(transformers, tokenizer)


def values(transformers: Any, tokenizer: Any, model_type: str, **text: Any) -> dict[str, Any]:
    """Values of a configuration, with more of its language model's."""
    found: dict[str, Any] = tiny_vlm.config_of("qwen3_vl", transformers).to_dict()
    del found["model_type"]
    for key in ("model_type", "deepstack_visual_indexes"):
        found["vision_config"].pop(key)
    found["text_config"] = parts.text(tokenizer) | {
        "model_type": model_type,
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
        **text,
    }
    return found
