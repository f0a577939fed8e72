"""Tensors that the index of a checkpoint leaves out, which readers treat differently."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismquant.shards import read_index

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from prismquant.headers import TensorInfo

__all__ = ["index_notes"]

_SHOWN = 3


def index_notes(folder: Path, infos: Mapping[str, TensorInfo]) -> list[str]:
    """Notes on tensors and shards that the index does not name; none without an index.

    Args:
        folder: The checkpoint.
        infos: All tensors of the shards that the index names.

    Raises:
        StorageError: The index cannot be read.
    """
    index = read_index(folder)
    if not index or not infos:
        return []
    notes = []
    if tensors := sorted(infos.keys() - index.keys()):
        notes.append(
            f"tensors that the index does not name are read from their shards: {_listed(tensors)}"
        )
    if shards := sorted({p.name for p in folder.glob("*.safetensors")} - set(index.values())):
        notes.append(f"shards that the index does not name are not read: {_listed(shards)}")
    return notes


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
