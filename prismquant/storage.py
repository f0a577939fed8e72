"""Files written whole or not at all.

Everything that PrismQuant writes goes through :func:`atomic_path`: the bytes go to a temporary
name in the same folder, are flushed to the disk, and only then renamed; then the new name is
flushed as well. A run that is killed leaves either the old file or the new one, never half of one,
and what is written first survives a power cut first.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from prismquant.errors import StorageError
from prismquant.headers import header_bytes, in_file_order, little_endian, raw_bytes
from prismquant.opening import (
    open_regular,
    unreadable,
)

# Unmistakably ours, so that only what was left by a killed run is ever deleted; and no longer than
# a name may be, however long that of the file is.
_HALVES = re.compile("[\ud800-\udfff]")
_TEMPORARY = re.compile(r"[.].{1,40}[.][0-9a-f]{16}[.]prismquant-tmp", re.DOTALL)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends without an error.

    When the block has ended, the file and its name are on the disk: a power cut takes neither. A
    link in the file's place is replaced, and never followed.

    Raises:
        StorageError: The disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.prismquant-tmp")
    try:
        make_folder(path.parent)
        _require_no_folder(path)
        # Made only within the block that removes it: an interruption may come at any line.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _require_no_folder(path: Path) -> None:
    """Refuse a folder in the place of a file, and a name that no file can have, before writing."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            raise StorageError(
                f"a folder lies in the place of {path.name}",
                where=str(path),
                remedy="delete it or move it away, then run again",
            )


def make_folder(folder: Path) -> None:
    """Make a folder, and what is missing above it, so that a power cut does not take it.

    Raises:
        OSError: It cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, on systems where that is a step of its own."""
    if sys.platform == "win32":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # a folder that may be written but not listed
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and user-space file systems refuse it: they have no such step.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """Delete what :func:`atomic_path` left in a folder, and below it, when it was killed."""
    for path in folder.rglob("*"):
        if is_temporary(path):
            path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """True if this is a file that :func:`atomic_path` has made: by its whole name, and no link."""
    if not _TEMPORARY.fullmatch(path.name):
        return False
    with contextlib.suppress(OSError):
        return stat.S_ISREG(os.lstat(path).st_mode)
    return False


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, whole or not at all; see :func:`utf8`."""
    write_bytes(path, utf8(text))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text that :func:`write_json` writes."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # What cannot be encoded is written in letters, which no reader takes for a broken character.
    return _HALVES.sub(lambda found: f"\\\\u{ord(found[0]):04x}", text)


def utf8(text: str) -> bytes:
    """A text in UTF-8. Halves of characters, as names of files may hold, are written in letters."""
    return text.encode(errors="backslashreplace")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all.

    The bytes are those of the safetensors library: equal input gives equal bytes. They go to the
    file from where the tensors lie, one after the other, so writing takes no memory of its own.
    """
    ordered = in_file_order(tensors)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(header_bytes(ordered))
        for tensor in ordered.values():
            raw = raw_bytes(tensor.detach().cpu().contiguous())
            file.write(little_endian(raw, tensor.dtype).data)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file byte for byte, whole or not at all.

    Raises:
        StorageError: It cannot be read, is no regular file, or cannot be written.
    """
    try:
        content = open_regular(source)
    except OSError as error:
        raise unreadable(error, source) from error
    with content, atomic_path(target) as temporary, temporary.open("wb") as copy:
        shutil.copyfileobj(content, copy, 1 << 20)


def storage_error(error: OSError, path: Path) -> StorageError:
    """The error for a user of a failure to write ``path``."""
    number, reason = error.errno, error.strerror or error
    if number in (errno.ENOSPC, errno.EDQUOT):
        what = f"the disk is full: {path.name} was not written"
        remedy = "free space or choose another output folder, then run again"
    elif number == errno.EFBIG:
        what = f"{path.name} was not written: {reason}"
        remedy = "choose a file system that takes larger files, or raise the limit (ulimit -f)"
    elif number == errno.ENAMETOOLONG:
        what = f"{path.name[:40]}.. cannot be written: {len(os.fsencode(path.name))} bytes of name"
        remedy = "choose a shorter name: most file systems take 255 bytes"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"cannot write {path.name}: {reason}"
        remedy = "choose another output folder, or ask for the right to write to this one"
    else:
        what = f"cannot write {path.name}: {reason}"
        remedy = "check that the folder exists and can be written"
    return StorageError(what, where=str(path.parent), remedy=remedy)
