"""Gemma 4, dense: keys that stand for values, norms on both sides, wrapped layers."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

TOKENS = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
    "video_token": "<|video|>",
}
# So large that a patch has as many numbers as servers can pack.
PATCH = 8
_HEAD = tiny_vlm.HIDDEN // tiny_vlm.HEADS


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Its configuration and its processor."""
    config = transformers.Gemma4Config(
        text_config=text(tokenizer) | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        vision_config=vision(),
        audio_config=None,
        tie_word_embeddings=False,
        **token_ids(tokenizer),
    )
    return config, processor(transformers, tokenizer)


def text(tokenizer: Any) -> dict[str, Any]:
    return parts.text(tokenizer) | {
        "model_type": "gemma4_text",
        "head_dim": _HEAD,
        "global_head_dim": 2 * _HEAD,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "bos_token_id": None,
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
    }


def vision() -> dict[str, Any]:
    return parts.vision() | {
        "num_key_value_heads": tiny_vlm.HEADS,
        "head_dim": _HEAD,
        "patch_size": PATCH,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that stand for media, and around them."""
    named = {
        "boi_token_id": "boi_token",
        "eoi_token_id": "eoi_token",
        "image_token_id": "image_token",
        "video_token_id": "video_token",
        "boa_token_id": "boa_token",
        "eoa_token_index": "eoa_token",
        "audio_token_id": "audio_token",
    }
    return {key: int(tokenizer.convert_tokens_to_ids(TOKENS[n])) for key, n in named.items()}


def processor(transformers: Any, tokenizer: Any) -> Any:
    sizes = {"patch_size": PATCH, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    tokenizer.chat_template = tiny_vlm.chat_template("<|image|>", "<|video|>", "<|audio|>")
    return transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessor(**sizes),
        video_processor=transformers.Gemma4VideoProcessor(num_frames=4, **sizes),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
