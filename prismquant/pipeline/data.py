"""Calibration and evaluation data: from files to samples that are known to be whole.

:func:`read_samples` reads chat messages, LLaVA-style conversations, plain text or a Hugging Face
dataset and checks everything that can be checked without a model: structure, ids, every picture
and clip. Hours of work must not end at a missing file, and a user should see all the broken lines
of a file at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from prismquant.errors import DataError
from prismquant.pipeline.video import (
    probe_video,
    read_picture,
)

Kind = Literal["text", "image", "video"]
Message = Mapping[str, Any]

KINDS: tuple[Kind, ...] = ("text", "image", "video")
_MAX_FINDINGS = 10
_EXCERPT = 60
_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_MARKER = re.compile(r"<(image|video)>")
# How many rows of a streamed dataset are looked at for each sample that is wanted: enough to find
# all kinds.
_STREAM_FACTOR = 8
_TYPE_KEYS = ("type", "topic")


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        id: Unique within its source.
        kind: ``video`` if it shows any clip, else ``image`` if it shows any picture, else ``text``.
        messages: Each holds ``role`` and ``content``: a string, or a list of items
            ``{"type": "text", "text": ..}``, ``{"type": "image", "image": path}`` and
            ``{"type": "video", "video": path or list of frame paths, "fps": optional}``; fps is the
            rate of the frames in the list, or the one at which to take frames from the file.
            Pictures of a Hugging Face dataset stand in place of paths.
        folder: Relative paths start here.
        meta: Whatever else the source says of the sample.
    """

    id: str
    kind: Kind
    messages: tuple[Message, ...]
    folder: Path
    meta: Mapping[str, Any]

    @property
    def type(self) -> str:
        """Type of task, from ``type`` or ``topic`` of the metadata; empty if they name none."""
        return next((str(self.meta[key]) for key in _TYPE_KEYS if self.meta.get(key)), "")

    @property
    def answer(self) -> str | None:
        """Text of the assistant message that ends the conversation, if one does."""
        return text_of(self.messages[-1]) if self.messages[-1]["role"] == "assistant" else None


# Reading


class _Finding(Exception):  # noqa: N818
    """Something wrong with one sample; gathered into one DataError."""


@dataclass(frozen=True)
class _Row:
    """One record of a source and where it stands."""

    where: str
    number: int
    value: Any


def read_samples(
    source: str | Path, *, limit: int | None = None, seed: int = 0, require_answers: bool = False
) -> tuple[Sample, ...]:
    """Read samples and check them completely.

    Args:
        source: A ``.jsonl`` file of chat messages, a ``.json`` file in LLaVA's style, a ``.txt``
            file whose paragraphs become text samples, or the name of a Hugging Face dataset
            (``name`` or ``name:split``, or a folder that ``datasets`` reads).
        limit: At most this many samples, spread evenly over the kinds that are there; chosen by
            ``seed`` and the ids alone, in the order of the source.
        seed: Chooses among the possible subsets.
        require_answers: Every sample must end with an assistant message that says something.

    Raises:
        DataError: The source is missing, empty or broken; names up to ten findings, each with its
        line.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} samples leaves nothing", remedy="a limit of 1 or more")
    name = str(source)
    rows, folder, findings = _read_rows(source, limit, seed)
    found: list[tuple[str, Sample]] = []
    for row in rows:
        try:
            found.append((row.where, _parse(row, folder, Path(name).stem)))
        except _Finding as finding:
            findings.append(f"{row.where}: {finding}")
    findings += _duplicate_ids(found)
    if not found and not findings:
        raise DataError(
            f"{name} holds no samples",
            where=name,
            remedy="one JSON object with 'messages' on each line of a .jsonl file",
        )
    keep = {sample.id for sample in balanced_subset([sample for _, sample in found], limit, seed)}
    chosen = [(where, sample) for where, sample in found if sample.id in keep]
    findings += _check(chosen, require_answers)
    if findings:
        raise _findings_error(name, findings)
    return tuple(sample for _, sample in chosen)


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
        needed: Any of ``text`` (a sample without pictures), ``image``, ``video``, and ``vision``
            (either).

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
        present |= shown | ({"vision"} if shown else {"text"})
        counts[sample.kind] += 1
    if missing := sorted(set(needed) - present):
        listed = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
        raise DataError(
            f"the recipe needs {' and '.join(missing)} samples, but the data hold none ({listed})",
            remedy=f"add {' and '.join(missing)} samples to the calibration data, or leave these "
            "parts of the model in floating point; weights alone can be rounded without any: "
            "on_failure: rtn (--on-failure rtn)",
        )


def fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 over the messages and over the bytes of every picture and clip they name.

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
        digest.update(b"\n")
    return digest.hexdigest()


def _read_rows(
    source: str | Path, limit: int | None, seed: int
) -> tuple[list[_Row], Path, list[str]]:
    path = Path(source)
    readers: dict[str, Callable[[str], tuple[list[_Row], list[str]]]] = {
        ".jsonl": _rows_of_jsonl,
        ".json": _rows_of_json,
        ".txt": _rows_of_text,
    }
    reader = readers.get(path.suffix.lower())
    if path.is_file():
        if reader is None:
            raise DataError(
                f"{path.name} is no kind of data file that can be read",
                where=str(path),
                remedy=f"name it by what it holds: {', '.join(sorted(readers))}",
            )
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path.name} cannot be read: {error}",
                where=str(path),
                remedy="data files are text in UTF-8",
            ) from error
        rows, findings = reader(text)
        return rows, path.parent, findings
    if reader is not None or (path.is_absolute() and not path.is_dir()) or str(source)[:1] == ".":
        raise DataError(f"data file {source} is missing", where=str(path), remedy="check the path")
    return _rows_of_dataset(str(source), limit, seed), Path(), []


def _rows_of_jsonl(text: str) -> tuple[list[_Row], list[str]]:
    rows, findings = [], []
    # Not splitlines(): it would also break at separators that JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_Row(f"line {number}", number, json.loads(line)))
        except json.JSONDecodeError as error:
            findings.append(_broken_json(number, error, line))
    return rows, findings


def _broken_json(number: int, error: json.JSONDecodeError, line: str) -> str:
    place = f"{error.msg} at column {error.colno}"
    return f"line {number}: no valid JSON ({place}): {excerpt(line)}"


def _rows_of_json(text: str) -> tuple[list[_Row], list[str]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return [], [_broken_json(error.lineno, error, text.split("\n")[error.lineno - 1])]
    if not isinstance(value, list):
        return [], ["the file holds no list of samples"]
    return [_Row(f"entry {i}", i, entry) for i, entry in enumerate(value, start=1)], []


def _rows_of_text(text: str) -> tuple[list[_Row], list[str]]:
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text.replace("\r\n", "\n"))]
    rows = [
        _Row(f"paragraph {i}", i, {"messages": [{"role": "user", "content": paragraph}]})
        for i, paragraph in enumerate((part for part in paragraphs if part), start=1)
    ]
    return rows, []


def _rows_of_dataset(name: str, limit: int | None, seed: int) -> list[_Row]:
    """Rows of a Hugging Face dataset; streamed, so that a limit also limits the download."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"no file {name!r}, and reading it as a Hugging Face dataset needs 'datasets'",
            where=name,
            remedy="check the path, or pip install 'prismquant[eval]'",
        ) from error
    repository, _, split = name.partition(":")
    try:
        table: Any = datasets.load_dataset(repository, split=split or "train", streaming=True)
        if limit is not None:
            table = table.shuffle(seed=seed, buffer_size=limit * _STREAM_FACTOR)
            table = table.take(limit * _STREAM_FACTOR)
        return [_Row(f"row {i}", i, dict(row)) for i, row in enumerate(table, start=1)]
    # Whatever is wrong (no network, no such name, no such split), datasets has its own exceptions
    # for it.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"no file {name!r}, and no Hugging Face dataset of that name can be read: {reason}",
            where=name,
            remedy="check the path, or the name (name:split for splits other than 'train') and the "
            "network",
        ) from error


# Records


def _parse(row: _Row, folder: Path, stem: str) -> Sample:
    value = row.value
    if not isinstance(value, dict):
        raise _Finding(f"a sample is an object, not {excerpt(json.dumps(value, default=str))}")
    if "messages" in value:
        used, messages = {"messages", "images", "videos"}, _chat_messages(value)
    elif "conversations" in value:
        used, messages = {"conversations", "image", "video"}, _llava_messages(value)
    elif "question" in value:
        used, messages = {"question", "answer", "image", "video"}, _question_messages(value)
    else:
        keys = ", ".join(sorted(map(str, value))) or "nothing"
        raise _Finding(
            f"neither 'messages' nor 'conversations' nor 'question' is there, only {keys}"
        )
    identity = value.get("id")
    meta = {str(k): v for k, v in value.items() if k not in used and k not in ("id", "kind")}
    parsed = tuple(_message(message, number) for number, message in enumerate(messages, start=1))
    if not parsed:
        raise _Finding("the conversation is empty")
    return Sample(
        id=f"{stem}-{row.number}" if identity is None else str(identity),
        kind=_kind(parsed),
        messages=parsed,
        folder=folder,
        meta=meta,
    )


def _chat_messages(value: Mapping[str, Any]) -> list[Any]:
    """Messages as they are; items without a file take the next of 'images' or 'videos'."""
    messages = value["messages"]
    if not isinstance(messages, list):
        raise _Finding("'messages' is not a list")
    spare = {kind: iter(_as_list(value.get(f"{kind}s"))) for kind in ("image", "video")}

    def filled(item: Any) -> Any:
        if not isinstance(item, dict) or (kind := item.get("type")) not in spare:
            return item
        if any(item.get(key) is not None for key in (kind, "path", "url")):
            return item
        taken = next(spare[kind], None)
        return item if taken is None else {"type": kind, kind: taken}

    return [
        message | {"content": [filled(item) for item in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _llava_messages(value: Mapping[str, Any]) -> list[Any]:
    """Turns of ``{from, value}``; each ``<image>`` or ``<video>`` stands for the next file."""
    turns = value["conversations"]
    if not isinstance(turns, list):
        raise _Finding("'conversations' is not a list")
    texts = [str(turn.get("value", "")) if isinstance(turn, dict) else "" for turn in turns]
    media: dict[str, list[Any]] = {}
    for kind in ("image", "video"):
        markers = sum(text.count(f"<{kind}>") for text in texts)
        files = _as_list(value.get(kind))
        if kind == "video" and markers <= 1 < len(files) and isinstance(files[0], str):
            files = [files]  # the frames of one clip
        if markers and markers != len(files):
            raise _Finding(f"{markers} <{kind}> markers, but {len(files)} {kind} files")
        media[kind] = files
    whole = "".join(texts)
    loose = [kind for kind, files in media.items() if files and f"<{kind}>" not in whole]
    iterators = {kind: iter(files) for kind, files in media.items()}
    messages: list[Any] = []
    for turn, text in zip(turns, texts, strict=True):
        if not isinstance(turn, dict) or "from" not in turn:
            raise _Finding("a turn of 'conversations' has no 'from'")
        role = _LLAVA_ROLES.get(str(turn["from"]), str(turn["from"]))
        items: list[Any] = []
        if role == "user" and loose:  # without a marker, a picture comes before the first question
            items += [{"type": kind, kind: file} for kind in loose for file in iterators[kind]]
            loose = []
        items += _split_markers(text, iterators)
        plain = all(item["type"] == "text" for item in items)
        content: Any = "".join(item["text"] for item in items) if plain else items
        messages.append({"role": role, "content": content})
    if loose:
        raise _Finding(f"no human turn to show the {loose[0]} in")
    return messages


def _split_markers(text: str, iterators: Mapping[str, Iterator[Any]]) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    pieces = _MARKER.split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            # A marker always has a line or a space of its own: it belongs to the marker, not to
            # the text.
            items.append({"type": piece, piece: next(iterators[piece])})
        elif stripped := (piece.strip() if len(pieces) > 1 else piece):
            items.append({"type": "text", "text": stripped})
    return items


def _question_messages(value: Mapping[str, Any]) -> list[Any]:
    items: list[dict[str, Any]] = [
        {"type": kind, kind: file}
        for kind in ("image", "video")
        for file in _as_list(value.get(kind))
    ]
    items.append({"type": "text", "text": value["question"]})
    messages: list[Any] = [{"role": "user", "content": items}]
    answer = value.get("answer")
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if answer is not None:
        messages.append({"role": "assistant", "content": str(answer)})
    return messages


def _message(message: Any, number: int) -> Message:
    """One message in the form that :class:`Sample` describes."""
    if not isinstance(message, dict):
        raise _Finding(f"message {number} is no object")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise _Finding(f"message {number} has no role")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list) or not content:
        raise _Finding(f"message {number} ({role}) has no content")
    items = [_item(item, number) for item in content]
    if role == "assistant" and any(item["type"] != "text" for item in items):
        raise _Finding(f"message {number} is an answer that shows a picture or a clip")
    return {"role": role, "content": items}


def _item(item: Any, number: int) -> dict[str, Any]:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind == "image_url":
        url = item.get("image_url")
        return _item(
            {"type": "image", "image": url["url"] if isinstance(url, dict) else url}, number
        )
    if kind in ("image", "video"):
        file = next((item[key] for key in (kind, "path", "url") if item.get(key) is not None), None)
        result = {"type": kind, kind: _file(file, kind, number)}
        if kind == "video" and item.get("fps") is not None:
            if not isinstance(item["fps"], int | float) or item["fps"] <= 0:
                raise _Finding(
                    f"message {number}: fps of a clip is a positive number, not {item['fps']!r}"
                )
            result["fps"] = float(item["fps"])
        return result
    raise _Finding(
        f"message {number}: an item is of type text, image or video, not {excerpt(repr(item))}"
    )


def _file(file: Any, kind: str, number: int) -> Any:
    """A path, a picture, or for clips a list of them."""
    if isinstance(file, Image.Image) and kind == "image":
        return file
    if isinstance(file, list | tuple) and kind == "video" and file:
        return [frame if isinstance(frame, Image.Image) else _path(frame, number) for frame in file]
    return _path(file, number)


def _path(value: Any, number: int) -> str:
    if not isinstance(value, str) or not value:
        raise _Finding(
            f"message {number}: a file is named by its path, not by {excerpt(repr(value))}"
        )
    if re.match(r"(https?|data|s3|gs|hf):", value):
        raise _Finding(f"message {number}: {excerpt(value)} is not a local file; download it first")
    return value.removeprefix("file://")


def _kind(messages: Iterable[Message]) -> Kind:
    shown = {item["type"] for message in messages for item in _items(message)}
    return "video" if "video" in shown else "image" if "image" in shown else "text"


def _items(message: Message) -> list[Mapping[str, Any]]:
    content = message["content"]
    return [] if isinstance(content, str) else list(content)


def text_of(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(item["text"] for item in content if item["type"] == "text")


def media_of(sample: Sample) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every picture and clip of a sample in order: its kind and its item."""
    for message in sample.messages:
        for item in _items(message):
            if item["type"] != "text":
                yield item["type"], item


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def located(file: Any, sample: Sample) -> Any:
    """A path from the sample's folder; pictures in memory as they are."""
    return file if isinstance(file, Image.Image) else sample.folder / file


def _rank(identity: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{identity}".encode()).digest()


def _item_digest(item: Mapping[str, Any], sample: Sample) -> list[Any]:
    if item["type"] == "text":
        return ["text", item["text"]]
    file = item[item["type"]]
    if not isinstance(file, list):
        return [item["type"], _file_digest(located(file, sample), sample), item.get("fps")]
    frames = [_file_digest(located(frame, sample), sample) for frame in file]
    return ["frames", frames, item.get("fps")]


def _file_digest(file: Any, sample: Sample) -> str:
    if isinstance(file, Image.Image):
        head = f"{file.mode}/{file.size[0]}x{file.size[1]}/".encode()
        return hashlib.sha256(head + file.tobytes()).hexdigest()
    try:
        with Path(file).open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror}", where=f"sample {sample.id}"
        ) from error


def excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 2] + ".."


# Findings


def _duplicate_ids(found: Sequence[tuple[str, Sample]]) -> list[str]:
    first: dict[str, str] = {}
    findings = []
    for where, sample in found:
        if sample.id in first:
            findings.append(f"{where}: id {sample.id!r} is already taken by {first[sample.id]}")
        first.setdefault(sample.id, where)
    return findings


def _check(chosen: Sequence[tuple[str, Sample]], require_answers: bool) -> list[str]:
    """Findings about answers and files; a file that many samples share is read once."""
    findings: list[str] = []
    sizes: dict[Path, tuple[int, int]] = {}
    for where, sample in chosen:
        if require_answers and not sample.answer:
            findings.append(
                f"{where}: the conversation does not end with an answer of the assistant"
            )
        for kind, item in media_of(sample):
            try:
                if kind == "video" and not isinstance(item["video"], list):
                    probe_video(sample.folder / item["video"])
                    continue
                files = item["video"] if kind == "video" else [item["image"]]
                seen = {_picture_size(located(file, sample), sizes) for file in files}
                if len(seen) > 1:
                    listed = ", ".join(f"{width}x{height}" for width, height in sorted(seen))
                    findings.append(f"{where}: frames of one clip differ in size: {listed}")
            except DataError as error:
                remedy = f" ({error.remedy})" if error.remedy else ""
                findings.append(f"{where}: {error.what}{remedy}")
        if len(findings) > _MAX_FINDINGS:
            break
    return findings


def _picture_size(file: Any, sizes: dict[Path, tuple[int, int]]) -> tuple[int, int]:
    """Read a picture to its last byte, as headers alone do not show that it was cut off."""
    if isinstance(file, Image.Image):
        return file.size
    if file not in sizes:
        sizes[file] = read_picture(file).size
    return sizes[file]


def _findings_error(name: str, findings: list[str]) -> DataError:
    shown = findings[:_MAX_FINDINGS]
    if len(findings) > _MAX_FINDINGS:
        shown.append("and more")
    count = f"{len(findings)} finding{'s' * (len(findings) > 1)}"
    if len(findings) > _MAX_FINDINGS:
        count = f"more than {_MAX_FINDINGS} findings"
    return DataError(
        f"{Path(name).name} cannot be used, {count}:\n"
        + "\n".join(f"  - {line}" for line in shown),
        where=name,
        remedy="correct or remove these samples; nothing was started",
    )
