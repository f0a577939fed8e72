"""Keys of a row beyond its conversation: notes are kept, but nothing may be lost in silence.

A picture that is named and never shown calibrates a model on half of its question. So every key of
a row that looks as if it named a picture, a clip or a sound is looked at, however deep it lies, and
so are keys that look like a misspelt one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from PIL import Image

from prismquant.data.dialects import (
    ANSWERS,
    CONVERSATIONS,
    PAIRS,
    PLAIN,
    Conversation,
    near_key,
)
from prismquant.data.items import MEDIA, ROLES, is_nothing, local_path
from prismquant.data.pictures import EmbeddedPicture
from prismquant.data.places import CLIPS, PICTURES
from prismquant.data.row_findings import Findings
from prismquant.data.samples import Message, excerpt, items_of, text_of

_DEEPEST = 32
_SOUNDS = frozenset((".wav", ".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus"))
_FILES = PICTURES | CLIPS | _SOUNDS
_WORD = r"(?:image|img|picture|photo|screenshot|video|clip|audio)s?"
_SOURCE = r"(?:path|file|url|uri|bytes|data|base64|b64)s?"
_MEANINGS = {
    "tensors": re.compile(r"pixel_values\w*|input_features|(?:image|video)_embeds\w*"),
    "part": re.compile(_SOURCE),
    # Any word names a file: image, images, image_path, video_url_2 ..
    "media": re.compile(rf"{_WORD}(?:_{_SOURCE})?(?:_?\d+)?"),
    # The name of a picture, a clip or a sound does: second_image, frames, jpg ..
    "other media": re.compile(
        rf"(?:\w+_)?(?:{_WORD}|frames?|jpe?g|png|webp|gif|mp4|wav)(?:_{_SOURCE})?(?:_?\d+)?"
    ),
    # So it does where nothing is shown: image_name, file_name ..
    "file": re.compile(rf"(?:\w+_)?(?:{_WORD}|file|path)\w*"),
}
# What would change the text that a chat template makes.
_TEMPLATE_KEYS = ("tools", "functions", "documents")
_EMPTY_TEXTS = ("", "[]", "{}")
_PICTURE = "names a picture or a clip that is not shown"
_SOUND = "names a sound that is not heard"

Leaf = tuple[tuple[str, ...], Any]


def leaves(row: Any) -> list[Leaf]:
    """Everything in a row that is no list or object, with the keys that lead there.

    Raises:
        Findings: It is nested too deeply.
    """
    found: list[Leaf] = []
    waiting: list[tuple[tuple[str, ...], Any, int]] = [((), row, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if depth > _DEEPEST:
            raise Findings("it is nested too deeply")
        if isinstance(value, dict):
            parts = [((*path, str(key)), part, depth + 1) for key, part in value.items()]
            waiting += reversed(parts)
        elif isinstance(value, list | tuple):
            waiting += [(path, part, depth + 1) for part in reversed(value)]
        else:
            found.append((path, value))
    return found


def require_nothing_lost(
    row: Mapping[str, Any],
    found: Sequence[Leaf],
    conversation: Conversation,
    messages: Sequence[Message],
) -> None:
    """Refuse a row with something in it that ought to have been used.

    Args:
        row: The row.
        found: Its leaves.
        conversation: What was taken from it.
        messages: What became of that.

    Raises:
        Findings: All that was left out.
    """
    files = [file for message in messages for file in _files(message)]
    lines = [
        *_unused_media(found, files),
        *_unread(row, conversation, messages, files),
    ]
    if lines:
        raise Findings(*lines)


def _files(message: Message) -> Iterator[Any]:
    for item in items_of(message):
        if item["type"] != "text":
            file = item[item["type"]]
            yield from file if isinstance(file, list) else [file]


def _name(file: Any) -> str:
    """The name that a file has in its source, if it has one."""
    if isinstance(file, EmbeddedPicture):
        return file.name
    return file if isinstance(file, str) else str(getattr(file, "filename", ""))


def _unused_media(found: Sequence[Leaf], files: Sequence[Any]) -> list[str]:
    names = [name for name in map(_name, files) if name]
    lost: dict[str, Any] = {}
    for path, value in found:
        if isinstance(value, str):
            unused = _names_media(path, value, bool(files)) and not _is_among(value, names)
        elif isinstance(value, bytes | Image.Image):
            unused = not any(_is_same(value, file) for file in files)
        else:
            unused = value is not None and _is_sensor_data(path, value)
        if unused:
            lost.setdefault(".".join(path), value)
    return [
        f"{key!r} {_SOUND if 'audio' in key.lower() else _PICTURE}: {excerpt(repr(value))}"
        for key, value in lost.items()
    ]


def _names_media(path: Sequence[str], value: str, shows: bool) -> bool:
    # What {"path": ..} and the like stand for is said by the key before.
    meanings = [_meaning(key) for key in path]
    named = next((meaning for meaning in reversed(meanings) if meaning != "part"), "file")
    # Beside what is shown, a file's name is a note.
    is_note = shows or meanings[-1] not in ("file", "part")
    if is_note and not {"media", "other media"} & set(meanings):
        return False
    if named == "media" and value.split() == [value]:  # one word is no description
        return True
    return PurePath(value).suffix.lower() in _FILES or value.startswith("data:")


@functools.lru_cache(maxsize=4096)
def _meaning(key: str) -> str:
    """Meaning of a key's value, told by its name."""
    snake = re.sub(r"\W", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)).lower()
    return next((name for name, pattern in _MEANINGS.items() if pattern.fullmatch(snake)), "")


def _is_among(value: str, names: Sequence[str]) -> bool:
    """Whether one of the names is this file's, perhaps from another folder."""
    name = local_path(value)
    return any(
        name == other or name.endswith(f"/{other}") or other.endswith(f"/{name}") for other in names
    )


def _is_same(value: bytes | Image.Image, file: Any) -> bool:
    return value is file or (isinstance(file, EmbeddedPicture) and file.data == value)


def _is_sensor_data(path: Sequence[str], value: Any) -> bool:
    """Whether a number is one of a picture's, or an object of another library is a clip's."""
    meanings = {_meaning(key) for key in path}
    return "tensors" in meanings or ("media" in meanings and not isinstance(value, int | float))


def misspelt(row: Mapping[str, Any], head: str) -> list[str]:
    """Findings about keys that look like a misspelt one of those that a row of this kind has."""
    files = (*MEDIA, *(f"{kind}s" for kind in MEDIA))
    known = (head, *files, "system")
    if head not in CONVERSATIONS:
        known += (*ANSWERS, "history")
    lines = []
    for key, value in row.items():
        near = None if key in known or is_nothing(value) else near_key(str(key), known)
        if near is not None and (near in files or is_nothing(row.get(near))):
            lines.append(f"key {key!r} is not used: did you mean {near!r}?")
    return lines


def _unread(
    row: Mapping[str, Any],
    conversation: Conversation,
    messages: Sequence[Message],
    files: Sequence[Any],
) -> Iterator[str]:
    for key in _TEMPLATE_KEYS:
        if not is_nothing(row.get(key)) and row[key] not in _EMPTY_TEXTS:
            yield f"{key!r} would change what the chat template writes, and is not used: remove it"
    text = "\n".join(map(text_of, messages))
    names = [name for name in map(_name, files) if name]
    for key in (*CONVERSATIONS, *PAIRS, PLAIN, "history"):
        if key in conversation.used or is_nothing(row.get(key)):
            continue
        # As a chat template wrote it out, say.
        if key == PLAIN and all(text_of(message).strip() in str(row[key]) for message in messages):
            continue
        if not all(_is_said(value, text, names) for _, value in leaves(row[key])):
            yield f"{conversation.head!r} and {key!r} say different things: keep one of them"
    if messages[-1]["role"] != "assistant":
        for key in (*ANSWERS, "chosen"):
            if key not in conversation.used and not is_nothing(row.get(key)):
                yield f"{key!r} is not used beside {conversation.head!r}: make it the last message"
    if not is_nothing(row.get("objects")) and re.search("<bbox>|<ref-object>", text):
        yield "'objects' are not put in the places of <bbox> and <ref-object>: write them out"


def _is_said(value: Any, text: str, names: Sequence[str]) -> bool:
    if not isinstance(value, str) or value.casefold() in ROLES or value in ("text", *MEDIA):
        return True
    if _is_among(value, names):
        return True
    return all(part.strip() in text for part in re.split(r"<(?:image|video|audio)>", value))
