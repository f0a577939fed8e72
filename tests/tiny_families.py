"""Small random models of families that are tested by their name alone, saved as real checkpoints.

Each has a configuration, and the parts of a processor that transformers has for it. Weights, words,
samples are those of :mod:`tiny_vlm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tiny_vlm
import torch

from prismquant.models.arch_files import known_archs
from prismquant.models.config import import_transformers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILIES = ("internvl",)
SPARSE = ("qwen3_vl_moe",)

# Of pictures, in pixels; a patch has four on each side.
_SIDE = 32
_TOKENS = (_SIDE // 8) ** 2


def build(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random checkpoint with two blocks in each tower, as transformers writes it.

    Args:
        family: One of :data:`FAMILIES` or :data:`SPARSE`.
        folder: Where it goes.
        dtype: Of the weights.
    """
    transformers = import_transformers()
    tokens, make = _MADE[family]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_vlm.word_tokenizer(transformers, tokens)
    config, processor = make(transformers, tokenizer)
    processor.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, known_archs()[family].hf_class)(config)
        tiny_vlm.randomize(model)
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def _text(tokenizer: Any) -> dict[str, Any]:
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


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": tiny_vlm.HIDDEN,
        "intermediate_size": tiny_vlm.INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": tiny_vlm.HEADS,
    }


def _internvl(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    size = {"height": _SIDE, "width": _SIDE}
    config = transformers.InternVLConfig(
        text_config=_text(tokenizer),
        vision_config=_vision() | {"image_size": [_SIDE] * 2, "patch_size": [tiny_vlm.PATCH] * 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=_TOKENS,
        tie_word_embeddings=False,
    )
    tokenizer.chat_template = tiny_vlm.chat_template("<IMG_CONTEXT>", "<video>")
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        video_processor=transformers.InternVLVideoProcessor(size=size),
        tokenizer=tokenizer,
        image_seq_length=_TOKENS,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _qwen3_vl_moe(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = tiny_vlm.config_of("qwen3_vl", transformers)
    text = config.text_config.to_dict() | {
        "model_type": "qwen3_vl_moe_text",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
    }
    values = config.to_dict() | {"text_config": text}
    del values["model_type"]
    values["vision_config"].pop("model_type")
    start, end = "<|vision_start|>", "<|vision_end|>"
    pads = (f"{start}<|{kind}_pad|>{end}" for kind in ("image", "video"))
    tokenizer.chat_template = tiny_vlm.chat_template(*pads)
    processor = tiny_vlm.processor_of("qwen3_vl", transformers, tokenizer)
    return transformers.Qwen3VLMoeConfig(**values), processor


_INTERNVL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
# Tokens that a family's tokenizer names, and what makes its configuration and its processor.
_MADE: dict[str, tuple[dict[str, str], Callable[[Any, Any], tuple[Any, Any]]]] = {
    "internvl": (_INTERNVL, _internvl),
    "qwen3_vl_moe": ({}, _qwen3_vl_moe),
}
