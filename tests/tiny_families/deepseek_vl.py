"""DeepSeek-VL: a SigLIP tower, of which the pooling head stands idle."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

TOKENS = {"image_token": "<image_placeholder>"}

SLOW = True


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.DeepseekVLConfig(
        text_config=parts.text(tokenizer) | {"model_type": "llama"},
        vision_config=parts.square_vision("siglip_vision_model"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    processor = transformers.DeepseekVLProcessor(
        image_processor=transformers.DeepseekVLImageProcessor(size=parts.SQUARE, min_size=4),
        tokenizer=tokenizer,
        num_image_tokens=parts.PATCHES,
        chat_template=tiny_vlm.chat_template("<image_placeholder>", "<video>"),
    )
    return config, processor
