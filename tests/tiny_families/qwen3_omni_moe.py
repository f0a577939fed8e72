"""The thinker of Qwen3-Omni, which has ears and experts."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts
from tiny_families.qwen2_5_omni import MELS, PATCH, TOKENS, processor, token_ids

__all__ = ["SLOW", "SPARSE", "TOKENS", "make"]
SPARSE = SLOW = True


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 6, 6],
        "mrope_interleaved": True,
    }
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config=parts.text(tokenizer)
        | {
            "model_type": "qwen3_omni_moe_text",
            "head_dim": tiny_vlm.HIDDEN // tiny_vlm.HEADS,
            "rope_parameters": rope,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
        },
        vision_config={
            "depth": 2,
            "hidden_size": tiny_vlm.HIDDEN,
            "intermediate_size": tiny_vlm.INTERMEDIATE,
            "num_heads": tiny_vlm.HEADS,
            "patch_size": PATCH,
            "out_hidden_size": tiny_vlm.HIDDEN,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        audio_config={
            "d_model": tiny_vlm.HIDDEN,
            "encoder_layers": 2,
            "encoder_attention_heads": tiny_vlm.HEADS,
            "encoder_ffn_dim": tiny_vlm.INTERMEDIATE,
            "output_dim": tiny_vlm.HIDDEN,
            "num_mel_bins": MELS,
            "downsample_hidden_size": 32,
        },
        tie_word_embeddings=False,
        **token_ids(tokenizer),
    )
    return config, processor(transformers, transformers.Qwen3OmniMoeProcessor, tokenizer)
