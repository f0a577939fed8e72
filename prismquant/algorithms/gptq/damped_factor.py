"""The Cholesky factor of a damped Hessian, in the order of the column loop.

Damping keeps few calibration tokens from being fitted too closely. Where a factorization fails,
more precision is tried, and then more damping; which attempt succeeded is part of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from prismquant.algorithms.gptq.cholesky import (
    can_round,
    divide_lines,
    factorize_in_place,
    factorize_smallest_last,
)
from prismquant.algorithms.layer_scales import scale_lines
from prismquant.errors import NumericsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prismquant.algorithms.gptq.shared_hessian import SharedHessian
    from prismquant.algorithms.problem import LayerProblem
    from prismquant.formats.spec import NumberSpec

Order = Literal["pivot", "activation", "group", "original"]
Basis = Literal["column", "mean"]

# Damping grows tenfold until the factorization succeeds: a positive semidefinite Hessian needs at
# most rounding noise, one that still fails with this much is not a Hessian.
DAMPING_LIMIT = 10.0
_DAMPING_FLOOR = 1e-6
# Of these the first that works is taken: dtype, and whether products round their factors.
_PRECISIONS = ((torch.float32, True), (torch.float32, False), (torch.float64, False))
# The diagonal entry of columns without moments, as a fraction of the least that others have.
_DEAD = 1e-6


@dataclass(frozen=True)
class Attempt:
    """A way to factorize.

    Attributes:
        number: How many were tried, this one included.
        damping: The fraction that is added to the diagonal.
        dtype: Of the factor.
        rounded: Whether products round their factors to bfloat16.
    """

    number: int
    damping: float
    dtype: torch.dtype
    rounded: bool

    @property
    def precision(self) -> str:
        """The dtype in words, for the record."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, products of bfloat16" if self.rounded else dtype

    def noise(self, count: int) -> float:
        """The fraction of its diagonal entry below which a pivot is lost in rounding errors.

        A factorization may succeed with such a pivot, but what its column owes to others is noise.

        Args:
            count: Columns of the matrix.
        """
        return 10.0 * math.sqrt(count) * torch.finfo(self.dtype).eps


@dataclass(frozen=True, eq=False)
class CholeskyFactor:
    """The factorization ``R R^T`` of a damped Hessian, ``R`` upper triangular.

    Attributes:
        columns: The column at each position of the column loop, int64 ``[n]``.
        lines: ``R_jk / R_kk`` at line k, column j below k, anything beyond; in the dtype it was
            computed in, ``[n, n]``.
        roots: ``R_kk``, in that dtype, ``[n]``.
        diagonal: Of the Hessian without damping, in the original order, float32 ``[n]``.
        damped: Of the damped one, likewise.
        attempt: How it was found.
    """

    columns: Tensor
    lines: Tensor
    roots: Tensor
    diagonal: Tensor
    damped: Tensor
    attempt: Attempt

    def coefficients(self, block: slice) -> Tensor:
        """Pull of errors of columns up to the block at its targets: ``R_jk / R_kk``.

        Returns:
            float32 ``[block, block.stop]``, undefined on and above the diagonal.
        """
        return self.lines[block, : block.stop].to(torch.float32)


@dataclass(frozen=True)
class Damping:
    """Damping of a Hessian, and the order of its columns.

    Attributes:
        fraction: Added to the diagonal, as a fraction of ``basis``.
        basis: ``column``: each column's own diagonal entry. ``mean``: the mean of the diagonal.
        order: Of the column loop.
    """

    fraction: float
    basis: Basis
    order: Order

    def factorize(self, problem: LayerProblem, hessian: SharedHessian) -> CholeskyFactor:
        """Order, damp and factorize, with more precision and then more damping until it works.

        Args:
            problem: Whose Hessian it is.
            hessian: The half below its diagonal becomes the factor.

        Raises:
            NumericsError: No attempt succeeds.
        """
        rounds = problem.products == torch.bfloat16 and can_round(hessian.matrix)
        for attempt in _attempts(self.fraction, rounds=rounds):
            factor = self._attempt(problem, hessian, attempt)
            if factor is not None:
                return factor
        diagonal = hessian.diagonal[hessian.diagonal > 0]
        raise NumericsError(
            f"the Hessian of {len(diagonal)} columns{problem.seen} cannot be factorized in "
            f"{attempt.number} attempts, "
            f"damping {self.fraction:g} to {attempt.damping:g}; its diagonal runs from "
            f"{float(diagonal.min()):.4g} to {float(diagonal.max()):.4g}",
            where=problem.title,
            remedy="check the calibration data, or use solver: rtn for this layer",
        )

    def _attempt(
        self, problem: LayerProblem, hessian: SharedHessian, own: Attempt
    ) -> CholeskyFactor | None:
        damped = self._damped(hessian.diagonal.to(own.dtype), own.damping)
        lines = hessian.matrix
        if own.dtype != lines.dtype:
            lines = torch.empty_like(lines, dtype=own.dtype)
        order = self._order(damped, problem.spec)
        # The first finds the Hessian below the diagonal as well.
        if order is not None or own.number > 1:
            if order is None:
                order = torch.arange(len(damped), device=damped.device)
            hessian.arrange(order, lines)
        lines.diagonal().copy_(damped if order is None else damped[order])
        columns = self._factorize_lines(lines, order, rounded=own.rounded)
        roots = lines.diagonal().clone()
        hessian.matrix.diagonal().copy_(hessian.diagonal)
        if columns is None:
            return None
        if not bool((roots.square() > own.noise(len(roots)) * damped[columns]).all()):
            return None
        divide_lines(lines, roots)
        damped = damped.to(torch.float32)
        return CholeskyFactor(columns, lines, roots, hessian.diagonal, damped, own)

    def _factorize_lines(
        self, lines: Tensor, order: Tensor | None, *, rounded: bool
    ) -> Tensor | None:
        """Column at each position, once what is below the diagonal is a factor; or None."""
        if self.order == "pivot":
            return factorize_smallest_last(lines, rounded=rounded)
        if not factorize_in_place(lines, rounded=rounded):
            return None
        return torch.arange(len(lines), device=lines.device) if order is None else order

    def _damped(self, diagonal: Tensor, fraction: float) -> Tensor:
        """The diagonal with damping, ``[n]``.

        Columns that calibration never excites have nothing but zeros in a Hessian. With next to
        nothing on the diagonal they can be factorized, cost nothing, and are rounded to nearest.
        """
        alive = diagonal > 0
        if not bool(alive.any()):
            return torch.ones_like(diagonal)
        basis = diagonal if self.basis == "column" else diagonal[alive].mean()
        damped = diagonal + fraction * basis
        return torch.where(alive, damped, _DEAD * damped[alive].min())

    def _order(self, damped: Tensor, spec: NumberSpec) -> Tensor | None:
        """The order before the factorization, unless it is the original one or that of pivots."""
        if self.order == "activation":
            return torch.argsort(damped, descending=True, stable=True)
        if self.order == "group":
            columns = torch.arange(len(damped), device=damped.device)
            return _group_by_group(damped, scale_lines(columns, spec))
        return None


def _attempts(damping: float, *, rounds: bool) -> Iterator[Attempt]:
    """Ways to factorize, cheapest and least damped first.

    Args:
        damping: To begin with.
        rounds: Whether products that round their factors save time.
    """
    number = 0
    while damping <= DAMPING_LIMIT:
        for dtype, rounded in _PRECISIONS[0 if rounds else 1 :]:
            number += 1
            yield Attempt(number, damping, dtype, rounded)
        damping = max(10 * damping, _DAMPING_FLOOR)


def _group_by_group(diagonal: Tensor, groups: Tensor) -> Tensor:
    """Groups by their largest entry, and columns within them by their own, largest first.

    Columns that share a scale stay next to one another.

    Args:
        diagonal: Of the Hessian, ``[n]``.
        groups: The group of each column, int64 ``[n]``.

    Returns:
        Column at each position, int64 ``[n]``.
    """
    columns = torch.argsort(diagonal, descending=True, stable=True)
    _, group = groups[columns].unique(return_inverse=True)
    position = torch.arange(len(columns), device=columns.device)
    # A group's first column is its largest, so groups rank by where they first appear.
    first = torch.full_like(position, len(columns)).scatter_reduce_(0, group, position, "amin")
    return columns[torch.argsort(first[group], stable=True)]
