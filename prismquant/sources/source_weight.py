"""Weights of a quantized checkpoint: which stored tensors they are made of, and their values."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.formats.stored_values import (
    awq_values,
    fp4_rows,
    gptq_values,
    paired_int4_rows,
    scale_values,
    scaled_values,
)
from prismquant.shards import ShardReader

# Dtypes of scales in which the scale of a row or group of tiny weights becomes zero.
_UNDERFLOWING = (torch.float16, torch.float8_e4m3fn)


@dataclass(frozen=True)
class SourceWeight(ABC):
    """A weight that is stored in codes.

    Attributes:
        shape: As the model has it.
        parts: What each of its stored tensors is -> the tensor's name.
        format: Its number format, in words.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    format: str

    @abstractmethod
    def values(self, stored: ShardReader, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """The weight in floating point.

        Args:
            stored: Its tensors as they are stored.
            dtype: Of the result.
            index: Of a stack of matrices, the one that is wanted; None: all of them.

        Raises:
            FormatError: Stored tensors are not what the format demands.
        """


@dataclass(frozen=True)
class ScaledWeight(SourceWeight):
    """Numbers with a scale for each block of rows and columns.

    Parts are ``weight`` and ``scale``; ``scale_2``, one number that multiplies all scales; and
    ``columns``, a factor for each input.

    Attributes:
        block: Rows and columns that share a scale.
        packed: How numbers of 4 bits lie: ``e2m1`` two inputs a byte, ``int4`` two outputs a byte;
            None: each number by itself.
    """

    block: tuple[int, int]
    packed: str | None = None

    def values(self, stored: ShardReader, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """Numbers times scales, matrix by matrix."""
        try:
            return self._products(stored, dtype, index)
        except FormatError as error:
            where = error.where or self.parts["scale"]
            raise FormatError(error.what, where=where, remedy=error.remedy) from error

    def _products(self, stored: ShardReader, dtype: torch.dtype, index: int | None) -> Tensor:
        scale = self._scales(stored)
        if index is not None:
            return self._matrix(stored, index, scale[index], dtype)
        if len(self.shape) == 2:
            return self._matrix(stored, None, scale[0], dtype)
        found = torch.empty(self.shape, dtype=dtype)
        for number, matrix in enumerate(found.flatten(0, -3)):
            matrix.copy_(self._matrix(stored, number, scale[number], dtype))
        return found

    def _matrix(
        self, stored: ShardReader, index: int | None, scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        rows = self._rows(stored.read_matrix(self.parts["weight"], index))
        shape = (self.shape[-2], self.shape[-1])
        vanishing = stored.info(self.parts["scale"]).dtype in _UNDERFLOWING
        made = partial(scaled_values, rows, shape, scale, self.block, vanishing=vanishing)
        if "columns" not in self.parts:
            return made(dtype)
        factors = _factors(stored, self.parts["columns"])
        return (made(torch.float32) * factors).to(dtype)

    def _scales(self, stored: ShardReader) -> Tensor:
        """float32 ``[matrices, blocks down, blocks across]``."""
        scale = scale_values(stored.read(self.parts["scale"]))
        if "scale_2" in self.parts:
            factor = scale_values(stored.read(self.parts["scale_2"]))
            scale = scale * factor.reshape(-1, *[1] * (scale.dim() - 1))
            if not bool(scale.isfinite().all()):
                raise FormatError("a scale overflows")
        rows, columns = self.shape[-2:]
        count = math.prod(self.shape[:-2])
        grid = (count, -(-rows // self.block[0]), -(-columns // self.block[1]))
        return scale.expand(grid) if scale.numel() == 1 else scale.reshape(grid)

    def _rows(self, matrix: Tensor) -> Callable[[slice], Tensor]:
        if self.packed == "e2m1":
            return fp4_rows(matrix.view(torch.uint8))
        return paired_int4_rows(matrix) if self.packed == "int4" else lambda piece: matrix[piece]


@dataclass(frozen=True)
class GPTQWeight(SourceWeight):
    """A weight in the GPTQ layout: parts ``qweight``, ``qzeros``, ``scales``, maybe ``g_idx``.

    Attributes:
        less_one: Whether zero points are stored less one.
    """

    less_one: bool

    def values(self, stored: ShardReader, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """Codes less zero points, times scales."""
        words, zeros, scales = _read(stored, self.parts)
        columns = self.shape[1]
        groups = torch.arange(columns) // -(-columns // scales.shape[0])
        if "g_idx" in self.parts:
            groups = stored.read(self.parts["g_idx"]).to(torch.int64)
        if bool(((groups < 0) | (groups >= len(scales))).any()):
            raise FormatError("an input's group does not exist")
        vanishing, scales = scales.dtype in _UNDERFLOWING, scale_values(scales)
        made = partial(gptq_values, words, zeros, scales, groups, vanishing=vanishing)
        return made(less_one=self.less_one, dtype=dtype)


@dataclass(frozen=True)
class AWQWeight(SourceWeight):
    """A weight in the GEMM version of the AWQ layout: ``qweight``, ``qzeros``, ``scales``."""

    def values(self, stored: ShardReader, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """Codes less zero points, times scales."""
        words, zeros, scales = _read(stored, self.parts)
        vanishing = scales.dtype in _UNDERFLOWING
        return awq_values(words, zeros, scale_values(scales), dtype, vanishing=vanishing)


def _factors(stored: ShardReader, name: str) -> Tensor:
    """Factors of a weight's columns, float32 ``[in]``.

    Raises:
        FormatError: One is zero or no number.
    """
    factors = scale_values(stored.read(name))
    if bool((factors == 0).any()):
        raise FormatError("a factor of the weight's columns is zero", where=name)
    return factors


def _read(stored: ShardReader, parts: Mapping[str, str]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, zero points and scales of a weight whose codes lie in words."""
    return stored.read(parts["qweight"]), stored.read(parts["qzeros"]), stored.read(parts["scales"])
