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
import io
import itertools
import json
import math
import os
import secrets
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prismquant.errors import StorageError
from prismquant.opening import MAX_JSON_BYTES, parse_json, read_bounded

INDEX_NAME = "model.safetensors.index.json"

_TEMPORARY = ".tmp"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The order of tensors in a file: wide types first, so that each begins at a multiple of its width.
_WIDE_FIRST = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_ORDER = {_DTYPES[name]: place for place, name in enumerate(_WIDE_FIRST)}
# A header is JSON of names and offsets: 100 MB is far above any real one and the format's own
# limit.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor.

    Attributes:
        dtype: Element type on disk.
        shape: Its shape.
        file: The shard's file name.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends without an error.

    When the block has ended, the file and its name are on the disk: a power cut takes neither.

    Raises:
        StorageError: The disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        make_folder(path.parent)
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
    """Whether :func:`atomic_path` would name a temporary file like this."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


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
    """Write ``text`` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all.

    The bytes are those of the safetensors library: equal input gives equal bytes. They go to the
    file from where the tensors lie, one after the other, so writing takes no memory of its own.
    """
    order = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_header({name: tensors[name] for name in order}))
        for name in order:
            raw = _raw_bytes(tensors[name].detach().cpu().contiguous())
            file.write(_little_endian(raw, tensors[name].dtype).data)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file byte for byte, whole or not at all."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: The file is missing, cannot be read, is no regular file, or is not JSON; the
            message says at which line.
    """
    try:
        return parse_json(read_bounded(path, MAX_JSON_BYTES))
    except FileNotFoundError as error:
        raise StorageError(f"{path.name} is missing", where=str(path)) from error
    except OSError as error:
        raise StorageError(
            f"{path.name} cannot be read: {error.strerror or error}",
            where=str(path),
            remedy="check what it is and who may read it",
        ) from error
    except ValueError as error:
        raise StorageError(
            f"{path.name} is not valid JSON: {error}",
            where=str(path),
            remedy="restore the file from the original checkpoint",
        ) from error


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of one safetensors file: name -> dtype and shape. The data stays untouched.

    Raises:
        StorageError: The file is missing, cut short, not a safetensors file, or of a type that
            torch does not have.
    """
    return {name: info for name, (info, _) in _places(path).items()}


def _places(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """What a header says of each tensor, and where in the file its data begin."""
    broken = StorageError(
        f"{path.name} is not a whole safetensors file",
        where=str(path),
        remedy="copy the file again; its download or transfer probably broke off",
    )
    if not path.is_file():
        raise StorageError(f"{path.name} is missing", where=str(path))
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) != 8:
            raise broken
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_HEADER_BYTES:
            raise broken
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            spans = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
            end = max((int(span[1]) for span in spans.values()), default=0)
            dtypes = {entry["dtype"] for entry in header.values()}
            shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise broken from error
    if path.stat().st_size < 8 + length + end:
        raise broken
    if unknown := dtypes - _DTYPES.keys():
        raise StorageError(
            f"{path.name} holds tensors of type {min(unknown)!r}, which cannot be read",
            where=str(path),
            remedy="use the original, unquantized checkpoint",
        )
    infos = {
        name: TensorInfo(_DTYPES[header[name]["dtype"]], shape, path.name)
        for name, shape in shapes.items()
    }
    if any(stop - start != infos[name].nbytes for name, (start, stop) in spans.items()):
        raise broken
    return {name: (infos[name], 8 + length + start) for name, (start, _) in spans.items()}


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
        shards = _shard_files(self.folder) if files is None else [self.folder / f for f in files]
        for file in shards:
            for name, (info, start) in _places(file).items():
                self._infos[name], self._starts[name] = info, start

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
            StorageError: The tensor is missing or cannot be read.
        """
        info = ShardReader.info(self, name)
        lines = torch.empty(len(rows), *info.shape[1:], dtype=info.dtype)
        size = math.prod(info.shape[1:]) * info.dtype.itemsize
        return self._read_into(lines, name, [size * row for row in rows.tolist()])

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
            with contextlib.suppress(OSError), (self.folder / file).open("rb") as shard:
                for _, name in found:
                    place = self._starts[name], self._infos[name].nbytes
                    os.posix_fadvise(shard.fileno(), *place, os.POSIX_FADV_WILLNEED)

    def _read_into(self, target: torch.Tensor, name: str, offsets: Sequence[int]) -> torch.Tensor:
        """Fill a tensor with equal pieces of a stored one, which begin at these bytes of it."""
        info = ShardReader.info(self, name)
        path, raw = self.folder / info.file, _raw_bytes(target)
        size = len(raw) // max(1, len(offsets))
        try:
            with path.open("rb", buffering=0) as file:
                for index, offset in enumerate(offsets):
                    file.seek(self._starts[name] + offset)
                    _fill(file, raw.data[index * size : (index + 1) * size])
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"cannot read {name!r}: {reason}", where=str(path)) from error
        _little_endian(raw, info.dtype, out=raw)
        return target


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The head of a safetensors file of these tensors, in this order."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        content[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    # Padded, so that the data begin at a multiple of the widest number.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


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


def _fill(file: io.RawIOBase, target: memoryview) -> None:
    """Read until a buffer is full: one call reads two gigabytes at most."""
    while len(target):
        count = file.readinto(target)
        if not count:
            raise OSError(errno.EIO, "the file is shorter than its header says")
        target = target[count:]


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's shards on disk, their headers included."""
    return sum(file.stat().st_size for file in _shard_files(folder))


def _shard_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if index.exists():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        named = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        missing = [name for name in named if not (folder / name).is_file()]
        if missing or not named:
            raise StorageError(
                f"the index names shards that are not there: {', '.join(missing[:4]) or 'none'}",
                where=str(index),
                remedy="complete the download, or delete a stale index file",
            )
        return [folder / name for name in named]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StorageError(
            "no *.safetensors file in the model folder",
            where=str(folder),
            remedy="convert the checkpoint to safetensors; pickle files are never read",
        )
    return files


def storage_error(error: OSError, path: Path) -> StorageError:
    """What to tell a user of a failure to write ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(
            f"the disk is full: {path.name} was not written",
            where=str(path.parent),
            remedy="free space or choose another output folder, then run again with --resume",
        )
    return StorageError(
        f"cannot write {path.name}: {error.strerror or error}",
        where=str(path.parent),
        remedy="check that the folder exists and can be written",
    )
