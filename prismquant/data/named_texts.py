"""Running texts that language models are calibrated and measured on, by the names they go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NamedText:
    """Place of a text on the Hugging Face hub.

    Attributes:
        repository: Its name there.
        subset: Configuration of the dataset; empty: it has one alone.
        split: Part of it that is taken where none is named.
        column: Of the text.
        joint: Put between rows that are one document; None: each row is one.
        revision: Of the repository; empty: its main one.
    """

    repository: str
    subset: str
    split: str
    column: str
    joint: str | None = None
    revision: str = ""


NAMED_TEXTS: Mapping[str, NamedText] = {
    "wikitext2": NamedText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", "\n\n"),
    "ptb": NamedText(
        "ptb-text-only/ptb_text_only", "", "train", "sentence", " ", "refs/convert/parquet"
    ),
    "c4": NamedText("allenai/c4", "en", "train", "text"),
    "pileval": NamedText("mit-han-lab/pile-val-backup", "", "validation", "text"),
}
"""Texts by name; ``name:split`` names a part."""
