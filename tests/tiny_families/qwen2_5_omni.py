"""The thinker of Qwen2.5-Omni, which has ears."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

# Clips have 100,352 pixels or more, whatever the processor's files say.
PATCH = 28
# Bands of a sound's spectrum.
MELS = 16
SLOW = True
TOKENS = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=parts.text(tokenizer)
        | {
            "model_type": "qwen2_5_omni_text",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 6, 6],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": tiny_vlm.HIDDEN,
            "intermediate_size": tiny_vlm.INTERMEDIATE,
            "num_heads": tiny_vlm.HEADS,
            "patch_size": PATCH,
            "out_hidden_size": tiny_vlm.HIDDEN,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "d_model": tiny_vlm.HIDDEN,
            "encoder_layers": 2,
            "encoder_attention_heads": tiny_vlm.HEADS,
            "encoder_ffn_dim": tiny_vlm.INTERMEDIATE,
            "output_dim": tiny_vlm.HIDDEN,
            "num_mel_bins": MELS,
            "n_window": 8,
        },
        tie_word_embeddings=False,
        **token_ids(tokenizer),
    )
    return config, processor(transformers, transformers.Qwen2_5OmniProcessor, tokenizer)


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that stand for media, and around them."""
    named = {
        "image_token_id": "<|IMAGE|>",
        "video_token_id": "<|VIDEO|>",
        "audio_token_id": "<|AUDIO|>",
        "audio_start_token_id": "<|audio_bos|>",
        "audio_end_token_id": "<|audio_eos|>",
        "vision_start_token_id": "<|vision_bos|>",
        "vision_end_token_id": "<|vision_eos|>",
    }
    return {key: int(tokenizer.convert_tokens_to_ids(token)) for key, token in named.items()}


def processor(transformers: Any, kind: Any, tokenizer: Any) -> Any:
    size = {"shortest_edge": (4 * PATCH) ** 2, "longest_edge": (6 * PATCH) ** 2}
    tokenizer.chat_template = tiny_vlm.chat_template(
        "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "<|vision_bos|><|VIDEO|><|vision_eos|>",
        "<|audio_bos|><|AUDIO|><|audio_eos|>",
    )
    return kind(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=PATCH, size=size),
        video_processor=transformers.Qwen2VLVideoProcessor(
            patch_size=PATCH, size=size, cap_pixels_per_frame=False
        ),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=MELS),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
