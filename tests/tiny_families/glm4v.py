"""GLM-4.1V: one fused layer for gate and up, norms on both sides of attention and MLP."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

_MARKS = tuple(f"<|{side}_of_{kind}|>" for kind in ("image", "video") for side in ("begin", "end"))
SLOW = True
TOKENS = {f"{mark[2:-2]}_token": mark for mark in (*_MARKS, "<|image|>", "<|video|>")}


def make(transformers: Any, tokenizer: Any, name: str = "Glm4v") -> tuple[Any, Any]:
    """Its configuration and its processor, or those of a family with the same towers."""
    ids = [*_MARKS, "<|image|>", "<|video|>"]
    names = [f"{kind}_{side}" for kind in ("image", "video") for side in ("start", "end")]
    keys = [f"{name}_token_id" for name in (*names, "image", "video")]
    text = parts.text(tokenizer) | {
        "model_type": "glm4v_text",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 6, 6],
            "partial_rotary_factor": 1.0,
        },
    }
    vision = parts.vision() | {
        "depth": 2,
        "num_heads": tiny_vlm.HEADS,
        "image_size": 32,
        "patch_size": tiny_vlm.PATCH,
        "out_hidden_size": tiny_vlm.HIDDEN,
    }
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        **dict(zip(keys, tokenizer.convert_tokens_to_ids(ids), strict=True)),
    )
    tokenizer.chat_template = tiny_vlm.chat_template(
        "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
    )
    pixels = {"patch_size": tiny_vlm.PATCH, "size": {"shortest_edge": 64, "longest_edge": 128**2}}
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=getattr(transformers, f"{name}ImageProcessor")(**pixels),
        video_processor=getattr(transformers, f"{name}VideoProcessor")(**pixels),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return config, processor
