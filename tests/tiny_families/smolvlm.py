"""SmolVLM: as Idefics3, with a processor of clips."""

from __future__ import annotations

from typing import Any

from tiny_families import parts

TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    **{f"crop_{row}{column}": f"<row_{row}_col_{column}>" for row in "12" for column in "12"},
}

SLOW = True


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    # Its processor asks for a package that writes the numbers of frames as words.
    transformers.models.smolvlm.processing_smolvlm.num2words = str
    return parts.cropped("SmolVLM", transformers, tokenizer)
