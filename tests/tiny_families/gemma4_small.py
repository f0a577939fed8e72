"""The small models of Gemma 4: ears, inputs of each block, blocks that share keys and values."""

from __future__ import annotations

from typing import Any

import tiny_vlm
import torch

from tiny_families import gemma4

ARCH = "gemma4"
BLOCKS = 4
SLOW = True
TOKENS = gemma4.TOKENS
_SOUND = {"hidden_size": tiny_vlm.HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4}


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Its configuration and its processor."""
    config = transformers.Gemma4Config(
        text_config=gemma4.text(tokenizer)
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": tiny_vlm.VOCABULARY,
        },
        vision_config=gemma4.vision() | {"use_clipped_linears": True},
        audio_config=_SOUND | {"output_proj_dims": tiny_vlm.HIDDEN},
        tie_word_embeddings=False,
        **gemma4.token_ids(tokenizer),
    )
    return config, gemma4.processor(transformers, tokenizer)


def finish(model: Any) -> None:
    """Bounds between which layers of the towers clip what they read and put out."""
    for name, bound in model.named_buffers():
        if name.endswith(("_min", "_max")) and torch.isinf(bound):
            bound.fill_(-2.0 if name.endswith("_min") else 2.0)
