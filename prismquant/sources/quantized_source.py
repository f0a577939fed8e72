"""A checkpoint that is quantized already, as it is shown: every weight as one tensor of floats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.headers import TensorInfo
from prismquant.shards import NO_VIEWS, ShardReader, TensorView
from prismquant.sources.source_weight import SourceWeight

__all__ = ["FloatReader", "QuantizedSource"]


@dataclass(frozen=True)
class QuantizedSource:
    """The way in which a checkpoint is quantized.

    Attributes:
        method: What its configuration calls the method.
        weights: Every weight that is stored in codes, by the name that it has in floating point.
        passed_over: Stored tensors that say nothing of weights, such as scales of inputs.
        dtype: Of the weights as they are shown: the configuration's.
    """

    method: str
    weights: Mapping[str, SourceWeight]
    passed_over: frozenset[str]
    dtype: torch.dtype
    _hidden: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = {part for weight in self.weights.values() for part in weight.parts.values()}
        object.__setattr__(self, "_hidden", frozenset(parts | self.passed_over))

    def shown(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Headers as they are shown, by headers as they are stored."""
        found = {name: info for name, info in infos.items() if name not in self._hidden}
        for name, weight in self.weights.items():
            file = infos[next(iter(weight.parts.values()))].file
            found[name] = TensorInfo(self.dtype, weight.shape, file)
        return found

    def describe(self) -> str:
        """In a few words, e.g. ``fp8: 252 weights in fp8 blocks of 128 x 128``."""
        counts = Counter(weight.format for weight in self.weights.values())
        told = ", ".join(f"{count} weights in {name}" for name, count in counts.most_common())
        return f"{self.method}: {told}"

    def notes(self) -> list[str]:
        """Sentences on what becomes of such a source."""
        dtype = str(self.dtype).removeprefix("torch.")
        told = [
            f"the source is quantized ({self.describe()}): its weights are dequantized to {dtype} "
            "as they are read, and what their rounding lost is not regained"
        ]
        if self.passed_over:
            count = f"{len(self.passed_over)} tensors"
            told.append(
                f"what the source says of the rounding of inputs, outputs and caches ({count}) is "
                "left out of the result"
            )
        return told


class FloatReader(ShardReader):
    """A quantized checkpoint seen in floating point: weights are dequantized when they are read.

    Args:
        folder: The checkpoint.
        source: How it is quantized.
        views: As for :class:`~prismquant.shards.ShardReader`, of tensors in floating point.
    """

    def __init__(
        self,
        folder: Path,
        source: QuantizedSource,
        views: Mapping[str, TensorView] = NO_VIEWS,
    ) -> None:
        super().__init__(folder, views=views)
        self._source, self._stored = source, ShardReader(folder)
        self._infos = source.shown(self._infos)

    def read(self, name: str) -> Tensor:
        """The tensor; a quantized weight in floating point.

        Raises:
            FormatError: What is stored is not what its format demands.
        """
        return super().read(name) if name in self.views else self.read_matrix(name, None)

    def read_matrix(self, name: str, index: int | None) -> Tensor:
        """One matrix of a stack, or a whole tensor, in floating point."""
        weight = self._source.weights.get(name)
        if weight is None:
            return self._stored.read_matrix(name, index)
        try:
            return weight.values(self._stored, self._source.dtype, index)
        except FormatError as error:
            part = error.where or name
            file = self._stored.info(next(iter(weight.parts.values()))).file
            remedy = error.remedy or f"copy {file} from the original checkpoint again"
            where = f"{self.folder / file}: {part}"
            raise FormatError(error.what, where=where, remedy=remedy) from error

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Lines of a tensor; of the whole one, where it is quantized or lies in another."""
        if name not in self.views and name not in self._source.weights:
            return self._stored.read_rows(name, rows)
        self._require_rows(name, rows)
        return self.read(name)[rows]

    def read_ahead(self, names: Iterable[str]) -> None:
        """Let the system fetch what the tensors are made of."""
        stored = (self.views[name].source if name in self.views else name for name in names)
        made = self._source.weights
        parts = (made[name].parts.values() if name in made else (name,) for name in stored)
        self._stored.read_ahead(part for one in parts for part in one)
