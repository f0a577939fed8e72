"""Samples: what calibration and evaluation read, and what can be asked of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, cast

from PIL import Image

from prismquant.data.pictures import EmbeddedPicture, Source
from prismquant.errors import DataError
from prismquant.opening import open_regular

Kind = Literal["text", "audio", "image", "video"]
Message = Mapping[str, Any]

KINDS: tuple[Kind, ...] = ("text", "audio", "image", "video")
_EXCERPT = 60
_TYPE_KEYS = ("type", "topic")


@dataclass(frozen=True)
class TextCut:
    """All running text of a source as it was cut, before a limit chose among its windows.

    Attributes:
        size: Tokens of a window.
        windows: Count of windows of that size.
        short: Count of documents with fewer tokens, each taken whole.
        tokens: Tokens of all documents.
        form_feeds: Form feeds that do not stand alone on their line, and so end no document.
    """

    size: int
    windows: int
    short: int
    tokens: int
    form_feeds: int


@dataclass(frozen=True)
class Window:
    """Part of a running text.

    Attributes:
        tokens: Ids of its tokens.
        document: Id of the document that it was cut from.
        left: Tokens at that document's end that fill no window.
        short: Whether it is a whole document with fewer tokens than a window has.
        source: How all running text of its source was cut.
    """

    tokens: tuple[int, ...]
    document: str
    left: int
    short: bool
    source: TextCut


@dataclass(frozen=True)
class Sample:
    """One conversation, or a part of a running text.

    Attributes:
        id: Unique within its source.
        kind: ``video`` if it shows any clip, else ``image`` if it shows any picture, else ``audio``
            if it holds any sound, else ``text``.
        messages: Each holds ``role`` (``system``, ``user``, ``assistant`` or ``tool``) and
            ``content``: a string, or a list of items ``{"type": "text", "text": ..}``,
            ``{"type": "image", "image": path}``, ``{"type": "audio", "audio": path}`` and
            ``{"type": "video", "video": path or list of frame paths}``. Pictures of a dataset (of
            PIL, or embedded) stand in place of paths.
            Items also hold the options that the row gives for them, typed and checked: positive
            ints ``min_pixels``, ``max_pixels``, ``resized_height``, ``resized_width``, and of clips
            ``total_pixels``, ``nframes``, ``min_frames``, ``max_frames`` and the floats ``fps``,
            ``video_start``, ``video_end``; fps is the rate of the frames in a list, or the one at
            which to take frames from a file.
        folder: Relative paths start here.
        meta: Whatever else the source says of the sample.
        running: It is running text, which no chat template writes: its only message is what the
            model is to say, token by token.
        window: The part of a running text that it is; None for a whole one.
    """

    id: str
    kind: Kind
    messages: tuple[Message, ...]
    folder: Path
    meta: Mapping[str, Any]
    running: bool = False
    window: Window | None = None

    @property
    def type(self) -> str:
        """Type of task, from ``type`` or ``topic`` of the metadata; empty if they name none."""
        named = (self.meta.get(key) for key in _TYPE_KEYS)
        return next((str(name) for name in named if name and isinstance(name, str | int)), "")

    @property
    def answer(self) -> str | None:
        """Text of the assistant message that ends the conversation, if one does."""
        return text_of(self.messages[-1]) if self.messages[-1]["role"] == "assistant" else None


def balanced_subset(
    samples: Sequence[Sample], limit: int | None, seed: int = 0
) -> tuple[Sample, ...]:
    """At most ``limit`` samples, in their order, with the kinds as even as they can be.

    Which ones depends on the seed and their ids, not on the order or on Python's random numbers.
    """
    if limit is None or limit >= len(samples):
        return tuple(samples)
    pools: dict[str, list[Sample]] = {}
    for sample in samples:
        pools.setdefault(sample.kind, []).append(sample)
    ranked = {kind: sorted(pool, key=lambda s: _rank(s.id, seed)) for kind, pool in pools.items()}
    keep: set[int] = set()
    depth = 0
    while len(keep) < limit:
        layer = [ranked[kind][depth] for kind in KINDS if depth < len(ranked.get(kind, ()))]
        keep.update(id(sample) for sample in layer[: limit - len(keep)])
        depth += 1
    return tuple(sample for sample in samples if id(sample) in keep)


def require_modalities(samples: Iterable[Sample], needed: Collection[str]) -> None:
    """Make sure that the samples show what a recipe has to calibrate.

    Args:
        samples: What was read.
        needed: Any of ``text`` (a sample without pictures), ``audio``, ``image``, ``video``, and
            ``vision`` (either of the last two).

    Raises:
        DataError: Something that is needed does not occur, or is no known word.
    """
    known = {*KINDS, "vision"}
    if unknown := set(needed) - known:
        raise DataError(
            f"unknown modality {min(unknown)!r}", remedy=f"known: {', '.join(sorted(known))}"
        )
    present: set[str] = set()
    counts: Counter[str] = Counter()
    for sample in samples:
        shown = {kind for kind, _ in media_of(sample)}
        present |= shown | ({"vision"} if shown - {"audio"} else {"text"})
        counts[sample.kind] += 1
    if missing := sorted(set(needed) - present):
        # Few models hear, so nobody misses sounds.
        listable = [kind for kind in KINDS if counts[kind] or kind != "audio"]
        listed = ", ".join(f"{counts[kind]} {kind}" for kind in listable)
        raise DataError(
            f"the recipe needs {' and '.join(missing)} samples, but the data hold none ({listed})",
            remedy=f"add {' and '.join(missing)} samples to the calibration data, or leave these "
            "parts of the model in floating point; weights alone can be rounded without any: "
            "on_failure: rtn (--on-failure rtn)",
        )


def fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 over messages, tokens of windows, and the bytes of every picture and clip.

    Paths and ids do not enter: the same data in another folder have the same fingerprint.

    Raises:
        DataError: A file is missing.
    """
    digest = hashlib.sha256()
    for sample in samples:
        for message in sample.messages:
            content = message["content"]
            items = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts = [_item_digest(item, sample) for item in items]
            line = json.dumps([message["role"], parts], ensure_ascii=True)
            digest.update(line.encode() + b"\n")
        if sample.window is not None:
            digest.update(json.dumps(sample.window.tokens).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def items_of(message: Message) -> list[Mapping[str, Any]]:
    """The items of a message; a message that is one string has none."""
    content = message["content"]
    return [] if isinstance(content, str) else list(content)


def kind_of(messages: Iterable[Message]) -> Kind:
    """Kind of a conversation, by what it shows."""
    shown = {item["type"] for message in messages for item in items_of(message)}
    return next((kind for kind in reversed(KINDS) if kind in shown), "text")


def text_of(message: Message) -> str:
    """The text of a message, without what it shows."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(item["text"] for item in content if item["type"] == "text")


def media_of(sample: Sample) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every picture, clip and sound of a sample in order: its kind and its item."""
    for message in sample.messages:
        for item in items_of(message):
            if item["type"] != "text":
                yield item["type"], item


def located(file: str | Image.Image | EmbeddedPicture, sample: Sample) -> Source:
    """A path from the sample's folder; pictures in memory as they are."""
    return sample.folder / file if isinstance(file, str) else file


def excerpt(text: str) -> str:
    """A text, or its beginning if it is long."""
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 2] + ".."


def _rank(identity: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{identity}".encode()).digest()


def _item_digest(item: Mapping[str, Any], sample: Sample) -> list[Any]:
    if item["type"] == "text":
        return ["text", item["text"]]
    kind = item["type"]
    options = {key: item[key] for key in sorted(item) if key not in ("type", kind, "fps")}
    # As it was before items had options: what does not use them keeps its fingerprint.
    rest = [item.get("fps"), options] if options else [item.get("fps")]
    file = item[kind]
    if not isinstance(file, list):
        return [kind, _file_digest(file, sample), *rest]
    return ["frames", [_file_digest(frame, sample) for frame in file], *rest]


def _file_digest(file: str | Image.Image | EmbeddedPicture, sample: Sample) -> str:
    if isinstance(file, EmbeddedPicture):
        return hashlib.sha256(file.data).hexdigest()
    if isinstance(file, Image.Image):
        head = f"{file.mode}/{file.size[0]}x{file.size[1]}/".encode()
        return hashlib.sha256(head + file.tobytes()).hexdigest()
    path = sample.folder / file
    try:
        with open_regular(path) as handle:
            return hashlib.file_digest(cast("BufferedReader", handle), "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", where=f"sample {sample.id}"
        ) from error
