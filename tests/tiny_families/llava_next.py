"""LLaVA-NeXT: as LLaVA 1.5, with crops of a picture beside it, as many as its shape asks for."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

TOKENS = {"image_token": "<image>"}

SLOW = True


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.LlavaNextConfig(
        text_config=parts.text(tokenizer) | {"model_type": "llama"},
        vision_config=parts.square_vision("clip_vision_model"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=parts.GRIDS,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": parts.SIDE},
            crop_size=parts.SQUARE,
            image_grid_pinpoints=parts.GRIDS,
        ),
        tokenizer=tokenizer,
        patch_size=tiny_vlm.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny_vlm.chat_template("<image>", "<video>"),
    )
    return config, processor
