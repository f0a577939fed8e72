"""Cholesky factorization from the last column to the first, in place, with or without pivoting.

``H = R R^T`` with R upper triangular, for the sweep of :mod:`prismquant.algorithms.gptq`. Working
from the end, the column of R that each step finds is just the line of factors that the sweep reads
at that position, so the lines are stored as rows, and nothing is computed twice. Where the sweep's
order is chosen by pivots, choosing it *is* the factorization.

Only the lower triangle of the matrix is read or kept up to date, block of rows by block of rows:
the other half would double the work. Everything happens in the memory of the matrix itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.kernels import pivots

if TYPE_CHECKING:
    from collections.abc import Iterator

# Columns eliminated between two updates of what remains. Lines inside a block are brought up to
# date one by one, at the speed of memory; larger blocks shift work to there.
_PIVOT_BLOCK = 128
# Without pivots a block's lines come from one product.
_PLAIN_BLOCK = 256
# Rows of a triangle updated at once: what sticks out above the diagonal is wasted.
_PANEL = 512


def factorize_in_place(matrix: Tensor) -> bool:
    """Factorize as ``R R^T`` in the given order.

    Args:
        matrix: Symmetric ``[n, n]``, float32 or float64; only its lower triangle is read. Line k
            becomes column k of R, down to the diagonal; what is above is undefined.

    Returns:
        Whether the matrix is positive definite in its precision; if not, it is spoilt.
    """
    end = len(matrix)
    while end:
        start = max(0, end - _PLAIN_BLOCK)
        lines = matrix[start:end, :end]
        # Left-looking: a block is touched once, by all the lines found so far.
        lines.addmm_(matrix[end:, start:end].T, matrix[end:, :end], alpha=-1)
        # The factorization from the end is the usual one of the reversed block.
        lower, failed = torch.linalg.cholesky_ex(lines[:, start:].flip(0, 1))
        if int(failed):
            return False
        own = lower.flip(0, 1)
        lines[:, :start] = torch.linalg.solve_triangular(own, lines[:, :start], upper=True)
        lines[:, start:] = own.T
        end = start
    return bool(torch.isfinite(matrix.diagonal()).all())


def factorize_smallest_last(matrix: Tensor) -> Tensor | None:
    """Factorize as ``R R^T`` after putting the column with the smallest pivot last, over and over.

    A column's pivot is its variance given all columns that come later: with columns that correlate
    strongly, the diagonal alone says little about it. Rounding errors of early columns are
    compensated, those of late columns stay, so the late ones should be cheap.

    The blocked form of a pivoted Cholesky factorization (Higham, "Analysis of the Cholesky
    decomposition of a semi-definite matrix", 1990; LAPACK's ``pstrf``), from the end and with the
    smallest pivot in place of the largest.

    Args:
        matrix: Symmetric ``[n, n]``, float32 or float64; only its lower triangle is read. Line k
            becomes the column of R at position k, down to the diagonal; what is above is undefined.

    Returns:
        Column at each position, int64 ``[n]``; ``None`` when a pivot is not positive, and then the
        matrix is spoilt.
    """
    order = torch.arange(len(matrix), device=matrix.device)
    end = len(matrix)
    pick = _pick_compiled if pivots.supports(matrix.device) else _pick_smallest
    while end:
        lines, picked = pick(matrix[:end, :end])
        if len(picked) < len(lines):
            return None
        _settle(matrix[:end], lines, picked, order[:end])
        end -= len(picked)
        for rows in blocks(end, _PANEL):
            reach = slice(0, rows.stop)
            matrix[rows, reach].addmm_(lines[:, rows].T, lines[:, reach], alpha=-1)
    for rows in blocks(len(matrix), _PANEL):
        reach = slice(0, rows.stop)
        matrix[rows, reach] = matrix[rows].index_select(1, order[reach])
    return order


def blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(count)``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _pick_smallest(matrix: Tensor) -> tuple[Tensor, list[int]]:
    """Eliminate up to a block of columns, each time the one with the smallest pivot.

    Args:
        matrix: What remains, ``[m, m]``; not changed.

    Returns:
        Their lines of factors ``[b, m]`` and their indices in the order of elimination; fewer of
        these than lines when a pivot is not positive.
    """
    count = min(_PIVOT_BLOCK, len(matrix))
    left = matrix.diagonal().clone()
    lines = matrix.new_empty(count, len(matrix))
    picked: list[int] = []
    for line, before in zip(lines, range(count), strict=True):
        smallest, place = left.min(0)
        pivot, index = float(smallest), int(place)
        if not 0 < pivot < math.inf:
            break
        # The two halves of the column, of which only the lower triangle is up to date.
        line[:index] = matrix[index, :index]
        line[index:] = matrix[index:, index]
        if before:
            line.addmv_(lines[:before].T, lines[:before, index], alpha=-1)
        line.div_(math.sqrt(pivot))
        line[index] = math.sqrt(pivot)
        left.addcmul_(line, line, value=-1)
        left[index] = math.inf
        picked.append(index)
    return lines, picked


def _pick_compiled(matrix: Tensor) -> tuple[Tensor, list[int]]:
    """What :func:`_pick_smallest` does, in one kernel."""
    lines = matrix.new_empty(min(_PIVOT_BLOCK, len(matrix)), len(matrix))
    return lines, pivots.pick_smallest(matrix, lines)


def _settle(matrix: Tensor, lines: Tensor, picked: list[int], order: Tensor) -> None:
    """Move the columns that stay to the front, and store the lines of those that went at the end.

    Args:
        matrix: The rows that remained, ``[m, n]``. The last ``b`` receive the lines, at the columns
            that the whole matrix began with, so that later moves need not touch them.
        lines: Of factors, ``[b, m]``; their first columns are left in the new order.
        picked: The ``b`` columns that they eliminated.
        order: Column at each of the ``m`` positions, brought up to date.
    """
    end, start = len(order), len(order) - len(picked)
    gone = set(picked)
    # Those of the last columns that stay take the places of those further ahead that go.
    free = order.new_tensor([i for i in picked if i < start])
    late = order.new_tensor([i for i in range(start, end) if i not in gone])
    # The lower triangle alone is up to date: left of the diagonal a line, below it a column. Whole
    # rows are indexed, because torch copies all of a narrower slice before it picks columns.
    ahead = torch.arange(end, device=order.device) <= late.unsqueeze(1)
    moved = torch.where(
        ahead, matrix[:, :end].index_select(0, late), matrix.index_select(1, late).T
    )
    matrix[start:].index_copy_(1, order, lines.flip(0))
    moved.index_copy_(1, free, moved.index_select(1, late))
    matrix[:start, :start].index_copy_(0, free, moved[:, :start])
    matrix[:start].index_copy_(1, free, moved[:, :start].T)
    lines.index_copy_(1, free, lines.index_select(1, late))
    # The first to go comes last.
    went = order[order.new_tensor(picked[::-1])]
    order.index_copy_(0, free, order[late])
    order[start:] = went
