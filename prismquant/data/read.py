"""From a source to samples that are known to be whole, or one error that names all that is not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from prismquant.data.dialects import conversation_of
from prismquant.data.items import MEDIA, parse_message
from prismquant.data.pictures import check_picture
from prismquant.data.places import listed, place_files
from prismquant.data.row_findings import Findings, RowFinding, collect, findings_error
from prismquant.data.rows import Row, read_rows
from prismquant.data.samples import (
    Message,
    Sample,
    balanced_subset,
    excerpt,
    kind_of,
    located,
    media_of,
)
from prismquant.data.sound import probe_sound
from prismquant.data.unused import leaves, misspelt, require_nothing_lost
from prismquant.data.video import probe_video
from prismquant.errors import DataError

# Read by nobody: what a sample shows says what kind it is.
_OWN_KEYS = ("id", "kind")


class TextCutter(Protocol):
    """Cutter of running text into samples; see :class:`prismquant.data.windows.Windows`."""

    def cut(self, texts: Sequence[Sample]) -> Sequence[Sequence[Sample]]:
        """Parts of each of a source's running texts, each a sample."""

    def require_use(self, samples: Sequence[Sample], source: str) -> None:
        """Refuse samples among which there is nothing to cut, though that was asked for."""


def read_samples(
    source: str | Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    require_answers: bool = False,
    most_bytes: int | None = None,
    windows: TextCutter | None = None,
) -> tuple[Sample, ...]:
    """Read samples and check them completely.

    Args:
        source: A ``.jsonl`` file with a conversation on each line, a ``.json`` file with a list of
            them, a ``.txt`` file of running text, or the name of a Hugging Face dataset
            (``name`` or ``name:split``, or a folder that ``datasets`` reads). docs/data.md says how
            conversations are written.
        limit: At most this many samples, spread evenly over the kinds that are there; chosen by
            ``seed`` and the ids alone, in the order of the source.
        seed: Chooses among the possible subsets.
        require_answers: Every sample must end with an assistant message that says something.
        most_bytes: Memory that reading a picture may take, which is known before any is decoded.
        windows: Cuts running text; without it a document is one sample.

    Raises:
        DataError: The source is missing, empty or broken; names up to ten findings, each with its
        row, and counts the rest.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} samples leaves nothing", remedy="a limit of 1 or more")
    name = str(source)
    rows, folder = read_rows(source, limit, seed)
    findings: list[RowFinding] = []
    found: list[tuple[str, Sample]] = []
    for row in rows:
        if isinstance(row, RowFinding):
            findings.append(row)
            continue
        try:
            found.append((row.where, sample_of(row, folder, Path(name).stem)))
        except Findings as wrong:
            findings += [RowFinding(row.where, line) for line in wrong.lines]
    findings += _duplicate_ids(found)
    if not found and not findings:
        raise DataError(
            f"{name} holds no samples",
            where=name,
            remedy="a .txt file holds running text"
            if name.endswith(".txt")
            else "one JSON object with 'messages' on each line of a .jsonl file",
        )
    if windows is not None and not findings:
        found = _cut(found, windows, name)
    keep = {sample.id for sample in balanced_subset([sample for _, sample in found], limit, seed)}
    chosen = [(where, sample) for where, sample in found if sample.id in keep]
    findings += _check(chosen, require_answers, most_bytes)
    if findings:
        raise findings_error(name, findings)
    return tuple(sample for _, sample in chosen)


def samples_of_messages(
    conversations: Mapping[str, Sequence[Any]], source: str, *, most_bytes: int | None = None
) -> tuple[Sample, ...]:
    """Samples of conversations in memory, checked as those of a file are.

    Args:
        conversations: Messages with ``role`` and ``content``, by the id of their sample. Paths
            start at the current folder; ``<image>`` in a text is a word like others.
        source: Name of all of them, for people.
        most_bytes: Memory that reading a picture may take.

    Raises:
        DataError: There are none, or something is wrong with them; names up to ten findings.
    """
    if not conversations:
        raise DataError(f"{source} holds no samples", where=source)
    findings: list[RowFinding] = []
    found: list[tuple[str, Sample]] = []
    for name, values in conversations.items():
        try:
            messages = _messages(values, {}, ())
        except Findings as wrong:
            findings += [RowFinding(name, line) for line in wrong.lines]
        else:
            found.append((name, Sample(name, kind_of(messages), messages, Path(), {})))
    findings += _check(found, require_answers=False, most_bytes=most_bytes)
    if findings:
        raise findings_error(source, findings)
    return tuple(sample for _, sample in found)


def _cut(
    found: Sequence[tuple[str, Sample]], windows: TextCutter, source: str
) -> list[tuple[str, Sample]]:
    """The same samples, but running text in windows.

    Raises:
        DataError: There is none, and a length of windows was asked for; or it has no tokens.
    """
    windows.require_use([sample for _, sample in found], source)
    cut = iter(windows.cut([sample for _, sample in found if sample.running]))
    parts = [
        (where, part)
        for where, sample in found
        for part in (next(cut) if sample.running else [sample])
    ]
    if found and not parts:
        raise DataError("the text has no two tokens", where=source, remedy="give more text")
    return parts


def sample_of(row: Row, folder: Path, stem: str) -> Sample:
    """The sample that a row holds; its files are not looked at.

    Args:
        row: A row of any dialect.
        folder: Where its relative paths start.
        stem: Begins the ids of rows without one.

    Raises:
        Findings: All that is wrong with it.
    """
    value = row.value
    if not isinstance(value, dict):
        raise Findings(f"a sample is an object, not {excerpt(repr(value))}")
    found = leaves(value)
    conversation = conversation_of(value)
    if not conversation.messages:
        raise Findings("the conversation is empty")
    lists = {kind: listing for kind in MEDIA if (listing := listed(value, kind))}
    lines = misspelt(value, conversation.head)
    messages: tuple[Message, ...] = ()
    try:
        messages = _messages(conversation.messages, lists, () if row.running else MEDIA)
        require_nothing_lost(value, found, conversation, messages)
    except Findings as wrong:
        lines += wrong.lines
    if lines:
        raise Findings(*lines)
    used = {*conversation.used, *_OWN_KEYS, *(key for key, _ in lists.values())}
    return Sample(
        id=f"{stem}-{row.number}" if value.get("id") is None else _identity(value["id"]),
        kind=kind_of(messages),
        messages=messages,
        folder=folder,
        meta={str(key): part for key, part in value.items() if key not in used},
        running=row.running,
    )


def _messages(
    values: Sequence[Any], lists: Mapping[str, tuple[str, Any]], markers: Collection[str]
) -> tuple[Message, ...]:
    parsed = collect(
        lambda value: parse_message(value, markers, tuple(lists)),
        values,
        lambda number: f"message {number}: ",
    )
    return place_files(parsed, lists)


def _identity(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Findings(f"an id is a text or a number, not {excerpt(repr(value))}")
    return str(value)


def _duplicate_ids(found: Sequence[tuple[str, Sample]]) -> list[RowFinding]:
    first: dict[str, str] = {}
    findings = []
    for where, sample in found:
        if sample.id in first:
            what = f"id {sample.id!r} is already taken by {first[sample.id]}"
            findings.append(RowFinding(where, what))
        first.setdefault(sample.id, where)
    return findings


def _check(
    chosen: Sequence[tuple[str, Sample]], require_answers: bool, most_bytes: int | None
) -> list[RowFinding]:
    """Findings about answers and files; a file that many samples share is read once."""
    findings: list[RowFinding] = []
    seen: dict[Path, tuple[int, int]] = {}
    for where, sample in chosen:
        if require_answers and not sample.answer:
            what = "the conversation does not end with an answer of the assistant"
            findings.append(RowFinding(where, what))
        for kind, item in media_of(sample):
            files = item[kind] if isinstance(item[kind], list) else [item[kind]]
            if kind == "audio":
                findings += _sound_findings(where, files, sample)
                continue
            is_clip_file = kind == "video" and not isinstance(item[kind], list)
            try:
                sizes = {_size(file, sample, is_clip_file, seen, most_bytes) for file in files}
            except DataError as error:
                remedy = f" ({error.remedy})" if error.remedy else ""
                findings.append(RowFinding(where, f"{error.what}{remedy}"))
                continue
            if len(sizes) > 1:
                listed_sizes = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
                findings.append(
                    RowFinding(where, f"frames of one clip differ in size: {listed_sizes}")
                )
    return findings


def _sound_findings(where: str, files: Sequence[str], sample: Sample) -> list[RowFinding]:
    """Findings about sounds, which are only opened."""
    try:
        for file in files:
            probe_sound(sample.folder / file)
    except DataError as error:
        remedy = f" ({error.remedy})" if error.remedy else ""
        return [RowFinding(where, f"{error.what}{remedy}")]
    return []


def _size(
    file: Any,
    sample: Sample,
    is_clip_file: bool,
    seen: dict[Path, tuple[int, int]],
    most_bytes: int | None,
) -> tuple[int, int]:
    """Width and height of a picture that is whole; a clip is only opened."""
    place = located(file, sample)
    if not isinstance(place, Path):
        return check_picture(place, most_bytes)
    if place not in seen:
        if is_clip_file:
            probe_video(place)
        seen[place] = (0, 0) if is_clip_file else check_picture(place, most_bytes)
    return seen[place]
