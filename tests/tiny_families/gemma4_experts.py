"""Gemma 4 with experts beside the MLP of each block."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import gemma4

ARCH = "gemma4"
SPARSE = SLOW = True
TOKENS = gemma4.TOKENS


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Its configuration and its processor."""
    config = transformers.Gemma4Config(
        text_config=gemma4.text(tokenizer)
        | {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": tiny_vlm.INTERMEDIATE,
        },
        vision_config=gemma4.vision() | {"standardize": True},
        audio_config=None,
        tie_word_embeddings=False,
        **gemma4.token_ids(tokenizer),
    )
    return config, gemma4.processor(transformers, tokenizer)
