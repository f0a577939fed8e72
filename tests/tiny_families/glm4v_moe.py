"""GLM-4.5V: a dense block, one of experts and a shared one, under the pictures of GLM-4.1V."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import glm4v

TOKENS = glm4v.TOKENS
SPARSE = SLOW = True


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Its configuration and its processor."""
    config, processor = glm4v.make(transformers, tokenizer)
    values = config.to_dict()
    del values["model_type"]
    values["vision_config"].pop("model_type")
    values["text_config"] |= {
        "model_type": "glm4v_moe_text",
        "head_dim": tiny_vlm.HIDDEN // tiny_vlm.HEADS,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    return transformers.Glm4vMoeConfig(**values), processor
