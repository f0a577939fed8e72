"""A quantized checkpoint as its files tell it, before anything of it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismquant.headers import TensorInfo


@dataclass(frozen=True)
class SourceHeaders:
    """Configuration and headers of a quantized checkpoint.

    Attributes:
        folder: The checkpoint.
        section: What its configuration says of quantization.
        infos: Headers of all stored tensors.
        called: From the name of a layer on disk to all names that a configuration may have for it.
    """

    folder: Path
    section: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    called: Callable[[str], tuple[str, ...]]

    def place(self, name: str) -> str:
        """A stored tensor with the file that it is in, as errors show them."""
        return f"{self.infos[name].file}: {name}"

    def copy_again(self, name: str) -> str:
        """The remedy where a file or one beside it is damaged."""
        return (
            f"compare {self.infos[name].file}, the other shards and config.json with the original, "
            "and copy again what differs; if nothing does, use the unquantized checkpoint"
        )
