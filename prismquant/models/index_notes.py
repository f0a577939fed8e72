"""Notes on tensors that the index of a checkpoint leaves out, and on those of no module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismquant.shards import read_index

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from prismquant.headers import TensorInfo

__all__ = ["carried_notes", "index_notes"]

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


def carried_notes(names: Collection[str]) -> list[str]:
    """A note on tensors that the model's class drops; none where there are none.

    Args:
        names: Their names on disk.
    """
    if not names:
        return []
    verb = "is" if len(names) == 1 else "are"
    said = f"{_listed(names)} {verb} no part of the model as transformers runs it"
    return [f"{said}: carried over as {'it is' if len(names) == 1 else 'they are'}, unquantized"]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
