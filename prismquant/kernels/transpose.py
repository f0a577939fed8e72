"""Columns of a matrix in any order, as lines: what a sweep reads, and back.

In torch this is a selection and a transposition, each a pass over memory; compiled by numba it is
one, in tiles that stay in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from prismquant.kernels.rounding import Kernel


def columns_as_lines(kernel: Kernel, matrix: Tensor, columns: Tensor, lines: Tensor) -> None:
    """``lines[k] = matrix[:, columns[k]]``.

    Args:
        kernel: What rounds these columns; ``numba`` moves them too.
        matrix: float32 ``[r, in]``.
        columns: int64 ``[n]``.
        lines: float32 ``[n, r]``, to be filled.
    """
    if kernel == "numba":
        from prismquant.kernels import cpu_transpose

        cpu_transpose.gather(matrix.detach().numpy(), columns.numpy(), lines.numpy())
        return
    lines.copy_(matrix.index_select(1, columns).T)


def lines_as_columns(kernel: Kernel, lines: Tensor, columns: Tensor, matrix: Tensor) -> None:
    """``matrix[:, columns[k]] = lines[k]``; other columns are left alone.

    Args:
        kernel: What has rounded these columns.
        lines: int8 ``[n, r]``.
        columns: int64 ``[n]``, no one twice.
        matrix: int8 ``[r, in]``, to be filled.
    """
    if kernel == "numba":
        from prismquant.kernels import cpu_transpose

        cpu_transpose.scatter(lines.numpy(), columns.numpy(), matrix.numpy())
        return
    matrix.index_copy_(1, columns, lines.T)
