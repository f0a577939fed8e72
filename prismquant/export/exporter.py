"""The interface of exporters, and what they share: refusals, a folder that is written in order.

An exporter first says which layers it cannot hold, and why; only if there are none does it write.
Codes are never chosen again: an exported layer stands for the same numbers as the stored one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from prismquant.errors import FormatError
from prismquant.export.companions import files_to_copy
from prismquant.export.compressed_tensors.reader import StoredLayer
from prismquant.export.compressed_tensors.stored import StoredCheckpoint
from prismquant.headers import read_header
from prismquant.shards import INDEX_NAME
from prismquant.storage import copy_file, write_json, write_tensors

# A shard is written when it has grown to so many bytes; it is held in memory until then.
SHARD_BYTES = 1 << 30
_BLOCK = re.compile(r"(?P<before>.*?[.])(?P<number>\d+)(?P<after>[.].*)")

Progress = Callable[[int, int, str], None]
"""Called with ``(tensors done, tensors in all, name of the next)``."""


@dataclass(frozen=True)
class Refusal:
    """The reason why a format cannot hold a layer.

    Attributes:
        layer: Its name.
        why: The reason, in words that are the same for all layers that share it.
        detail: What is particular to this layer, such as a value.
    """

    layer: str
    why: str
    detail: str = ""


class Exporter(Protocol):
    """One format that a checkpoint can be exported to.

    A frozen dataclass whose fields, if it has any, are its options. To add a format, write such a
    class in a module of its own and name it in :data:`prismquant.export.exporters.EXPORTERS`.

    Attributes:
        name: What ``--format`` calls it.
        drops_inputs: What becomes of quantized inputs, outputs and caches: ``never`` (the format
            declares them), ``asked`` (it holds weights only, and a user must agree to that), or
            ``always`` (weights only is what the format is for).
        needs_quantized: Whether there must be a quantized layer.
    """

    name: ClassVar[str]
    drops_inputs: ClassVar[str]
    needs_quantized: ClassVar[bool]

    def refusals(self, source: StoredCheckpoint) -> list[Refusal]:
        """The layers that the format cannot hold. Writes nothing; may read scales."""
        ...

    def remarks(self, source: StoredCheckpoint) -> list[str]:
        """Lines that a user should know of the result: who reads it, what differs."""
        ...

    def write(self, source: StoredCheckpoint, out: Path, progress: Progress) -> None:
        """Write everything. Called only when nothing was refused; ``config.json`` comes last."""
        ...


def check(format_name: str, source: StoredCheckpoint, refusals: Sequence[Refusal]) -> None:
    """Stop if there are refusals.

    Raises:
        FormatError: Lists them, folded: each reason once, with the layers that it concerns.
    """
    if not refusals:
        return
    reasons: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        reasons.setdefault(refusal.why, []).append(refusal)
    lines = [f"  - {_folded(alike)}" for alike in reasons.values()]
    known = {layer.name for layer in source.layers}
    layers = len({refusal.layer for refusal in refusals} & known)
    raise FormatError(
        f"{layers} of {len(source.layers)} layers cannot be exported as {format_name}:\n"
        + "\n".join(lines),
        where=str(source.folder),
        remedy="nothing was written; choose another --format, or quantize with formats that it "
        "holds (docs/exports.md lists them)",
    )


def _folded(alike: Sequence[Refusal]) -> str:
    first = alike[0]
    detail = f" (the first: {first.detail})" if first.detail else ""
    return f"{first.why}{detail}: {', '.join(fold_names(r.layer for r in alike))}"


def fold_names(names: Iterable[str]) -> list[str]:
    """Names that differ only in the number of their block, as one each.

    >>> fold_names(["layers.0.up", "layers.1.up", "layers.2.up", "layers.5.up", "head"])
    ['layers.{0-2,5}.up', 'head']
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = _BLOCK.fullmatch(name)
        key = (match["before"], match["after"]) if match else (name, "")
        numbers.setdefault(key, []).extend([int(match["number"])] if match else [])
    return [
        f"{before}{_ranges(found)}{after}" if found else before
        for (before, after), found in numbers.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``{0-2,5}``; a single number stands alone."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{{{text}}}" if len(numbers) > 1 else text


def write_checkpoint(
    source: StoredCheckpoint,
    out: Path,
    progress: Progress,
    *,
    convert: Callable[[StoredLayer], Mapping[str, Tensor]],
    config: Mapping[str, Any],
    files: Mapping[str, Any] | None = None,
    keep: Callable[[str, Tensor], Tensor] | None = None,
    rename: Callable[[str], str] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint folder like the source's, with its quantized layers laid out anew.

    Args:
        source: The checkpoint that is exported.
        out: The folder.
        progress: Called as the work goes on.
        convert: The tensors of a layer in codes, or whose input is rotated, by the suffix of their
            names. Of other layers only the quantizers of inputs and outputs are left out.
        config: The whole content of ``config.json``, which is written last.
        files: Other JSON files by name, such as ``quantize_config.json``.
        keep: What becomes of any other tensor, given its name; it stays as it is by default.
        rename: From a tensor's name on disk to its name there; the source's by default.
        extra: More tensors, by their names there.
    """
    shards = Shards(out)
    shards.add(extra or {})
    pieces = list(source.walk())
    for number, (layer, name) in enumerate(pieces):
        progress(number, len(pieces), name)
        if layer is None or (layer.scheme is None and layer.rotation is None):
            tensor = source.shards.read(name)
            ready = {name: keep(name, tensor) if keep else tensor}
        else:
            ready = {f"{layer.prefix}.{k}": value for k, value in convert(layer).items()}
        shards.add({rename(n): tensor for n, tensor in ready.items()} if rename else ready)
    shards.finish()
    for file in files_to_copy(source.folder):
        copy_file(file, out / file.relative_to(source.folder))
    for file_name, content in (files or {}).items():
        write_json(out / file_name, content)
    write_json(out / "config.json", dict(config))
    progress(len(pieces), len(pieces), "done")


class Shards:
    """Writes tensors into shards of a bounded size, and their index at the end.

    Args:
        folder: Where they go.
        limit: A shard is written as soon as it holds so many bytes.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.limit = limit
        self._pending: dict[str, Tensor] = {}
        self._size = 0
        self._written: list[Path] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors by their names on disk; they end up in one shard."""
        self._pending |= tensors
        self._size += sum(tensor.nbytes for tensor in tensors.values())
        if self._size >= self.limit:
            self._flush()

    def finish(self) -> None:
        """Write what is pending, name the shards by their number, and write the index."""
        if self._pending or not self._written:
            self._flush()
        weight_map: dict[str, str] = {}
        size = 0
        for number, path in enumerate(self._written, start=1):
            name = f"model-{number:05d}-of-{len(self._written):05d}.safetensors"
            final = path.rename(path.with_name(name))
            infos = read_header(final)
            weight_map |= dict.fromkeys(infos, name)
            size += sum(info.nbytes for info in infos.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / INDEX_NAME, index)

    def _flush(self) -> None:
        # The number of shards is known only at the end.
        path = self.folder / f"part-{len(self._written) + 1:05d}.safetensors"
        write_tensors(path, self._pending)
        self._written.append(path)
        self._pending, self._size = {}, 0
