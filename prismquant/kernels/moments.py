"""Sums that keep what rounding takes from them, in one pass over memory.

In torch, adding a product to such a sum takes six passes; after a few hundred tokens they cost a
CPU almost as much as the product did. Here each number is read and written once. The arithmetic is
the same, operation by operation, and so are the bits.

Needs the package ``numba``; nothing is imported before a sum asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prismquant.kernels.dispatch import compiled_loops

if TYPE_CHECKING:
    from numpy.typing import NDArray


def two_sum(high: Tensor, low: Tensor, x: Tensor) -> None:
    """Add ``x`` to ``high``, and what rounding took from the sum to ``low``.

    Source: Knuth, TAOCP volume 2, section 4.2.2.

    Args:
        high: The sum, ``[n, m]``.
        low: What rounding took so far, of that shape and dtype.
        x: Likewise; it may be spoilt.
    """
    parts = (high, low, x)
    loops = compiled_loops("cpu_moments") if all(_takes(part) for part in parts) else None
    if loops is not None:
        lines = [number for part in parts for number in (flat(part), part.stride(0))]
        loops.two_sum_lines(*lines, *high.shape)
        return
    total = high + x
    of_x = total - high
    low += x.sub_(of_x)
    torch.sub(total, of_x, out=of_x)
    low += torch.sub(high, of_x, out=of_x)
    high.copy_(total)


def _takes(x: Tensor) -> bool:
    """Whether the loop can read a matrix, whose lines must be contiguous."""
    fits = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    return fits and (x.stride(1) == 1 or x.shape[1] == 1)


def flat(x: Tensor) -> NDArray[Any]:
    """The memory of a matrix whose lines are contiguous, from its first number to its last.

    Args:
        x: ``[n, m]`` on a CPU, not empty.

    Returns:
        Its numbers and what lies between its lines, not copied.
    """
    extent = (len(x) - 1) * x.stride(0) + x.shape[1]
    flat: NDArray[Any] = x.detach().as_strided((extent,), (1,)).numpy()
    return flat
