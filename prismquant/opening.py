"""Files that may be opened, and how much of them is taken.

A checkpoint, a recipe and a data file come from strangers. Every file that they are, or that they
name, is opened here: only regular files, as a named pipe or a device waits for ever or does
something when it is read; no more bytes than a file of its kind may have, known before the first is
taken; JSON without double keys, of which readers disagree which one counts.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from prismquant.errors import StorageError

# Far above any real one: the tokenizer and the index of the largest models have some 40 MB.
MAX_JSON_BYTES = 256 << 20
_RESTORE = "restore the file from the original checkpoint"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path, *, follow_links: bool = True, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: The file, or a link to one.
        follow_links: Whether the last part of the path may be a link.
        buffering: As for :func:`open`.

    Raises:
        OSError: It is missing, cannot be read, or is no regular file; ``strerror`` says which.
    """
    # Before opening, as that alone makes some devices act; and again after it, in case that the
    # name was given to something else in between.
    require_regular(os.stat(path, follow_symlinks=follow_links), path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags | (0 if follow_links else getattr(os, "O_NOFOLLOW", 0)))
    try:
        require_regular(os.fstat(handle), path)
        return os.fdopen(handle, "rb", buffering)
    except BaseException:
        os.close(handle)
        raise


def require_regular(status: os.stat_result, path: Path) -> None:
    """Refuse what is no regular file.

    Raises:
        OSError: It is a folder, a link, a named pipe, a socket or a device.
    """
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "a link")
    number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
    raise OSError(number, f"it is {kind}, not a regular file", str(path))


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a regular file that has no more than ``most``.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes; at most {most} are read", str(path))
        return file.read(most)


def read_json(path: Path, most: int = MAX_JSON_BYTES, remedy: str = _RESTORE) -> Any:
    """Read a JSON file of ``most`` bytes.

    Args:
        path: The file.
        most: Bytes that are read at most.
        remedy: What helps where it is not JSON.

    Raises:
        StorageError: The file is missing, cannot be read, is no regular file, or is not JSON; the
            message says at which line.
    """
    try:
        return parse_json(read_bounded(path, most))
    except OSError as error:
        raise unreadable(error, path) from error
    except ValueError as error:
        raise StorageError(
            f"{path.name} is not valid JSON: {error}",
            where=str(path),
            remedy=remedy,
        ) from error


def unreadable(error: OSError, path: Path) -> StorageError:
    """The error for a user of a failure to open or read ``path``."""
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{path.name} is missing", where=str(path))
    return StorageError(
        f"{path.name} cannot be read: {error.strerror or error}",
        where=str(path),
        remedy="check what it is and who may read it",
    )


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text in which no object has a key twice.

    Raises:
        ValueError: It is not JSON (then a :class:`json.JSONDecodeError`), not UTF-8, nested too
            deeply, has a key twice, or half of a character (a lone surrogate), which nothing can
            write.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique_keys)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise ValueError(f"key {twice!r} is there twice in one object")
    return found
