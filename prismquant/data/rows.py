"""Rows of a data file or of a Hugging Face dataset, before anybody asks what they mean."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismquant.data.named_texts import NAMED_TEXTS, NamedText
from prismquant.data.row_findings import RowFinding
from prismquant.data.samples import excerpt
from prismquant.errors import DataError
from prismquant.opening import parse_json, read_bounded, require_regular

# The largest published mixtures of conversations have some 2 GB.
_MOST_BYTES = 8 << 30
# How many rows of a streamed dataset are looked at for each sample that is wanted: enough to find
# all kinds.
_STREAM_FACTOR = 8
_OTHER_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True)
class Row:
    """One record of a source.

    Attributes:
        where: Its place, for people.
        number: Its place, counted from 1.
        value: What it holds.
        running: It is running text, which names no files: ``<image>`` in it is a word like others.
    """

    where: str
    number: int
    value: Any
    running: bool = False


_Rows = list[Row | RowFinding]

_LIST_START = re.compile(r"\s*\[\s*")
_LIST_NEXT = re.compile(r"\s*,?\s*")
_DOCUMENT_END = re.compile(r"^\f[ \t]*(?:\n|\Z)", re.MULTILINE)


def read_rows(source: str | Path, limit: int | None, seed: int) -> tuple[_Rows, Path]:
    """Rows of a source, or what is wrong with them, and the folder where relative paths start.

    Args:
        source: As :func:`prismquant.data.read_samples` takes it.
        limit: How many samples are wanted; a dataset is read only as far as that needs.
        seed: Chooses among the rows of a dataset.

    Raises:
        DataError: There is nothing of this name, or it cannot be read at all.
    """
    name, path = str(source), Path(source)
    status = _status(path) if name else None
    reader = _READERS.get(path.suffix.lower())
    if status is not None and (reader is not None or not stat.S_ISDIR(status.st_mode)):
        return _rows_of_file(path, status), path.parent
    if not name or reader is not None or name[:1] == "." or (path.is_absolute() and not status):
        raise DataError(f"data file {name!r} is missing", where=name, remedy="check the path")
    text = NAMED_TEXTS.get(name.partition(":")[0])
    rows = _rows_of_named(name, text, limit, seed) if text else _rows_of_dataset(name, limit, seed)
    return rows, Path()


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # no permission, too long, a zero byte
        raise _unreadable(path, error) from error


def _rows_of_file(path: Path, status: os.stat_result) -> _Rows:
    try:
        require_regular(status, path)
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(
                f"{path.name} is no kind of data file that can be read",
                where=str(path),
                remedy=f"name it by what it holds: {', '.join(sorted(_READERS))}",
            )
        data = read_bounded(path, _MOST_BYTES)
        if data.startswith(_OTHER_ENCODINGS):
            raise _unreadable(path, "it is in UTF-16 or UTF-32")
        return reader(data.removeprefix(codecs.BOM_UTF8))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, reason: Exception | str) -> DataError:
    said = getattr(reason, "strerror", None) or str(reason)
    return DataError(
        f"{path.name} cannot be read: {said}",
        where=str(path),
        remedy="data are regular files of text in UTF-8",
    )


def _rows_of_jsonl(data: bytes) -> _Rows:
    # Not splitlines(): it would also break at separators that JSON allows inside strings.
    lines = enumerate(data.split(b"\n"), start=1)
    return _parsed("line", ((number, line) for number, line in lines if line.strip()))


def _rows_of_json(data: bytes) -> _Rows:
    text = data.decode()
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        hint = "; objects on lines of their own are a .jsonl file" * (error.msg == "Extra data")
        return [RowFinding(f"line {error.lineno}", _no_json(error, line) + hint)]
    except ValueError as error:  # one entry is at fault: its number helps more than the file's name
        try:
            return _parsed("entry", list(_entries(text)))
        except (ValueError, RecursionError):
            return [RowFinding("the file", _no_json(error, text))]
    if not isinstance(value, list):
        return [RowFinding("the file", "it holds no list of samples")]
    return [Row(f"entry {i}", i, entry) for i, entry in enumerate(value, start=1)]


def _entries(text: str) -> Iterator[tuple[int, bytes]]:
    """Number and text of each entry of a list that is JSON, but for keys that occur twice."""
    start, number, decoder = _LIST_START.match(text), 0, json.JSONDecoder()
    if start is None:
        raise ValueError("no list")
    place = start.end()
    while text[place] != "]":
        number += 1
        _, end = decoder.raw_decode(text, place)
        yield number, text[place:end].encode()
        following = _LIST_NEXT.match(text, end)
        place = following.end() if following else end


def _parsed(label: str, texts: Iterable[tuple[int, bytes]]) -> _Rows:
    rows: _Rows = []
    for number, text in texts:
        where = f"{label} {number}"
        try:
            rows.append(Row(where, number, parse_json(text.decode())))
        except ValueError as error:
            rows.append(RowFinding(where, _no_json(error, text.decode(errors="replace"))))
    return rows


def _no_json(error: ValueError, text: str) -> str:
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    return f"no valid JSON ({reason}): {excerpt(text.strip())}"


def _rows_of_text(data: bytes) -> _Rows:
    """Documents of running text: a line that holds nothing but a form feed ends one."""
    documents = _DOCUMENT_END.split(data.decode().replace("\r\n", "\n"))
    return _documents([text for text in documents if text.strip()])


def _documents(texts: Sequence[str]) -> _Rows:
    return [
        Row(
            f"document {i}", i, {"messages": [{"role": "assistant", "content": text}]}, running=True
        )
        for i, text in enumerate(texts, start=1)
    ]


_READERS: dict[str, Callable[[bytes], _Rows]] = {
    ".jsonl": _rows_of_jsonl,
    ".json": _rows_of_json,
    ".txt": _rows_of_text,
}


def _rows_of_named(name: str, text: NamedText, limit: int | None, seed: int) -> _Rows:
    """Documents of a text that goes by a name."""
    datasets = _import_datasets(name)
    given = {"revision": text.revision} if text.revision else {}
    place = [text.repository, *filter(None, (text.subset,))]
    split = name.partition(":")[2] or text.split
    try:
        table = datasets.load_dataset(*place, split=split, streaming=True, **given)
        if text.joint is None and limit is not None:
            table = table.shuffle(seed=seed, buffer_size=limit * _STREAM_FACTOR)
            table = table.take(limit * _STREAM_FACTOR)
        documents = [str(row[text.column]) for row in table]
    # Whatever is wrong, datasets has its own exceptions for it.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"text {name!r}, {text.repository} on the Hugging Face hub, cannot be read: {reason}",
            where=name,
            remedy="give --calib FILE.txt, a file that holds it or another running text; or check "
            "the network",
        ) from error
    if text.joint is not None:
        documents = [text.joint.join(documents)]
    return _documents([one for one in documents if one.strip()])


def _import_datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"no file {name!r}, and reading it as a Hugging Face dataset needs 'datasets'",
            where=name,
            remedy="check the path, or pip install 'prismquant[eval]'",
        ) from error
    return datasets


def _rows_of_dataset(name: str, limit: int | None, seed: int) -> _Rows:
    """Rows of a Hugging Face dataset; streamed, so that a limit also limits the download."""
    datasets = _import_datasets(name)
    repository, _, split = name.partition(":")
    try:
        table: Any = datasets.load_dataset(repository, split=split or "train", streaming=True)
        if table.features:
            # Pictures as the bytes of their files, clips as paths: which formats are opened, and
            # when, is decided here.
            table = table.decode(False)
        if limit is not None:
            table = table.shuffle(seed=seed, buffer_size=limit * _STREAM_FACTOR)
            table = table.take(limit * _STREAM_FACTOR)
        return [Row(f"row {i}", i, _fetched(dict(row))) for i, row in enumerate(table, start=1)]
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


def _fetched(value: Any) -> Any:
    """A value with the bytes of the files that lie beside the dataset on its hub."""
    if isinstance(value, list):
        return [_fetched(part) for part in value]
    if not isinstance(value, dict):
        return value
    path = value.get("path")
    if value.keys() == {"bytes", "path"} and value["bytes"] is None and "hf://" in str(path):
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return {"bytes": file.read(), "path": path}
    return {key: _fetched(part) for key, part in value.items()}
