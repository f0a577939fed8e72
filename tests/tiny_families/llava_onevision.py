"""LLaVA-OneVision: crops of a picture beside it, and clips, through a SigLIP tower."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

SLOW = True
TOKENS = {"image_token": "<image>", "video_token": "<video>"}


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.LlavaOnevisionConfig(
        text_config=parts.text(tokenizer),
        vision_config=parts.square_vision("siglip_vision_model") | {"vision_use_head": False},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=parts.GRIDS,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=parts.SQUARE, image_grid_pinpoints=parts.GRIDS
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=parts.SQUARE),
        tokenizer=tokenizer,
        num_image_tokens=parts.PATCHES,
        vision_feature_select_strategy="full",
        chat_template=tiny_vlm.chat_template("<image>", "<video>"),
    )
    return config, processor
