"""InternVL3 in transformers' layout."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

# Of pictures, in pixels; a patch has four on each side.
_SIDE = 32
_SEEN = (_SIDE // 8) ** 2
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    size = {"height": _SIDE, "width": _SIDE}
    config = transformers.InternVLConfig(
        text_config=parts.text(tokenizer),
        vision_config=parts.vision()
        | {"image_size": [_SIDE] * 2, "patch_size": [tiny_vlm.PATCH] * 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=_SEEN,
        tie_word_embeddings=False,
    )
    tokenizer.chat_template = tiny_vlm.chat_template("<IMG_CONTEXT>", "<video>")
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        video_processor=transformers.InternVLVideoProcessor(size=size),
        tokenizer=tokenizer,
        image_seq_length=_SEEN,
        chat_template=tokenizer.chat_template,
    )
    return config, processor
