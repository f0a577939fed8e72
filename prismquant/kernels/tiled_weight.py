"""Weights in codes, laid out for the processor that multiplies with them.

On disk the codes of a row follow one another. Sixteen rows side by side suit vector instructions
better: one load brings the same columns of sixteen rows, which share the input that they are
multiplied by, and scales of sixteen rows are a vector too. It takes as many bits a code as on disk.

A code of ``b`` bits is cut into parts of 8, 4, 2 and 1 bits, the upper bits first: 7 bits are a
part of 4, one of 2 and one of 1. A word of 32 bits holds one part of so many consecutive columns of
a row as fit in it, the first column in its lowest bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from prismquant.numerics.grids import FloatGrid
from prismquant.numerics.kinds import Granularity

if TYPE_CHECKING:
    from prismquant.formats.quantized_layer import QuantizedTensor
    from prismquant.numerics.grids import Grid

# Rows of a tile, and a multiple of which columns are filled up to: those of the narrowest part.
ROWS, COLUMNS = 16, 32
# Rows that are unpacked at a time: their words are four times as large as codes.
_ROWS_AT_A_TIME = 256
_WIDTHS = (8, 4, 2, 1)


def parts_of(bits: int) -> tuple[int, ...]:
    """Widths of the parts that a code is cut into, upper bits first."""
    return tuple(width for width in _WIDTHS if bits & width)


@dataclass(frozen=True, eq=False)
class TiledWeight:
    """A weight in codes, sixteen rows side by side.

    Attributes:
        words: int32, one part after the other, each ``[T, K / n, 16]`` of ``n`` codes a word, where
            T tiles hold all rows and K is the number of columns, filled up to a multiple of 32.
        scale: ``[T, G, 16]``, of each row and group of columns: bfloat16 where that loses nothing,
            else float32.
        zero: Likewise, zero points; None: there are none.
        divisor: float32 ``[1]``, by which scales are divided; None: they are not.
        order: int64 ``[in]``, which column of the weight each stored one is; None: they are in
            order.
        grid: The points and their codes.
        shape: ``(out, in)``.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    divisor: Tensor | None
    order: Tensor | None
    grid: Grid
    shape: tuple[int, int]

    @staticmethod
    def of(weight: QuantizedTensor) -> TiledWeight:
        """The same codes and scales in tiles.

        Args:
            weight: In any format.
        """
        order = None if weight.group_index is None else weight.group_index.argsort(stable=True)
        spec = weight.spec
        pieces = weight.codes.split(_ROWS_AT_A_TIME)
        words = torch.cat(
            [
                _part(codes, spec.grid, order, place, width)
                for place, width in _places(spec.bits)
                for codes in pieces
            ]
        )
        scale, divisor = _undivided(weight)
        scale = _narrowed(_of_rows(scale, weight))
        zero = None
        if weight.zero_point is not None:
            # Of at most 8 bits, which both dtypes hold.
            zero = _of_rows(weight.zero_point, weight).to(scale.dtype)
        return TiledWeight(words, scale, zero, divisor, order, spec.grid, weight.shape)

    @property
    def columns(self) -> int:
        """Columns of a row as they are stored, with those that fill it up."""
        return -(-self.shape[1] // COLUMNS) * COLUMNS

    @property
    def group(self) -> int:
        """Consecutive columns that share a scale."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        tensors = (self.words, self.scale, self.zero, self.order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def divided(self, value: Tensor) -> Tensor:
        """Scales, or products with them, divided as scales are; in place."""
        return value if self.divisor is None else value.div_(self.divisor)

    def pieces(self, values: int) -> list[slice]:
        """Rows in whole tiles, of about so many values each."""
        step = max(1, values // (self.columns * ROWS)) * ROWS
        rows = self.shape[0]
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def to(self, device: torch.device | str) -> TiledWeight:
        """The same on a device."""
        return replace(
            self,
            words=self.words.to(device),
            scale=self.scale.to(device),
            zero=None if self.zero is None else self.zero.to(device),
            divisor=None if self.divisor is None else self.divisor.to(device),
            order=None if self.order is None else self.order.to(device),
        )

    def codes(self, rows: slice) -> Tensor:
        """Codes of some rows, int8 ``[rows, in]``, their columns as they are stored.

        Args:
            rows: From one tile's first row to one's last, or the last of all.
        """
        tiles = slice(rows.start // ROWS, -(-rows.stop // ROWS))
        codes = torch.zeros((), dtype=torch.int32, device=self.words.device)
        for (place, width), words in zip(_places(self.grid.bits), self._parts(), strict=True):
            shifts = torch.arange(0, 32, width, dtype=torch.int32, device=words.device)
            found = words[tiles].unsqueeze(2) >> shifts.view(1, 1, -1, 1) & (1 << width) - 1
            codes = codes + (found.flatten(1, 2) << place)
        codes = codes.transpose(1, 2).flatten(0, 1)[: rows.stop - rows.start, : self.shape[1]]
        if not isinstance(self.grid, FloatGrid):
            codes = codes - (1 << self.grid.bits - 1)
        return codes.to(torch.int8)

    def dequantize(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Values of some rows, ``[rows, in]``, computed in float32 and rounded once.

        Args:
            rows: As of :meth:`codes`.
            dtype: Of the result.
        """
        points = self.grid.read(self.codes(rows))
        tiles = slice(rows.start // ROWS, -(-rows.stop // ROWS))
        scale = self.divided(_by_row(self.scale[tiles])[: len(points)])
        grouped = points.view(len(points), scale.shape[1], -1)
        if self.zero is not None:
            grouped -= _by_row(self.zero[tiles])[: len(points)].unsqueeze(2)
        values = grouped.mul_(scale.unsqueeze(2)).flatten(1).to(dtype)
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.order, values)

    def _parts(self) -> tuple[Tensor, ...]:
        """The words of each part, ``[T, K / n, 16]``."""
        tiles, columns = len(self.scale), self.columns
        widths = parts_of(self.grid.bits)
        sizes = [tiles * columns * width * ROWS // 32 for width in widths]
        return tuple(part.view(tiles, -1, ROWS) for part in self.words.split(sizes))


def _places(bits: int) -> list[tuple[int, int]]:
    """The lowest bit and the width of each part of a code."""
    places, above = [], bits
    for width in parts_of(bits):
        above -= width
        places.append((above, width))
    return places


def _part(codes: Tensor, grid: Grid, order: Tensor | None, place: int, width: int) -> Tensor:
    """Words of one part of codes int8 ``[rows, in]``, flat."""
    if order is not None:
        codes = codes[:, order]
    first = 0 if isinstance(grid, FloatGrid) else 1 << grid.bits - 1
    bits = (codes.to(torch.int32) + first) >> place & (1 << width) - 1
    bits = pad(bits, (0, -codes.shape[1] % COLUMNS, 0, -len(codes) % ROWS))
    tiles = bits.view(-1, ROWS, bits.shape[1]).transpose(1, 2)
    shifts = torch.arange(0, 32, width, dtype=torch.int32, device=codes.device)
    spread = tiles.reshape(len(tiles), -1, len(shifts), ROWS) << shifts.view(1, 1, -1, 1)
    return spread.sum(2, dtype=torch.int32).flatten()


def _undivided(weight: QuantizedTensor) -> tuple[Tensor, Tensor | None]:
    """Scales, and what to divide them by: E4M3 numbers where their quotient is known to be one."""
    scale, divisor = weight.scale, weight.global_scale
    if divisor is None:
        return scale, None
    # Quotients of neighbours differ by far more than what rounding may have done to them.
    numbers = (scale * divisor).to(torch.float8_e4m3fn).to(torch.float32)
    return (numbers, divisor) if torch.equal(numbers / divisor, scale) else (scale, None)


def _of_rows(value: Tensor, weight: QuantizedTensor) -> Tensor:
    """Scales of a tensor, of rows, of groups or of blocks, as ``[T, G, 16]``."""
    rows = weight.shape[0]
    if value.element_size() == 1 and value.is_floating_point():
        value = value.float()  # E8M0 cannot be indexed
    if value.dim() == 1:
        value = value.expand(rows, 1)
    elif weight.spec.granularity == Granularity.BLOCK:
        value = value.repeat_interleave(weight.spec.group_size or 1, dim=0)[:rows]
    filled = pad(value, (0, 0, 0, -rows % ROWS))
    return filled.view(-1, ROWS, filled.shape[1]).transpose(1, 2).contiguous()


def _by_row(tiled: Tensor) -> Tensor:
    """Scales of tiles ``[T, G, 16]``, as float32 ``[rows, G]``."""
    return tiled.transpose(1, 2).flatten(0, 1).to(torch.float32)


def _narrowed(scale: Tensor) -> Tensor:
    """In bfloat16 where that loses nothing, else in float32."""
    wide, narrow = scale.to(torch.float32), scale.to(torch.bfloat16)
    return narrow if torch.equal(narrow.to(torch.float32), wide) else wide
