"""Idefics3: crops of pictures, with blank ones where a sample has fewer than another."""

from __future__ import annotations

from typing import Any

from tiny_families import parts

SLOW = True
TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    **{f"crop_{row}{column}": f"<row_{row}_col_{column}>" for row in "12" for column in "12"},
}


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    return parts.cropped("Idefics3", transformers, tokenizer)
