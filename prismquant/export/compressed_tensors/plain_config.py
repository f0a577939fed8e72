"""The ``config.json`` of a checkpoint, with changes that have nothing to do with formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prismquant.formats.section import CONFIG_KEY, PRIVATE_KEY


def without_sections(config: Mapping[str, Any], part: str | None) -> dict[str, Any]:
    """A configuration without what it says of quantization, in any of its parts.

    Args:
        config: The content of ``config.json``.
        part: Key of the part that describes the model, if it is not the whole.
    """
    said = (CONFIG_KEY, PRIVATE_KEY)
    plain = {key: value for key, value in config.items() if key not in said}
    for name, inner in plain.items():
        if name == part or (isinstance(inner, Mapping) and CONFIG_KEY in inner):
            plain[name] = without_sections(inner, None)
    return plain


def untied_config(config: dict[str, Any], part: str | None) -> dict[str, Any]:
    """The configuration of a model whose head has a weight of its own.

    Args:
        config: The content of ``config.json``.
        part: Key of the part that describes the model, if it is not the whole.
    """
    if part in config:
        return config | {part: untied_config(config[part], None)}
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        config = config | {"text_config": text | {"tie_word_embeddings": False}}
    return config | {"tie_word_embeddings": False}
