"""Llama 4: a block of experts after a dense one, to which tokens are dealt, times their scores."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

TOKENS = {
    "image_token": "<|image|>",
    "start_of_image_token": "<|image_start|>",
    "end_of_image_token": "<|image_end|>",
    "patch_token": "<|patch|>",
    "tile_x_separator_token": "<|tile_x_separator|>",
    "tile_y_separator_token": "<|tile_y_separator|>",
}
SPARSE = SLOW = True
# So large that servers can pack a patch: four patches on each side of a picture.
_PATCH = 8
_WIDE = 4 * tiny_vlm.HIDDEN


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Its configuration and its processor."""
    config = transformers.Llama4Config(
        text_config=parts.text(tokenizer)
        | {
            "model_type": "llama4_text",
            "head_dim": tiny_vlm.HIDDEN // tiny_vlm.HEADS,
            "intermediate_size": 128,
            "intermediate_size_mlp": tiny_vlm.INTERMEDIATE,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            # The second block sees all tokens, and knows no positions.
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 8,
            "floor_scale": 4,
            "bos_token_id": None,
        },
        vision_config=parts.vision()
        | {
            "image_size": parts.SIDE,
            "patch_size": _PATCH,
            "intermediate_size": _WIDE,
            "projector_input_dim": tiny_vlm.HIDDEN,
            "projector_output_dim": tiny_vlm.HIDDEN,
            "vision_output_dim": tiny_vlm.HIDDEN,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(TOKENS["patch_token"]),
        boi_token_index=tokenizer.convert_tokens_to_ids(TOKENS["start_of_image_token"]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(TOKENS["end_of_image_token"]),
    )
    processor = transformers.Llama4Processor(
        image_processor=transformers.Llama4ImageProcessor(size=parts.SQUARE, max_patches=4),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        chat_template=tiny_vlm.chat_template("<|image|>", "<video>"),
    )
    return config, processor


def finish(model: Any) -> None:
    """Leave out frequencies: they are complex, which no cast keeps, and are not stored."""
    del model.vision_model.rotary_embedding.freqs_ci
