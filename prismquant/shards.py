"""Tensors of a checkpoint, read one at a time by name from safetensors shards.

Shapes and dtypes come from the headers, without touching the data.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch

from prismquant.errors import StorageError
from prismquant.headers import TensorInfo, little_endian, raw_bytes, read_places
from prismquant.opening import open_regular, read_json

INDEX_NAME = "model.safetensors.index.json"
# The name of the only shard; transformers reads it before any index.
SINGLE_NAME = "model.safetensors"

# An index of 100,000 tensors has ten megabytes.
_MAX_INDEX_BYTES = 32 << 20


@dataclass(frozen=True)
class TensorView:
    """A tensor that lies within a larger stored one.

    Attributes:
        source: Name of the stored tensor: one matrix or vector, or a stack of them.
        index: Number of the matrix of a stack that it lies in; None: the tensor is no stack.
        rows: First of its rows there, and the one after its last; columns, where it is transposed.
        transposed: Whether its rows are the columns of the stored matrix.
    """

    source: str
    index: int | None
    rows: tuple[int, int]
    transposed: bool

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """Its shape, by that of the stored tensor."""
        sides = stored if self.index is None else stored[1:]
        return (self.rows[1] - self.rows[0], *(sides[:1] if self.transposed else sides[1:]))

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """Its place in the stored matrix or vector, in the memory of that."""
        rows = slice(*self.rows)
        return matrix[:, rows].T if self.transposed else matrix[rows]


NO_VIEWS: Mapping[str, TensorView] = MappingProxyType({})


def infos_with_views(
    infos: Mapping[str, TensorInfo], views: Mapping[str, TensorView]
) -> dict[str, TensorInfo]:
    """Headers with views in the place of the tensors that they lie in.

    Args:
        infos: Headers of all tensors that are stored.
        views: Views by their names.
    """
    hidden = {view.source for view in views.values()}
    found = {name: info for name, info in infos.items() if name not in hidden}
    for name, view in views.items():
        stored = infos[view.source]
        found[name] = TensorInfo(stored.dtype, view.shape(stored.shape), stored.file)
    return found


class ShardReader:
    """Tensors of a checkpoint folder by name, read one at a time.

    Args:
        folder: Holds ``*.safetensors``, with or without an index.
        files: Read only these of its shards.
        views: Matrices that are shown by names of their own, in the place of the tensors that they
            lie in; these can be read, too, and are not among :attr:`names`.

    Raises:
        StorageError: There is no shard, a shard that the index names is missing, or one is broken.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str] | None = None,
        views: Mapping[str, TensorView] = NO_VIEWS,
    ) -> None:
        self.folder = Path(folder)
        self.views = views
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
        if not self.views:
            return frozenset(self._infos)
        hidden = {view.source for view in self.views.values()}
        return frozenset({*self.views, *(name for name in self._infos if name not in hidden)})

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor, from its header."""
        if (view := self.views.get(name)) is not None:
            stored = ShardReader.info(self, view.source)
            return TensorInfo(stored.dtype, view.shape(stored.shape), stored.file)
        if name not in self._infos:
            raise StorageError(f"tensor {name!r} is missing", where=str(self.folder))
        return self._infos[name]

    def whole(self, names: Collection[str]) -> frozenset[str]:
        """These names, with that of a stored tensor in the place of all matrices in it.

        Args:
            names: Of tensors; matrices stay by themselves where one of the same tensor is missing.
        """
        given = frozenset(names)
        parts: dict[str, set[str]] = {}
        for name, view in self.views.items():
            parts.setdefault(view.source, set()).add(name)
        whole = {source for source, held in parts.items() if held <= given}
        return (given - {name for source in whole for name in parts[source]}) | whole

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in its dtype on disk, in ordinary (not memory-mapped) memory."""
        # Of this class in any case: readers that show other tensors build on what is on disk.
        if (view := self.views.get(name)) is not None:
            return view.of(self.read_matrix(view.source, view.index)).contiguous()
        info = ShardReader.info(self, name)
        return self._read_into(torch.empty(info.shape, dtype=info.dtype), name, [0])

    def read_matrix(self, name: str, index: int | None) -> torch.Tensor:
        """One matrix of a stored stack, without the others; without an index, the whole tensor.

        Args:
            name: Of the stored tensor, ``[n, ...]``.
            index: Number of the matrix.

        Returns:
            ``[...]``, in its dtype on disk.
        """
        if index is None:
            return ShardReader.read(self, name)
        stored = ShardReader.info(self, name)
        matrix = torch.empty(stored.shape[1:], dtype=stored.dtype)
        start = index * matrix.numel() * stored.dtype.itemsize
        return self._read_into(matrix, name, [start])

    def read_stack(self, source: str) -> torch.Tensor:
        """A stored tensor that matrices lie in, made of these as they are shown.

        Raises:
            StorageError: It is missing, or cannot be read.
        """
        own = [name for name, view in self.views.items() if view.source == source]
        return self.put_together({name: self.read(name) for name in own})[source]

    def put_together(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors, matrices put into the stored tensors that they lie in.

        Args:
            tensors: By the names that are shown, all matrices of a stored tensor or none of them.
        """
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            view = self.views.get(name)
            if view is None:
                found[name] = tensor
                continue
            if view.source not in found:
                shape = ShardReader.info(self, view.source).shape
                found[view.source] = torch.empty(shape, dtype=tensor.dtype)
            whole = found[view.source]
            view.of(whole if view.index is None else whole[view.index]).copy_(tensor)
        return found

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
        if name in self.views:
            return self.read(name)[rows]
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
        stored = {self.views[name].source if name in self.views else name for name in names}
        for file, found in itertools.groupby(
            sorted((self._infos[name].file, name) for name in stored if name in self._infos),
            key=lambda pair: pair[0],
        ):
            with contextlib.suppress(OSError), open_regular(self.folder / file) as shard:
                for _, name in found:
                    place = self._starts[name], self._infos[name].nbytes
                    os.posix_fadvise(shard.fileno(), *place, os.POSIX_FADV_WILLNEED)

    def _read_into(self, target: torch.Tensor, name: str, offsets: Sequence[int]) -> torch.Tensor:
        """Fill a tensor with equal pieces of a stored one, which begin at these bytes of it."""
        info = ShardReader.info(self, name)
        path, raw = self.folder / info.file, raw_bytes(target)
        size = len(raw) // max(1, len(offsets))
        try:
            with open_regular(path, buffering=0) as file:
                for index, offset in enumerate(offsets):
                    file.seek(self._starts[name] + offset)
                    _fill(file, raw.data[index * size : (index + 1) * size])
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"cannot read {name!r}: {reason}", where=str(path)) from error
        little_endian(raw, info.dtype, out=raw)
        return target


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
    """The index of a checkpoint: tensor name -> file name; None without one.

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
    """True if a name is that of a shard, and no path to somewhere else."""
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
