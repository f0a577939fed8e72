"""A compressed-tensors checkpoint as it is, in a folder of its own.

Files are copied byte for byte. What only PrismQuant reads is named, because whoever asks for this
format wants other programs to read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prismquant.export.companions import files_to_copy
from prismquant.export.compressed_tensors.stored import StoredCheckpoint
from prismquant.export.exporter import Progress, Refusal
from prismquant.shards import INDEX_NAME
from prismquant.storage import copy_file


@dataclass(frozen=True)
class CompressedTensors:
    """Copy the checkpoint."""

    name: ClassVar[str] = "compressed-tensors"
    drops_inputs: ClassVar[str] = "never"
    needs_quantized: ClassVar[bool] = True

    def refusals(self, source: StoredCheckpoint) -> list[Refusal]:
        """There are none: the checkpoint is in this format."""
        return []

    def remarks(self, source: StoredCheckpoint) -> list[str]:
        """A line on what other readers do not understand."""
        split = [layer.name for layer in source.quantized if source.splits(layer)]
        if not split:
            return []
        return [f"{len(split)} layers keep single columns in floating point: only prismquant reads"]

    def write(self, source: StoredCheckpoint, out: Path, progress: Progress) -> None:
        """Copy every file; before that, all that they hold is looked at."""
        for layer, name in source.walk():
            if layer is not None and layer.scheme is not None:
                source.codes(layer)
                source.columns(layer)
            else:
                source.shards.read(name)
        shards = sorted({source.shards.info(name).file for name in source.shards.names})
        files = [source.folder / shard for shard in shards]
        files += [source.folder / INDEX_NAME] * (source.folder / INDEX_NAME).is_file()
        files += [*files_to_copy(source.folder), source.folder / "config.json"]
        for number, file in enumerate(files):
            progress(number, len(files), file.name)
            copy_file(file, out / file.relative_to(source.folder))
        progress(len(files), len(files), "done")
