"""The tokenizer as GGUF holds it: token texts, their kinds, and the merges.

llama.cpp has a fixed list of ways to cut text into words before merging; the released Qwen models
use the one that it calls ``qwen2``, Llama 3 ``llama-bpe``. A tokenizer of another kind is not
expressed, and the file then has no vocabulary: it still runs on token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismquant.errors import StorageError
from prismquant.export.companions import own_file
from prismquant.opening import MAX_JSON_BYTES, read_bounded, read_json

# How Qwen2's tokenizer, and those of all later Qwen models here, cuts text into words.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How Llama 3's does: up to three digits are a word.
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_WORDS = {QWEN2_WORDS: "qwen2", LLAMA3_WORDS: "llama-bpe"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """The content of ``tokenizer.ggml.*``.

    Attributes:
        tokens: By id.
        kinds: Of each: normal, control, user-defined or unused.
        merges: Pairs, parted by a space, in their order.
        ids: Of special tokens: ``bos``, ``eos``, ``pad``.
        template: The chat template, or None.
        words: llama.cpp's name for the way to cut text into words.
        begins: Whether the token ``bos`` is put before every text.
    """

    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    ids: Mapping[str, int]
    template: str | None
    words: str
    begins: bool


def read_vocabulary(folder: Path, size: int, config: Any) -> Vocabulary | None:
    """Read a checkpoint's tokenizer.

    Args:
        folder: The checkpoint.
        size: Rows of the embedding; ids without a token are filled up.
        config: The language model's configuration, for its special tokens.

    Returns:
        The vocabulary; None if it is no byte-level BPE that cuts words as Qwen2 or Llama 3 does.

    Raises:
        StorageError: It is no tokenizer at all.
    """
    path = own_file(folder, "tokenizer.json")
    if path is None:
        return None
    try:
        return _read(folder, read_json(path), size, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(
            f"tokenizer.json is none that can be read: {type(error).__name__}: {error}",
            where=str(path),
            remedy="restore it from the original checkpoint, or choose another --format",
        ) from error


def _read(folder: Path, content: Any, size: int, config: Any) -> Vocabulary | None:
    model = content.get("model") or {}
    patterns = _patterns(content.get("pre_tokenizer"))
    words = next((name for pattern, name in _WORDS.items() if pattern in patterns), None)
    if model.get("type") != "BPE" or words is None:
        return None
    added = {int(entry["id"]): entry for entry in content.get("added_tokens") or []}
    texts = {int(number): text for text, number in model["vocab"].items()}
    texts |= {number: entry["content"] for number, entry in added.items()}
    kinds = {number: _kind(entry) for number, entry in added.items()}
    merges = (m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or [])
    return Vocabulary(
        tokens=tuple(texts.get(n, f"[PAD{n}]") for n in range(size)),
        kinds=tuple(kinds.get(n, _NORMAL if n in texts else _UNUSED) for n in range(size)),
        merges=tuple(merges),
        ids=_special_ids(folder, {text: number for number, text in texts.items()}, config),
        template=_template(folder),
        words=words,
        begins=_begins(content.get("post_processor")),
    )


def _patterns(node: Any) -> list[str]:
    """All regular expressions of a pre-tokenizer, however it is nested."""
    if isinstance(node, list):
        return [pattern for item in node for pattern in _patterns(item)]
    if not isinstance(node, dict):
        return []
    own = node.get("pattern")
    found = [own["Regex"]] if isinstance(own, dict) and "Regex" in own else []
    return found + _patterns(node.get("pretokenizers"))


def _begins(node: Any) -> bool:
    """Whether a post-processor puts a special token before a text, however it is nested."""
    if not isinstance(node, dict):
        return False
    first = (node.get("single") or [{}])[0]
    return "SpecialToken" in first or any(map(_begins, node.get("processors") or []))


def _kind(entry: Mapping[str, Any]) -> int:
    text = str(entry["content"])
    control = entry.get("special") or (text.startswith("<|") and text.endswith("|>"))
    return _CONTROL if control else _USER_DEFINED


def _special_ids(folder: Path, by_text: Mapping[str, int], config: Any) -> dict[str, int]:
    path = own_file(folder, "tokenizer_config.json")
    said = read_json(path) if path is not None else {}
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "pad"):
        entry = said.get(f"{role}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        number = by_text.get(text) if text else getattr(config, f"{role}_token_id", None)
        if isinstance(number, int):
            ids[role] = number
    return ids


def _template(folder: Path) -> str | None:
    if (path := own_file(folder, "chat_template.jinja")) is not None:
        return read_bounded(path, MAX_JSON_BYTES).decode("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (path := own_file(folder, name)) is not None:
            template = read_json(path).get("chat_template")
            if isinstance(template, str):
                return template
    return None
