"""Headers of safetensors files, read as strictly as the library of that format reads them.

A header that two readers understand differently is how a checkpoint shows one model to a person and
another to a program. So nothing is guessed: the tensors' bytes follow one another without gap or
overlap and fill the file, no name is there twice, and each entry says exactly three things. The
data stay untouched.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import reprlib
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prismquant.errors import StorageError
from prismquant.opening import open_regular, parse_json, unreadable

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
_METADATA = "__metadata__"
_ENTRY = {"dtype", "shape", "data_offsets"}
# The format allows 100 MB, which would take gigabytes once parsed. A quarter of that is room for
# 200,000 tensors in one file; the largest models have half of that in a hundred.
_MAX_HEADER_BYTES = 25_000_000
# What a tensor's bytes may be counted to.
_MAX_COUNT = 2**63 - 1


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, as a safetensors header describes it.

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
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of one safetensors file: name -> dtype and shape.

    Raises:
        StorageError: As for :func:`read_places`.
    """
    return {name: info for name, (info, _) in read_places(path).items()}


def read_places(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Read a header: name -> dtype and shape, and the byte of the file at which its data begin.

    Raises:
        StorageError: The file is missing, cut short, no regular file, not a safetensors file,
            contradicts itself, or has a type that torch does not have.
    """
    text, size = _header_text(path)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise _invalid(path, f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _invalid(path, f"its header holds a {type(header).__name__}, not an object")
    _check_metadata(path, header.pop(_METADATA, None))
    spans: dict[str, tuple[int, int]] = {}
    infos: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        infos[name], spans[name] = _entry(path, name, entry)
    first = 8 + len(text)
    end = _check_coverage(path, spans)
    if first + end > size:
        raise _cut(path, f"it has {size} bytes, its header speaks of {first + end}")
    if first + end < size:
        raise _invalid(path, f"{size - first - end} bytes behind its tensors belong to none")
    return {name: (info, first + spans[name][0]) for name, info in infos.items()}


def header_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The head of a safetensors file of these tensors, in this order."""
    content: dict[str, Any] = {_METADATA: {"format": "pt"}}
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


def in_file_order(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the order in which the safetensors library writes them."""
    order = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    return {name: tensors[name] for name in order}


def raw_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The memory of a contiguous tensor on the CPU as bytes; nothing is copied."""
    if tensor.numel() == 0:
        return np.empty(0, dtype=np.uint8)
    raw: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return raw


def little_endian(
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


def _header_text(path: Path) -> tuple[bytes, int]:
    """The bytes of a header, and of the whole file how many there are."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) != 8:
                raise _cut(path, f"it has {len(prefix)} bytes")
            (length,) = struct.unpack("<Q", prefix)
            if length > size - 8:
                raise _cut(path, f"it has {size} bytes, its header alone should have {length}")
            if length > _MAX_HEADER_BYTES:
                raise _invalid(
                    path, f"its header has {length} bytes; at most {_MAX_HEADER_BYTES} are read"
                )
            return file.read(length), size
    except OSError as error:
        raise unreadable(error, path) from error


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """The content of one entry of a header, checked by itself."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise _invalid(
            path, f"tensor {name!r} has {reprlib.repr(entry)}, not dtype, shape and data_offsets"
        )
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _counts(shape):
        raise _invalid(path, f"tensor {name!r} has the shape {reprlib.repr(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(path, f"tensor {name!r} has the data_offsets {reprlib.repr(offsets)}")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise StorageError(
            f"{path.name} holds tensors of type {reprlib.repr(kind)}, which cannot be read",
            where=f"{path}: {name}",
            remedy="use the original, unquantized checkpoint",
        )
    info = TensorInfo(_DTYPES[kind], tuple(shape), path.name)
    start, stop = offsets
    needed = info.nbytes
    # Empty tensors too: torch counts their strides.
    if not needed and math.prod(side or 1 for side in shape) > _MAX_COUNT // info.dtype.itemsize:
        raise _invalid(path, f"tensor {name!r} of {kind} {reprlib.repr(shape)} is too large")
    if stop - start != needed:
        said = f"tensor {name!r} of {kind} {reprlib.repr(shape)}"
        raise _invalid(path, f"{said} needs {needed} bytes, not {stop - start}")
    return info, (start, stop)


def _counts(value: Any) -> bool:
    """True if a value is a list of whole numbers from zero up."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _MAX_COUNT for item in value
    )


def _check_metadata(path: Path, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _invalid(path, f"{_METADATA} is not a table of strings")


def _check_coverage(path: Path, spans: Mapping[str, tuple[int, int]]) -> int:
    """Refuse gaps and overlaps; the end of the last tensor."""
    order = sorted(spans, key=lambda name: spans[name])
    if order and spans[order[0]][0]:
        raise _invalid(path, f"bytes before tensor {order[0]!r} belong to none")
    for name, following in itertools.pairwise(order):
        end, start = spans[name][1], spans[following][0]
        if start < end:
            raise _invalid(path, f"tensors {name!r} and {following!r} overlap")
        if start > end:
            raise _invalid(path, f"bytes between tensors {name!r} and {following!r} belong to none")
    return spans[order[-1]][1] if order else 0


def _cut(path: Path, why: str) -> StorageError:
    return StorageError(
        f"{path.name} is not a whole safetensors file: {why}",
        where=str(path),
        remedy="copy the file again; its download or transfer probably broke off",
    )


def _invalid(path: Path, why: str) -> StorageError:
    return StorageError(
        f"{path.name} is not a valid safetensors file: {why}",
        where=str(path),
        remedy="use the original file; readers would disagree on what this one holds",
    )
