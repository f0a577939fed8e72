"""Places of files: markers and items without a file take the files that a row lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from prismquant.data.items import MEDIA, is_nothing, parse_file, with_file
from prismquant.data.row_findings import Findings, collect
from prismquant.data.samples import Message, items_of

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
CLIPS = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv")
)


def listed(row: Mapping[str, Any], kind: str) -> tuple[str, Any] | None:
    """The key of a row that lists its files of a kind, and what it says.

    Raises:
        Findings: Two keys do.
    """
    keys = [key for key in (f"{kind}s", kind) if not is_nothing(row.get(key)) and row[key] != ""]
    if len(keys) == 2 and _as_list(row[keys[0]]) != _as_list(row[keys[1]]):
        raise Findings(f"both {keys[0]!r} and {keys[1]!r} list files")
    return (keys[0], row[keys[0]]) if keys else None


def place_files(
    messages: Sequence[Message], lists: Mapping[str, tuple[str, Any]]
) -> tuple[Message, ...]:
    """Messages with every file in its place.

    Files go to the markers and the items without a file, in order; of a kind that has none of them
    anywhere, they come before the first question, as LLaVA and TRL mean it.

    Args:
        messages: With items whose file is None as places.
        lists: For each kind that a row lists files of, the key and its value.

    Raises:
        Findings: There are more files than places, or fewer.
    """
    counts = Counter(item["type"] for item in _shown(messages) if item[item["type"]] is None)
    lines: list[str] = []
    queues: dict[str, Iterator[Any]] = {}
    loose: list[dict[str, Any]] = []
    for kind in MEDIA:
        try:
            files = _files(kind, lists[kind], counts[kind]) if kind in lists else []
        except Findings as findings:
            lines += findings.lines
            continue
        shown = [item[kind] for item in _shown(messages) if item["type"] == kind]
        if counts[kind] == 0 and not shown:
            loose += [{"type": kind, kind: file} for file in files]
        elif counts[kind] != len(files) and (counts[kind] or not all(f in shown for f in files)):
            lines.append(
                f"{counts[kind]} <{kind}> markers or items without a file, but {len(files)} {kind} "
                "files"
            )
        queues[kind] = enumerate(files)
    if lines:
        raise Findings(*lines)
    filled = collect(
        lambda message: _filled(message, queues), messages, lambda number: f"message {number}: "
    )
    return tuple(_before_question(filled, loose) if loose else filled)


def _shown(messages: Iterable[Message]) -> list[Mapping[str, Any]]:
    items = (item for message in messages for item in items_of(message))
    return [item for item in items if item["type"] != "text"]


def _files(kind: str, listing: tuple[str, Any], places: int) -> list[Any]:
    key, value = listing
    entries = _as_list(value)
    if key == "video" and places <= 1 and entries is value and not all(map(_is_clip, entries)):
        entries = [entries]  # the frames of one clip
    return collect(
        lambda entry: parse_file(entry, kind), entries, lambda number: f"{key}, number {number}: "
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_clip(entry: Any) -> bool:
    name = entry.get("path") if isinstance(entry, dict) else entry
    return isinstance(name, list) or (
        isinstance(name, str) and PurePath(name).suffix.lower() in CLIPS
    )


def _filled(message: Message, queues: Mapping[str, Iterator[tuple[int, Any]]]) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return message
    items = collect(lambda item: _with_next(item, queues), content)
    if message["role"] == "assistant" and any(item["type"] != "text" for item in items):
        raise Findings("an answer that shows a picture or a clip, or holds a sound")
    return {"role": message["role"], "content": items}


def _with_next(
    item: Mapping[str, Any], queues: Mapping[str, Iterator[tuple[int, Any]]]
) -> Mapping[str, Any]:
    kind = item["type"]
    if kind == "text" or item[kind] is not None:
        return item
    number, file = next(queues[kind])
    if item.get("index", number) != number:
        raise Findings(
            f"an item takes {kind} {number}, counted from 0, but says index {item['index']!r}"
        )
    return with_file(item, file)


def _before_question(messages: Sequence[Message], items: list[dict[str, Any]]) -> list[Message]:
    """Messages with items at the beginning of the first question."""
    place = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if place is None:
        raise Findings(f"no human turn to show the {items[0]['type']} in")
    question = messages[place]
    content = question["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    shown = {"role": "user", "content": [*items, *content]}
    return [*messages[:place], shown, *messages[place + 1 :]]
