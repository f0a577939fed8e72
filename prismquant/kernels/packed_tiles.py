"""Many rows times a weight in codes, on a CPU: tiles are dequantized by numba, multiplied by torch.

A piece of the weight is written out in floating point at a time, which stays in the cache; never
the whole of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prismquant.kernels import cpu_packed
from prismquant.kernels.instructions import multiplies_bfloat16
from prismquant.kernels.packed_numba import loop_arguments, wrong_kind
from prismquant.kernels.tiled_weight import ROWS, TiledWeight

# Values that are written out at a time, some MB.
_PIECE = 1 << 20


def refusal(x: Tensor, weight: TiledWeight) -> str | None:
    """A few words on why a case is not taken, or None."""
    return wrong_kind(x)


def run(x: Tensor, weight: TiledWeight) -> Tensor:
    """``x`` times the weight; as of :func:`.packed_torch.run`.

    It is multiplied in bfloat16 if the input is, and the processor does so natively; else in
    float32, which holds each value of the weight exactly or rounds it once.
    """
    narrow = x.dtype == torch.bfloat16 and multiplies_bfloat16()
    rows = x if narrow else x.to(torch.float32)
    rows = rows if weight.order is None else rows[:, weight.order]
    out = rows.new_empty(len(x), weight.shape[0])
    arguments, pieces = loop_arguments(weight), weight.pieces(_PIECE)
    memory = torch.empty(x.shape[1] * (pieces[0].stop - pieces[0].start + ROWS))
    for piece in pieces:
        first, last = piece.start // ROWS, -(-piece.stop // ROWS)
        width = (last - first) * ROWS
        values = memory[: x.shape[1] * width].view(x.shape[1], width)
        cpu_packed.dequantize_tiles(*arguments, values.numpy(), first, last)
        out[:, piece] = rows @ values[:, : piece.stop - piece.start].to(rows.dtype)
    return weight.divided(out).to(x.dtype)
