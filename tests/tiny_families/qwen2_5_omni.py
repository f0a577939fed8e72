"""The thinker of Qwen2.5-Omni, which has ears."""

from __future__ import annotations

from typing import Any

import tiny_vlm

from tiny_families import parts

# Clips have 100,352 pixels or more, whatever the processor's files say.
_PATCH = 28
# Bands of a sound's spectrum.
_MELS = 16
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
    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    size = {"shortest_edge": (4 * _PATCH) ** 2, "longest_edge": (6 * _PATCH) ** 2}
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
            "patch_size": _PATCH,
            "out_hidden_size": tiny_vlm.HIDDEN,
            "window_size": 4 * _PATCH,
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "d_model": tiny_vlm.HIDDEN,
            "encoder_layers": 2,
            "encoder_attention_heads": tiny_vlm.HEADS,
            "encoder_ffn_dim": tiny_vlm.INTERMEDIATE,
            "output_dim": tiny_vlm.HIDDEN,
            "num_mel_bins": _MELS,
            "n_window": 8,
        },
        image_token_id=token("<|IMAGE|>"),
        video_token_id=token("<|VIDEO|>"),
        audio_token_id=token("<|AUDIO|>"),
        audio_start_token_id=token("<|audio_bos|>"),
        audio_end_token_id=token("<|audio_eos|>"),
        vision_start_token_id=token("<|vision_bos|>"),
        vision_end_token_id=token("<|vision_eos|>"),
        tie_word_embeddings=False,
    )
    tokenizer.chat_template = tiny_vlm.chat_template(
        "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "<|vision_bos|><|VIDEO|><|vision_eos|>",
        "<|audio_bos|><|AUDIO|><|audio_eos|>",
    )
    processor = transformers.Qwen2_5OmniProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=_PATCH, size=size),
        video_processor=transformers.Qwen2VLVideoProcessor(
            patch_size=_PATCH, size=size, cap_pixels_per_frame=False
        ),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=_MELS),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return config, processor
