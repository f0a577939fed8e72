"""The quantized form of a checkpoint, if it has one, with the names that its family knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from prismquant.errors import ModelError
from prismquant.headers import TensorInfo
from prismquant.models.arch import ArchSpec
from prismquant.models.config import read_config
from prismquant.models.names import NameMap, any_layout
from prismquant.sources.quantized_source import QuantizedSource
from prismquant.sources.recognize import quantized_source

__all__ = ["source_of"]


def source_of(
    folder: Path, arch: ArchSpec, infos: Mapping[str, TensorInfo]
) -> QuantizedSource | None:
    """The way in which a checkpoint is quantized; None where its weights are in floating point.

    Args:
        folder: The checkpoint.
        arch: Its architecture.
        infos: Headers of all its shards.

    Raises:
        ModelError, FormatError: It is quantized in a way that cannot be read.
    """

    reads = any_layout(arch.layouts)
    layouts = [NameMap(layout.name, layout.rewrites) for layout in arch.layouts]

    def names(prefix: str) -> Iterator[str]:
        yield prefix
        with contextlib.suppress(ModelError):
            module = reads.to_module(f"{prefix}.weight")
            yield module.removesuffix(".weight")
            for layout in layouts:
                with contextlib.suppress(ModelError):
                    yield layout.to_disk(module).removesuffix(".weight")

    def called(prefix: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(names(prefix)))

    return quantized_source(folder, read_config(folder), infos, called)
