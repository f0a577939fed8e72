"""Reading shards and writing files whole or not at all.

Everything that PrismQuant writes goes through :func:`atomic_path`: the bytes go to a temporary
name in the same folder, are flushed to the disk, and only then renamed; then the new name is
flushed as well. A run that is killed leaves either the old file or the new one, never half of one,
and what is written first survives a power cut first. Tensors are read one at a time by name from
safetensors shards; shapes and dtypes come from the headers, without touching the data.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import reprlib
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from prismquant.errors import StorageError
from prismquant.headers import TensorInfo, header_bytes, in_file_order, read_places
from prismquant.opening import (
    MAX_JSON_BYTES,
    open_regular,
    parse_json,
    read_bounded,
    unreadable,
)

INDEX_NAME = "model.safetensors.index.json"
# The name of the only shard; transformers reads it before any index.
SINGLE_NAME = "model.safetensors"

# An index of 100,000 tensors has ten megabytes.
_MAX_INDEX_BYTES = 32 << 20
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
    """Whether this is a file that :func:`atomic_path` has made: by its whole name, and no link."""
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
    # What cannot be encoded is told in letters, which no reader takes for a broken character.
    return _HALVES.sub(lambda found: f"\\\\u{ord(found[0]):04x}", text)


def utf8(text: str) -> bytes:
    """A text in UTF-8. Halves of characters, as names of files may hold, are told in letters."""
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
            raw = _raw_bytes(tensor.detach().cpu().contiguous())
            file.write(_little_endian(raw, tensor.dtype).data)


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


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file of ``most`` bytes.

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
            remedy="restore the file from the original checkpoint",
        ) from error


class ShardReader:
    """Tensors of a checkpoint folder by name, read one at a time.

    Args:
        folder: Holds ``*.safetensors``, with or without an index.
        files: Read only these of its shards.

    Raises:
        StorageError: There is no shard, a shard that the index names is missing, or one is broken.
    """

    def __init__(self, folder: Path, files: Sequence[str] | None = None) -> None:
        self.folder = Path(folder)
        self._infos: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        index = read_index(self.folder) if files is None else None
        own = (
            _shard_files(self.folder, index) if files is None else map(self.folder.joinpath, files)
        )
        for file in own:
            for name, (info, start) in read_places(file).items():
                if name in self._infos:
                    raise _twice(self.folder, name, self._infos[name].file, info.file)
                self._infos[name], self._starts[name] = info, start
        self._check_index(index or {})

    def _check_index(self, index: Mapping[str, str]) -> None:
        """Refuse an index that places a tensor where it is not."""
        for name, file in index.items():
            found = self._infos[name].file if name in self._infos else None
            if found != file:
                raise StorageError(
                    f"the index places tensor {name!r} in {file}; it is in {found or 'no shard'}",
                    where=str(self.folder / INDEX_NAME),
                    remedy="complete the download; shards and index are not of one checkpoint",
                )

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor, from its header."""
        if name not in self._infos:
            raise StorageError(f"tensor {name!r} is missing", where=str(self.folder))
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in its dtype on disk, in ordinary (not memory-mapped) memory."""
        # Of this class in any case: readers that show other tensors build on what is on disk.
        info = ShardReader.info(self, name)
        return self._read_into(torch.empty(info.shape, dtype=info.dtype), name, [0])

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some lines of a matrix, without the rest of it ever being in memory.

        Args:
            name: Of the tensor, ``[n, ...]``.
            rows: Which of the ``n``, int64 ``[r]``.

        Returns:
            ``[r, ...]``, in its dtype on disk.

        Raises:
            StorageError: The tensor is missing, has no such line, or cannot be read.
        """
        self._require_rows(name, rows)
        info = ShardReader.info(self, name)
        lines = torch.empty(len(rows), *info.shape[1:], dtype=info.dtype)
        size = math.prod(info.shape[1:]) * info.dtype.itemsize
        return self._read_into(lines, name, [size * row for row in rows.tolist()])

    def _require_rows(self, name: str, rows: torch.Tensor) -> None:
        """Refuse lines that a tensor does not have: what lies there is another tensor's.

        Raises:
            StorageError: There is such a line.
        """
        shape = self.info(name).shape
        outside = rows[(rows < 0) | (rows >= shape[0])] if shape else rows
        if outside.numel():
            raise StorageError(
                f"tensor {name!r} has no line {int(outside[0])}: its shape is {list(shape)}",
                where=str(self.folder),
                remedy="use the tokenizer and config.json that belong to this checkpoint",
            )

    def read_ahead(self, names: Iterable[str]) -> None:
        """Let the system fetch tensors into its cache meanwhile; a hint, where there is such a one.

        Args:
            names: Of tensors that will be read soon; those that are not stored are passed over.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for file, found in itertools.groupby(
            sorted((self._infos[name].file, name) for name in names if name in self._infos),
            key=lambda pair: pair[0],
        ):
            with contextlib.suppress(OSError), open_regular(self.folder / file) as shard:
                for _, name in found:
                    place = self._starts[name], self._infos[name].nbytes
                    os.posix_fadvise(shard.fileno(), *place, os.POSIX_FADV_WILLNEED)

    def _read_into(self, target: torch.Tensor, name: str, offsets: Sequence[int]) -> torch.Tensor:
        """Fill a tensor with equal pieces of a stored one, which begin at these bytes of it."""
        info = ShardReader.info(self, name)
        path, raw = self.folder / info.file, _raw_bytes(target)
        size = len(raw) // max(1, len(offsets))
        try:
            with open_regular(path, buffering=0) as file:
                for index, offset in enumerate(offsets):
                    file.seek(self._starts[name] + offset)
                    _fill(file, raw.data[index * size : (index + 1) * size])
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"cannot read {name!r}: {reason}", where=str(path)) from error
        _little_endian(raw, info.dtype, out=raw)
        return target


def _raw_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The memory of a contiguous tensor on the CPU as bytes; nothing is copied."""
    if tensor.numel() == 0:
        return np.empty(0, dtype=np.uint8)
    raw: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return raw


def _little_endian(
    raw: npt.NDArray[np.uint8], dtype: torch.dtype, out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Bytes of numbers as they are on disk, or back; the same bytes on nearly all machines."""
    if sys.byteorder == "little":
        return raw
    size = dtype.itemsize // (2 if dtype.is_complex else 1)
    swapped = raw.reshape(-1, size)[:, ::-1].reshape(-1)
    if out is not None:
        out[:] = swapped
    return swapped


def _fill(file: BinaryIO, target: memoryview) -> None:
    """Read until a buffer is full: one call reads two gigabytes at most."""
    while len(target):
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise OSError(errno.EIO, "the file is shorter than its header says")
        target = target[count:]


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's shards on disk, their headers included."""
    return sum(file.stat().st_size for file in _shard_files(folder, read_index(folder)))


def read_index(folder: Path) -> dict[str, str] | None:
    """Where a checkpoint's index places each tensor: name -> file name; None without an index.

    Raises:
        StorageError: It cannot be read, names nothing, or names something that is no
            ``*.safetensors`` file of this folder itself.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    content = read_json(path, _MAX_INDEX_BYTES)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise StorageError(
            "the index names no tensor: it has no weight_map",
            where=str(path),
            remedy="complete the download, or delete a stale index file",
        )
    for name, file in weight_map.items():
        if not _is_shard_name(file):
            raise StorageError(
                f"the index places tensor {name!r} in {reprlib.repr(file)}, "
                "which is no name of a shard",
                where=str(path),
                remedy="use the original index: its entries are names such as "
                "'model-00001-of-00002.safetensors' of files beside it",
            )
    return weight_map


def _is_shard_name(name: Any) -> bool:
    """Whether a name is that of a shard, and no path to somewhere else."""
    plain = isinstance(name, str) and not any(sign in name for sign in "/\\:\0")
    return plain and name.endswith(".safetensors")


def _shard_files(folder: Path, index: Mapping[str, str] | None) -> list[Path]:
    """The shards of a checkpoint."""
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise StorageError(
                "no *.safetensors file in the model folder",
                where=str(folder),
                remedy="convert the checkpoint to safetensors; pickle files are never read",
            )
        return files
    named = sorted(set(index.values()))
    if missing := [name for name in named if not (folder / name).exists()]:
        raise StorageError(
            f"the index names shards that are not there: {', '.join(missing[:4])}",
            where=str(folder / INDEX_NAME),
            remedy="complete the download, or delete a stale index file",
        )
    if SINGLE_NAME not in named and (folder / SINGLE_NAME).exists():
        raise StorageError(
            f"{SINGLE_NAME} lies beside {named[0]}, which the index names: some readers take the "
            "one, some the other",
            where=str(folder),
            remedy=f"delete {SINGLE_NAME}, or {INDEX_NAME} and its shards",
        )
    return [folder / name for name in named]


def _twice(folder: Path, name: str, first: str, second: str) -> StorageError:
    return StorageError(
        f"tensor {name!r} is in {first} and in {second}: readers disagree which one counts",
        where=str(folder),
        remedy="delete the file that does not belong to this checkpoint",
    )


def storage_error(error: OSError, path: Path) -> StorageError:
    """What to tell a user of a failure to write ``path``."""
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
