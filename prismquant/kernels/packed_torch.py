"""The reference for products with a weight in codes: dequantized some rows at a time."""

from __future__ import annotations

from torch import Tensor

from prismquant.kernels.tiled_weight import TiledWeight

# Values that are dequantized at a time.
_PIECE = 1 << 21


def refusal(x: Tensor, weight: TiledWeight) -> str | None:
    """None: every case is taken."""
    return None


def run(x: Tensor, weight: TiledWeight) -> Tensor:
    """``x`` times the weight.

    Args:
        x: ``[rows, in]``, floating point.
        weight: On the same device.

    Returns:
        ``[rows, out]`` in the dtype of ``x``.
    """
    out = x.new_empty(len(x), weight.shape[0])
    for rows in weight.pieces(_PIECE):
        out[:, rows] = x @ weight.dequantize(rows, x.dtype).T
    return out
