"""Activation stores: activations wait on their device, in the host's memory, or in files.

A calibration set's hidden states can be larger than the rest of a run taken together, and only
those of one batch are needed at a time. Files are read and written whole; a memory-mapped file
would be simpler, but its pages count as the process's own until the system takes them back.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from prismquant.engine.placement import Store
from prismquant.errors import StorageError

# Smaller ones, such as masks and positions, are not worth a file.
_LEAST_BYTES = 1 << 16


class ActivationStore(Protocol):
    """Keeps values until they are asked for."""

    def keep(self, value: Any) -> Callable[[], Any]:
        """Take over tensors, nested in tuples, lists and dictionaries.

        Returns:
            Gives the value back, as often as it is called; when it is gone, so is what was kept.
        """


class InMemory:
    """Values stay as they are."""

    def keep(self, value: Any) -> Callable[[], Any]:
        """See :class:`ActivationStore`."""
        return lambda: value


class OnHost:
    """Tensors wait in the host's memory and come back to the device that they came from."""

    def keep(self, value: Any) -> Callable[[], Any]:
        """See :class:`ActivationStore`."""
        return _kept(value, self._tensor)

    @staticmethod
    def _tensor(value: Tensor) -> Callable[[], Any]:
        if value.device.type == "cpu" or _is_small(value):
            return lambda: value
        device, waiting = value.device, value.cpu()
        return lambda: waiting.to(device)


@dataclass(frozen=True)
class OnDisk:
    """Tensors go to files.

    Attributes:
        folder: Theirs alone; made when it is needed.
    """

    folder: Path
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def keep(self, value: Any) -> Callable[[], Any]:
        """See :class:`ActivationStore`.

        Raises:
            StorageError: A file cannot be written.
        """
        return _kept(value, self._tensor)

    def close(self) -> None:
        """Delete all files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tensor(self, value: Tensor) -> Callable[[], Any]:
        if _is_small(value):
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


def _kept(value: Any, keep: Callable[[Tensor], Callable[[], Any]]) -> Callable[[], Any]:
    """Keep every tensor within nested tuples, lists and dictionaries; gives the whole back."""
    if isinstance(value, Tensor):
        return keep(value)
    if isinstance(value, dict):
        entries = {key: _kept(item, keep) for key, item in value.items()}
        return lambda: {key: entry() for key, entry in entries.items()}
    if type(value) in (list, tuple):
        kind, items = type(value), [_kept(item, keep) for item in value]
        return lambda: kind(item() for item in items)
    return lambda: value


def _is_small(value: Tensor) -> bool:
    """Whether a tensor is not worth moving: a view of one number, as where only a shape counts."""
    return value.untyped_storage().nbytes() < _LEAST_BYTES


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


@contextlib.contextmanager
def opened_store(states: Store, folder: Path) -> Iterator[ActivationStore]:
    """Give what keeps hidden states for the length of the block.

    Args:
        states: Where they wait.
        folder: Takes their files, where they wait in files.
    """
    if states != "disk":
        yield OnHost() if states == "host" else InMemory()
        return
    store = OnDisk(folder)
    try:
        yield store
    finally:
        store.close()
