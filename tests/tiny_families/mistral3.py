"""Mistral Small 3: pictures of any size, padded to the largest, through a Pixtral tower."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

SLOW = True
TOKENS = {
    "image_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.Mistral3Config(
        text_config=parts.text(tokenizer)
        | {"model_type": "mistral", "head_dim": tiny_vlm.HIDDEN // tiny_vlm.HEADS},
        vision_config=parts.square_vision("pixtral") | {"image_size": 2 * parts.SIDE},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(
            size={"longest_edge": parts.SIDE}, patch_size=tiny_vlm.PATCH
        ),
        tokenizer=tokenizer,
        patch_size=tiny_vlm.PATCH,
        spatial_merge_size=2,
        chat_template=tiny_vlm.chat_template("[IMG]", "<video>"),
    )
    return config, processor
