"""Where activations wait: in memory, or in files of the run's own folder.

A calibration set's hidden states can be larger than the rest of a run taken together, and only
those of one batch are needed at a time. Files are read and written whole; a memory-mapped file
would be simpler, but its pages count as the process's own until the system takes them back.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from prismquant.errors import StorageError

# Smaller ones, such as masks and positions, are not worth a file.
_LEAST_BYTES = 1 << 16


class States(Protocol):
    """Keeps values until they are asked for."""

    def keep(self, value: Any) -> Callable[[], Any]:
        """Take over tensors, nested in tuples, lists and dictionaries.

        Returns:
            Gives the value back, as often as it is called; when it is gone, so is what was kept.
        """


class InMemory:
    """Values stay as they are."""

    def keep(self, value: Any) -> Callable[[], Any]:
        """See :class:`States`."""
        return lambda: value


@dataclass(frozen=True)
class OnDisk:
    """Tensors go to files.

    Attributes:
        folder: Theirs alone; made when it is needed.
    """

    folder: Path
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def keep(self, value: Any) -> Callable[[], Any]:
        """See :class:`States`.

        Raises:
            StorageError: A file cannot be written.
        """
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            entries = {key: self.keep(item) for key, item in value.items()}
            return lambda: {key: entry() for key, entry in entries.items()}
        if type(value) in (list, tuple):
            kind, items = type(value), [self.keep(item) for item in value]
            return lambda: kind(item() for item in items)
        return lambda: value

    def close(self) -> None:
        """Delete all files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tensor(self, value: Tensor) -> Callable[[], Any]:
        # A view of a single number, as of a tensor of which only the shape is looked at, is small.
        if value.untyped_storage().nbytes() < _LEAST_BYTES:
            return lambda: value
        return _File(self._path(), value)

    def _path(self) -> Path:
        return self.folder / f"{next(self._numbers)}.bin"


class _File:
    """One tensor in one file, which lives as long as this object."""

    def __init__(self, path: Path, value: Tensor) -> None:
        self._path = path
        self._dtype, self._shape, self._device = value.dtype, value.shape, value.device
        _write(path, value)
        weakref.finalize(self, path.unlink, missing_ok=True)

    def __call__(self) -> Tensor:
        raw = torch.from_numpy(numpy.fromfile(self._path, dtype=numpy.uint8))
        return raw.view(self._dtype).reshape(self._shape).to(self._device)


def _write(path: Path, value: Tensor) -> None:
    """Write a tensor's bytes as they are."""
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw.numpy().tofile(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise StorageError(
            f"what waits on disk cannot be written: {error.strerror or error}",
            where=str(path.parent),
            remedy="free space there, or allow more memory with --memory-budget",
        ) from error
