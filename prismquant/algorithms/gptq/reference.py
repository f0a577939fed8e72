"""GPTQ in its left-looking form, as it is derived: the method to read, and to test against.

A row ``w`` of the weight becomes ``q``, with scales that are known, and loses ``e H e^T``, where
``e = w - q`` and ``H`` is the Hessian: the mean of ``x x^T`` over the inputs ``x``. Write
``H = R R^T`` with ``R`` upper triangular. The loss is then one square for each column:

    e H e^T = sum over k of R_kk^2 (t_k - q_k)^2,   t_k = w_k + sum over j < k of e_j R_jk / R_kk

so column k is rounded from its target ``t_k``, at which the errors before it pull. These are the
codes of Frantar et al. (arXiv 2210.17323, algorithm 1), whose factor of the inverse is ``R^-1``.

Early errors are compensated by later columns, late ones stay; so the column with the smallest pivot
goes last, again and again. When every column has been rounded, coordinate descent rounds each once
more from the target that is best while all others are fixed (QuantEase, arXiv 2309.01885):

    w_k + sum over j != k of e_j H_jk / H_kk
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from prismquant.numerics.grids import Grid


def gptq_points(
    weight: Tensor,
    hessian: Tensor,
    step: Tensor,
    zero: Tensor,
    grid: Grid,
    *,
    damping: float = 0.1,
    passes: int = 2,
) -> Tensor:
    """Points of the grid for every weight; column by column, in float64.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``, with a positive diagonal.
        step: The scale of every weight, ``[out, in]``.
        zero: The zero point of every weight, likewise.
        grid: What is rounded to.
        damping: Added to the diagonal, as a fraction of each entry.
        passes: Passes of coordinate descent.

    Returns:
        float64 ``[out, in]``; the nearest points in rows where these lose less.
    """
    weight, hessian, step, zero = (t.double() for t in (weight, hessian, step, zero))

    def nearest(target: Tensor, columns: slice | int) -> Tensor:
        """The points nearest to a target."""
        return grid.round_(target / step[:, columns] + zero[:, columns])

    def values(points: Tensor, columns: slice | int) -> Tensor:
        """The values that points stand for."""
        return (points - zero[:, columns]) * step[:, columns]

    damped = hessian + damping * torch.diag(hessian.diagonal())
    order = smallest_pivot_last(damped)
    root = upper_factor(damped[order][:, order])
    points, errors = torch.empty_like(weight), torch.zeros_like(weight)
    for position, column in enumerate(order):
        before = order[:position]
        pull = errors[:, before] @ root[:position, position] / root[position, position]
        points[:, column] = nearest(weight[:, column] + pull, column)
        errors[:, column] = weight[:, column] - values(points[:, column], column)
    for _ in range(passes):
        for column in range(len(damped)):
            pull = errors @ damped[:, column] / damped[column, column] - errors[:, column]
            points[:, column] = nearest(weight[:, column] + pull, column)
            errors[:, column] = weight[:, column] - values(points[:, column], column)

    plain = nearest(weight, slice(None))
    plain_errors = weight - values(plain, slice(None))
    worse = losses(errors, hessian) > losses(plain_errors, hessian)
    return torch.where(worse.unsqueeze(1), plain, points)


def smallest_pivot_last(matrix: Tensor) -> list[int]:
    """Column at each position: the one with the smallest remaining pivot last, over and over."""
    rest, late = matrix.clone(), list[int]()
    for _ in range(len(matrix)):
        pivots = rest.diagonal().clone()
        pivots[late] = torch.inf
        column = int(pivots.argmin())
        rest -= torch.outer(rest[column], rest[column]) / rest[column, column]
        late.append(column)
    return late[::-1]


def upper_factor(matrix: Tensor) -> Tensor:
    """``R`` of ``R R^T``, upper triangular: the usual factorization of the reversed matrix."""
    lower: Tensor = torch.linalg.cholesky(matrix.flip(0, 1))
    return lower.flip(0, 1)


def losses(errors: Tensor, hessian: Tensor) -> Tensor:
    """``e H e^T`` of each row, ``[out]``."""
    return ((errors @ hessian) * errors).sum(1)
