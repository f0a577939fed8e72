"""Gemma 3 that sees: norms of one plus a weight on both sides, a projector of one bare matrix."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

SLOW = True
TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
_SIDE, _TOKENS = 32, 16


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Its configuration and its processor."""
    begin, end, soft = tokenizer.convert_tokens_to_ids([*TOKENS.values()])
    text = parts.text(tokenizer) | {
        "model_type": "gemma3_text",
        "head_dim": tiny_vlm.HIDDEN // tiny_vlm.HEADS,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "bos_token_id": None,
    }
    vision = parts.vision() | {
        "model_type": "siglip_vision_model",
        "image_size": _SIDE,
        "patch_size": tiny_vlm.PATCH,
        "vision_use_head": False,
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=_TOKENS,
        boi_token_index=begin,
        eoi_token_index=end,
        image_token_index=soft,
        tie_word_embeddings=False,
    )
    tokenizer.chat_template = tiny_vlm.chat_template("<start_of_image>", "")
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": _SIDE, "width": _SIDE}),
        tokenizer=tokenizer,
        image_seq_length=_TOKENS,
        chat_template=tokenizer.chat_template,
    )
    return config, processor
