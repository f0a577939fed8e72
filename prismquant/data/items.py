"""Messages and what they show: every key is used, known to be harmless, or a finding.

Nothing here is guessed: text is only ever made of text, a role is one that a chat template knows, a
file is named in one way, and an option of a picture or a clip has a value that can be obeyed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from PIL import Image

from prismquant.data.pictures import EmbeddedPicture
from prismquant.data.row_findings import Findings, collect
from prismquant.data.samples import Message, excerpt
from prismquant.errors import suggest

MEDIA = ("image", "video", "audio")
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
# What tools write beside role and content that is not for the model to read.
_MESSAGE_NOTES = {
    *("id", "index", "turn", "weight", "loss", "train", "mask", "timestamp", "date"),
    *("lang", "language", "model", "source", "score", "meta", "metadata"),
}
_ITEM_NOTES = {"cache_control", "uuid"}
_TYPES = {name: kind for kind in MEDIA for name in (kind, f"{kind}_url")}
_URL = re.compile(r"(?!file:)([a-z][a-z0-9+.-]+://|(https?|data|s3|gs|hf):)", re.IGNORECASE)

_SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_COUNTS = {
    "image": _SIZES,
    "video": (*_SIZES, "total_pixels", "nframes", "min_frames", "max_frames"),
    "audio": (),
}
_CLIP_NUMBERS = {"fps": (1e-4, 1e4), "video_start": (0.0, 1e9), "video_end": (0.0, 1e9)}
_MOST = 2**31 - 1
# Models take frames two by two.
_PAIRED = ("nframes", "max_frames")
# What is chosen among the frames of a file has no meaning for frames that are chosen already.
_ONLY_OF_FILES = ("nframes", "min_frames", "max_frames", "video_start", "video_end")
_PAIRS = (("min_pixels", "max_pixels"), ("min_frames", "max_frames"))
_EXCLUSIVE = (
    ("fps", "nframes"),
    ("min_frames", "nframes"),
    ("max_frames", "nframes"),
    *(("resized_height", limit) for limit in ("min_pixels", "max_pixels", "total_pixels")),
)


def given(value: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say something: tables fill in what a row has not with null, or nothing."""
    return {key: part for key, part in value.items() if not is_nothing(part)}


def is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def require_text(value: Any, name: str) -> str:
    """A text.

    Raises:
        Findings: It is something else, which has no one way to be written as text.
    """
    if not isinstance(value, str):
        raise Findings(f"{name} is not text, but {excerpt(repr(value))}")
    return value


# Messages


def parse_message(
    value: Any, markers: Collection[str] = MEDIA, answer_markers: Collection[str] = ()
) -> Message:
    """A message as :class:`Sample` describes it; places for files are items whose file is None.

    Args:
        value: A message or turn of any dialect.
        markers: Kinds of which ``<kind>`` in the text is a place for a file.
        answer_markers: Those of them for which that is so in answers, too. Answers may write about
            ``<image>``, and without files they can mean nothing else.

    Raises:
        Findings: All that is wrong with it.
    """
    if not isinstance(value, dict):
        raise Findings(f"it is no object, but {excerpt(repr(value))}")
    known = (*_ROLE_KEYS, *_CONTENT_KEYS)
    lines = _unknown_keys(value, known, _MESSAGE_NOTES)
    for keys in (_ROLE_KEYS, _CONTENT_KEYS):
        if all(value.get(key) is not None for key in keys):
            lines.append(f"both {keys[0]!r} and {keys[1]!r} are there")
    role = content = None
    try:
        role = _role(_first(value, _ROLE_KEYS))
    except Findings as findings:
        lines += findings.lines
    try:
        content = _content(
            _first(value, _CONTENT_KEYS), answer_markers if role == "assistant" else markers
        )
    except Findings as findings:
        lines += findings.lines
    if lines:
        raise Findings(*lines)
    return {"role": role, "content": content}


def _first(value: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((value[key] for key in keys if value.get(key) is not None), None)


def _role(value: Any) -> str:
    if value is None or value == "":
        raise Findings("no role")
    role = ROLES.get(value.casefold()) if isinstance(value, str) else None
    if role is None:
        hint = suggest(str(value), ROLES) if isinstance(value, str) else "a role is a word"
        raise Findings(f"role {excerpt(repr(value))} is not known ({hint})")
    return role


def _unknown_keys(
    value: Mapping[str, Any], known: Collection[str], notes: Collection[str]
) -> list[str]:
    return [
        f"key {excerpt(repr(key))} is not used ({suggest(str(key), known)})"
        for key in given(value)
        if key not in known and key not in notes
    ]


def _content(value: Any, markers: Collection[str]) -> str | list[dict[str, Any]]:
    if is_nothing(value):
        raise Findings("no content")
    if isinstance(value, str):
        pieces = _pieces(value, markers)
        return value if all(piece["type"] == "text" for piece in pieces) else pieces
    if not isinstance(value, list | tuple):
        raise Findings(f"content is a text or a list of items, not {excerpt(repr(value))}")
    parsed = collect(lambda item: _items(item, markers), value)
    return [item for items in parsed for item in items]


# Items


def _items(value: Any, markers: Collection[str]) -> list[dict[str, Any]]:
    """One item; a text with markers is several."""
    if isinstance(value, str):
        return _pieces(value, markers)
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        lines = _unknown_keys(value, ("type", "text"), {"index", *_ITEM_NOTES})
        if lines:
            raise Findings(*lines)
        return _pieces(require_text(value.get("text"), "the text of an item"), markers)
    if isinstance(kind, str) and kind in _TYPES:
        return [_media_item(value, kind)]
    if kind == "input_audio":
        raise Findings("a sound is a file: save the one in this item as a file")
    hint = f" ({suggest(kind, ('text', *_TYPES))})" if isinstance(kind, str) else ""
    raise Findings(
        f"an item is of type text, image, video or audio, not {excerpt(repr(value))}{hint}"
    )


def _pieces(text: str, markers: Collection[str]) -> list[dict[str, Any]]:
    """A text as items, with a place for a file where each marker stands."""
    if markers and (named := re.search("<img>[^<]+</img>", text)):
        raise Findings(f"a file is named within a text, by {excerpt(named[0])}: use 'images'")
    pieces = re.split(f"<({'|'.join(markers)})>", text) if markers else [text]
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    items: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number % 2:
            items.append({"type": piece, piece: None})
        # A marker always has a line or a space of its own: it belongs to the marker, not to the
        # text.
        elif stripped := piece.strip():
            items.append({"type": "text", "text": stripped})
    return items


def _media_item(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = _TYPES[name]
    sources, counts = (kind, "path", "url", f"{kind}_url"), _COUNTS[kind]
    numbers = _CLIP_NUMBERS if kind == "video" else {}
    known = ("type", "index", *sources, *counts, *numbers)
    lines = _unknown_keys(value, known, _ITEM_NOTES)
    present = given(value)
    item: dict[str, Any] = {"type": kind, kind: None}
    named = [key for key in sources if key in present]
    if len(named) > 1:
        lines.append(f"its file is named by both {named[0]!r} and {named[1]!r}")
    elif not named and name != kind:
        lines.append(f"an item of type {name!r} names no file")
    try:
        if named:
            item[kind] = parse_file(_unwrapped(present[named[0]]), kind)
        elif "index" in present:
            item["index"] = present["index"]
    except Findings as findings:
        lines += findings.lines
    for key in present:
        try:
            if key in counts:
                item[key] = _count(present[key], key)
            elif key in numbers:
                item[key] = _number(present[key], key, *numbers[key])
        except Findings as findings:
            lines += findings.lines
    lines += _conflicts(item)
    if lines:
        raise Findings(*lines)
    return item


def _unwrapped(value: Any) -> Any:
    """The file of OpenAI's ``{"url": file, "detail": ..}``; anything else as it is."""
    if not isinstance(value, dict) or "url" not in value:
        return value
    if lines := _unknown_keys(value, ("url", "detail"), ()):
        raise Findings(*lines)
    return value["url"]


def _count(value: Any, key: str) -> int:
    least = 2 if key in _PAIRED else 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise Findings(
            f"{key} is a whole number from {least} to {_MOST}, not {excerpt(repr(value))}"
        )
    return value


def _number(value: Any, key: str, least: float, most: float) -> float:
    # Compared before it is converted: whole numbers may be too large for that.
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise Findings(f"{key} is a number from {least:g} to {most:g}, not {excerpt(repr(value))}")
    return float(value)


def _conflicts(item: Mapping[str, Any]) -> list[str]:
    """Options that cannot all be obeyed."""
    if len(item) == 2:
        return []  # it has none
    lines = [
        f"{low} {item[low]} is above {high} {item[high]}"
        for low, high in _PAIRS
        if low in item and high in item and item[low] > item[high]
    ]
    lines += [
        f"{one} and {other} exclude one another"
        for one, other in _EXCLUSIVE
        if one in item and other in item
    ]
    if item.get("video_start", 0.0) >= item.get("video_end", math.inf):
        lines.append(f"video_end {item['video_end']:g} is not after the start")
    if ("resized_height" in item) != ("resized_width" in item):
        lines.append("resized_height and resized_width belong together")
    if isinstance(item.get("video"), list):
        lines += [
            f"{key} chooses among the frames of a file; a list of frames is shown whole"
            for key in _ONLY_OF_FILES
            if key in item
        ]
    return lines


def with_file(item: Mapping[str, Any], file: Any) -> dict[str, Any]:
    """A place for a file with its file in it.

    Raises:
        Findings: Its options do not fit such a file.
    """
    filled = {**item, item["type"]: file}
    filled.pop("index", None)
    if lines := _conflicts(filled):
        raise Findings(*lines)
    return filled


# Files


def parse_file(value: Any, kind: str) -> Any:
    """A path or a picture in memory, or for clips a list of them.

    Args:
        value: A path, a ``file://`` URL, a picture of PIL, the bytes of a picture file, or
            ``{"path": .., "bytes": ..}``; for a clip, also a list of its frames in these forms.
            Sounds are named by paths.
        kind: ``image``, ``video`` or ``audio``.

    Raises:
        Findings: It names nothing that can be read from this machine's disks.
    """
    if kind == "video" and isinstance(value, list | tuple) and value:
        return collect(_picture, value, lambda number: f"frame {number}: ")
    if kind == "image":
        return _picture(value)
    file = _picture(value)
    if not isinstance(file, str):
        form = "a file" if kind == "audio" else "a file or a list of frames"
        what = "sound" if kind == "audio" else "clip"
        raise Findings(f"a {what} is {form}; save the one in this row as a file")
    return file


def _picture(value: Any) -> str | Image.Image | EmbeddedPicture:
    if isinstance(value, dict) and value.keys() <= {"path", "bytes"}:
        data, name = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return EmbeddedPicture(data, str(name or ""))
        return _path(name if data is None else value)
    if isinstance(value, bytes):
        return EmbeddedPicture(value)
    return value if isinstance(value, Image.Image) else _path(value)


def _path(value: Any) -> str:
    if isinstance(value, str) and _URL.match(value):
        raise Findings(f"{excerpt(value)} is not a local file; download it first")
    path = local_path(value) if isinstance(value, str) else ""
    if not path or "\0" in path:
        raise Findings(f"a file is named by its path, not by {excerpt(repr(value))}")
    return path


def local_path(name: str) -> str:
    """A path as it is, or the one of a ``file://`` URL."""
    if not name.lower().startswith("file://"):
        return name
    return unquote(name[len("file://") :].removeprefix("localhost"))
