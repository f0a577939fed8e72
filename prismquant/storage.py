"""Reading shards and writing files whole or not at all.

Everything that PrismQuant writes goes through :func:`atomic_path`: the bytes go to a temporary
name in the same folder, are flushed to the disk, and only then renamed. A run that is killed
leaves either the old file or the new one, never half of one. Tensors are read one at a time by
name from safetensors shards; shapes and dtypes come from the headers, without touching the data.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from prismquant.errors import StorageError

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

    Raises:
        StorageError: The disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _storage_error(error, path) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; a checkpoint is as readable as the user's other files.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise _storage_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Delete what :func:`atomic_path` left in a folder, and below it, when it was killed."""
    for path in folder.rglob("*"):
        if is_temporary(path):
            path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether :func:`atomic_path` would name a temporary file like this."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


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

    Names are sorted, so equal input gives equal bytes.
    """
    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    write_bytes(path, save(ready, metadata={"format": "pt"}))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file byte for byte, whole or not at all."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: The file is missing or is not JSON; the message says at which line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"{path.name} is missing", where=str(path)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
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
    return {
        name: TensorInfo(_DTYPES[header[name]["dtype"]], shape, path.name)
        for name, shape in shapes.items()
    }


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
        shards = _shard_files(self.folder) if files is None else [self.folder / f for f in files]
        for file in shards:
            self._infos.update(read_header(file))

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
        path = self.folder / self.info(name).file
        try:
            with safe_open(path, framework="pt") as shard:
                tensor: torch.Tensor = shard.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot read {name!r}: {error}", where=str(path)) from error
        return tensor.clone()


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _storage_error(error: OSError, path: Path) -> StorageError:
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
