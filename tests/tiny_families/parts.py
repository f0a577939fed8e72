"""Parts of configurations that several families share."""

from __future__ import annotations

from typing import Any

import tiny_vlm

# Of square pictures, in pixels; a patch has four on each side.
SIDE = 32
SQUARE = {"height": SIDE, "width": SIDE}
PATCHES = (SIDE // tiny_vlm.PATCH) ** 2


def text(tokenizer: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": tiny_vlm.VOCABULARY,
        "hidden_size": tiny_vlm.HIDDEN,
        "intermediate_size": tiny_vlm.INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": tiny_vlm.HEADS,
        "num_key_value_heads": tiny_vlm.KV_HEADS,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def vision() -> dict[str, Any]:
    return {
        "hidden_size": tiny_vlm.HIDDEN,
        "intermediate_size": tiny_vlm.INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": tiny_vlm.HEADS,
    }


def square_vision(model_type: str) -> dict[str, Any]:
    """A tower of pictures of one size."""
    sizes = {"image_size": SIDE, "patch_size": tiny_vlm.PATCH}
    return {"model_type": model_type, **vision(), **sizes}
