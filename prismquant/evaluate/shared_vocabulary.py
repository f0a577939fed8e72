"""A check that two models speak of the same tokens, so that their distributions compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prismquant.errors import ModelError
from prismquant.models.config import config_value, identify, native_config
from prismquant.models.processor import load_processor

_TOKENIZERS = ("tokenizer.json", "vocab.json")
_REMEDY = "compare with the model that was quantized"


def require_same_vocabulary(
    folder: Path, processor: Any, reference: Path, *, trust_remote_code: bool = False
) -> None:
    """Make sure that a reference has a model's vocabulary. Reads no weights.

    A reference without a tokenizer is only asked for the size of its vocabulary.

    Args:
        folder: The model.
        processor: The model's.
        reference: Folder of the model to compare with.
        trust_remote_code: Allow code in the reference's folder to build its processor.

    Raises:
        ModelError: They differ; the message says in how many tokens, and names one.
    """
    sizes = [_vocabulary_size(one) for one in (folder, reference)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the model has {sizes[0]} tokens, the reference {sizes[1]}: their distributions "
            "cannot be compared",
            where=str(reference),
            remedy=_REMEDY,
        )
    if not any((reference / name).is_file() for name in _TOKENIZERS):
        return
    other = load_processor(reference, trust_remote_code=trust_remote_code)
    ours, theirs = (dict(one.tokenizer.get_vocab()) for one in (processor, other))
    differing = [word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word)]
    if differing:
        word = min(differing)
        raise ModelError(
            f"the reference's tokenizer differs in {len(differing)} tokens: {word!r} is "
            f"{ours.get(word)} for the model, {theirs.get(word)} for the reference",
            where=str(reference),
            remedy=_REMEDY,
        )


def _vocabulary_size(folder: Path) -> int:
    text = native_config(identify(folder), folder).get_text_config()
    return int(config_value(text, "vocab_size"))
