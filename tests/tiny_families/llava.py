"""LLaVA 1.5: features of a CLIP tower, from the block before the last."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

TOKENS = {"image_token": "<image>"}


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        text_config=parts.text(tokenizer) | {"model_type": "llama"},
        vision_config=parts.square_vision("clip_vision_model"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=parts.PATCHES,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": parts.SIDE}, crop_size=parts.SQUARE
        ),
        tokenizer=tokenizer,
        patch_size=tiny_vlm.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny_vlm.chat_template("<image>", "<video>"),
    )
    return config, processor
