"""Eliminating columns by their smallest pivot, without leaving compiled code in between.

In torch every column takes some nine small operations and waits for two numbers to come back, and
columns that move to the front of a triangle are copied one by one through all of its memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prismquant.kernels.dispatch import compiled_loops

if TYPE_CHECKING:
    from torch import Tensor


def supports(device: torch.device) -> bool:
    """Whether the functions below work here: on CPUs with the package ``numba``."""
    return device.type == "cpu" and compiled_loops("cpu_pivots") is not None


def pick_smallest(matrix: Tensor, lines: Tensor) -> list[int]:
    """Eliminate columns, each time the one with the smallest pivot.

    Args:
        matrix: Symmetric ``[m, m]``, float32 or float64, of which the lower triangle is read.
        lines: Of the same dtype, contiguous ``[b, m]``, to be filled with lines of factors. Where a
            line meets a column that went before, it holds a rounding error.

    Returns:
        Indices of the columns in the order of elimination; fewer than ``b`` when a pivot is not
        positive or not finite, and then the remaining lines mean nothing.

    Raises:
        ImportError: There is no numba.
    """
    from prismquant.kernels import cpu_pivots

    picked = torch.empty(len(lines), dtype=torch.int64)
    left = matrix.diagonal().clone()
    found = cpu_pivots.pick(matrix.numpy(), lines.numpy(), left.numpy(), picked.numpy())
    return [int(place) for place in picked[:found]]


def move_columns(matrix: Tensor, moved: Tensor, free: Tensor, rows: slice) -> None:
    """Put columns in the places of others, in some rows of the lower triangle.

    Args:
        matrix: Symmetric ``[m, m]``, float32 or float64, of which the lower triangle alone is kept.
        moved: The columns, whole and in the new arrangement, contiguous ``[f, m]``.
        free: Their places, int64 ``[f]``, ascending.
        rows: Those of the matrix that are brought up to date.

    Raises:
        ImportError: There is no numba.
    """
    from prismquant.kernels import cpu_pivots

    cpu_pivots.move_columns(matrix.numpy(), moved.numpy(), free.numpy(), rows.start, rows.stop)
