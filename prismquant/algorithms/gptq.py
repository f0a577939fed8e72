"""GPTQ in its left-looking form: each column answers for the errors of the columns before it.

With ``H = R R^T``, R upper triangular (a Cholesky factorization of H with its order reversed), the
loss of a row splits into one square for each column:

    e H e^T = sum over k of R_kk^2 (t_k - q_k)^2,   t_k = w_k + sum over j < k of e_j R_jk / R_kk

where ``e = w - q``. Column k is therefore rounded from its target ``t_k``. This gives the codes of
GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1), whose inverse-Hessian factor is ``R^-1``, but
needs no inverse, and reads weights, errors and factor in contiguous lines because all are stored
with columns first. Rows are independent, so all layers that share an input go through one sweep.

The target that makes the loss smallest when *all* other columns are fixed has the same shape,
``w_k + sum over j != k of e_j H_jk / H_kk``; passes of coordinate descent over it refine the codes
(QuantEase, Behdin et al., arXiv 2309.01885), and each can only lower the damped loss.

Scales are chosen before the sweep on the original column order, so the order of the sweep never
reaches the checkpoint. The squares above say what an error in a column really costs under the
sweep: ``R_kk^2``, not ``H_kk``; the search for scales weighs errors with that by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from prismquant.algorithms.factor import (
    can_round,
    factorize_in_place,
    factorize_smallest_last,
)
from prismquant.algorithms.layer_scales import Scales, choose_scales
from prismquant.algorithms.portions import (
    ScaleTable,
    Sweep,
    portion_size,
    portions,
    scale_lines,
)
from prismquant.algorithms.problem import LayerProblem, LayerResult, Note
from prismquant.algorithms.triangles import Attempt, Factor, Triangles, divide_lines
from prismquant.errors import NumericsError, check_bounds
from prismquant.kernels import descent
from prismquant.kernels import sweep as sweep_kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prismquant.formats.spec import NumberSpec

Order = Literal["pivot", "activation", "group", "original"]
Basis = Literal["column", "mean"]
Weighting = Literal["pivot", "diagonal", "none"]

# Damping grows tenfold until the factorization succeeds: a positive semidefinite Hessian needs at
# most rounding noise, one that still fails with this much is not a Hessian.
_DAMPING_LIMIT = 10.0
_DAMPING_FLOOR = 1e-6
# Of these the first that works is taken: dtype, and whether products round their factors.
_PRECISIONS = ((torch.float32, True), (torch.float32, False), (torch.float64, False))
# What columns without moments have on the diagonal, of the least that others have.
_DEAD = 1e-6


@dataclass(frozen=True)
class GPTQ:
    """Rounds column by column and makes later columns compensate earlier errors.

    Attributes:
        block_size: Columns between two matrix products; it does not change the codes.
        damping: What is added to the diagonal of the Hessian, as a fraction of ``damping_basis``.
            It keeps few calibration tokens from being fitted too closely.
        damping_basis: ``column``: each column's own diagonal entry, which shrinks correlations
            evenly and does not let outlier channels drown the others. ``mean``: the mean of the
            diagonal, as other tools do (with a fraction of 0.01).
        order: Of the sweep. ``pivot`` puts the column with the smallest remaining pivot last, again
            and again; ``activation`` sorts by descending diagonal of the Hessian; ``original`` does
            not sort.
        scale_weighting: What an error in a column costs while a range rule searches: its
            squared pivot (``pivot``), its diagonal entry of the Hessian (``diagonal``), or one
            (``none``).
        refine_passes: Passes of coordinate descent after the sweep.

    Raises:
        RecipeError: A value is out of bounds.
    """

    name: ClassVar[str] = "gptq"

    block_size: int = 128
    damping: float = 0.1
    damping_basis: Basis = "column"
    order: Order = "pivot"
    scale_weighting: Weighting = "pivot"
    refine_passes: int = 2

    def __post_init__(self) -> None:
        bounds = {
            "block_size": (1 <= self.block_size <= 65536, "from 1 to 65536 columns"),
            "damping": (
                0 <= self.damping <= _DAMPING_LIMIT,
                f"a fraction from 0 to {_DAMPING_LIMIT}, e.g. 0.1",
            ),
            "refine_passes": (0 <= self.refine_passes <= 1000, "from 0 to 1000"),
        }
        check_bounds(self, bounds)

    @property
    def idle(self) -> dict[str, str]:
        """Options that change nothing as the others stand, and why."""
        return {} if self.damping else {"damping_basis": "damping is 0"}

    @property
    def needs_hessian(self) -> bool:
        """Always."""
        return True

    def solve(self, problem: LayerProblem) -> LayerResult:
        """Choose the codes of all layers in one sweep.

        A row that comes out worse than rounding to nearest with the same scales takes the nearest
        codes instead, so no layer is ever worse than that.

        Args:
            problem: The layers, with a Hessian.

        Returns:
            Codes, losses, and notes: ``damping`` (the fraction used), ``damping_attempts``,
            ``precision`` of the factorization, ``order``, ``scale_weighting``, ``kernel`` (of the
            sweep: ``torch``, ``numba`` or ``triton``), ``dead_columns`` (never excited by
            calibration: rounded to nearest), ``swept_loss`` and ``refined_loss`` (under the damped
            Hessian, all layers together), ``nearest_rows`` (that fell back).

        Raises:
            NumericsError: There is no Hessian, or it cannot be factorized with any damping.
            RecipeError: The range rule is not one for weights.
        """
        hessian = problem.hessian
        if hessian is None:
            raise NumericsError(
                "GPTQ needs calibration data and none has reached this layer",
                where=problem.title,
                remedy="add calibration samples of the modality that passes it, or use solver: rtn",
            )
        hessian = hessian.to(problem.weights[0].device, torch.float32).contiguous()
        kernel = sweep_kernels.kernel_for(hessian.device, problem.spec.grid)
        halves = Triangles.of(hessian, kernel)
        try:
            factor = self._factorize(problem, halves)
            scales = choose_scales(problem, self._importance(factor))
            found = self._solve_rows(problem, halves, factor, scales)
        finally:
            halves.restore()
        notes: dict[str, Note] = {
            "damping": factor.attempt.damping,
            "damping_attempts": factor.attempt.number,
            "precision": factor.attempt.precision,
            "order": self.order,
            "scale_weighting": self.scale_weighting,
            "kernel": kernel,
            "dead_columns": int((halves.diagonal == 0).sum()),
            "swept_loss": found.swept_loss,
            "refined_loss": found.refined_loss,
            "nearest_rows": int((found.losses > found.baselines).sum()),
        }
        rows = [len(part) for part in found.codes]
        kept = torch.minimum(found.losses, found.baselines)
        pairs = zip(scales, found.codes, strict=True)
        return LayerResult(
            tuple(own.quantized(part, problem.spec) for own, part in pairs),
            tuple(float(part.sum()) for part in kept.split(rows)),
            tuple(float(part.sum()) for part in found.baselines.split(rows)),
            notes,
        )

    def _solve_rows(
        self, problem: LayerProblem, hessian: Triangles, factor: Factor, scales: tuple[Scales, ...]
    ) -> _Solution:
        """Round all rows, a portion after the other."""
        codes = [torch.empty_like(weight, dtype=torch.int8) for weight in problem.weights]
        swept_loss = refined_loss = 0.0
        losses, baselines = [], []
        table = ScaleTable.of(problem, scales)
        kernel = hessian.kernel
        descends = self.refine_passes > 0 and descent.supports(kernel)
        for portion in portions([len(part) for part in codes], portion_size(hessian.matrix.device)):
            sweep = Sweep(
                problem, portion, table, factor, self.block_size, kernel, descends=descends
            )
            baselines.append(sweep.nearest(factor, hessian))
            swept = sweep.run(factor)
            swept_loss += swept
            refined_loss += swept + sweep.refine(factor, hessian, self.refine_passes)
            losses.append(sweep.row_losses(hessian))
            sweep.fall_back(losses[-1] > baselines[-1])
            sweep.write_codes(codes)
            # Before the next portion's is made.
            del sweep
        return _Solution(codes, torch.cat(losses), torch.cat(baselines), swept_loss, refined_loss)

    def _factorize(self, problem: LayerProblem, hessian: Triangles) -> Factor:
        """Order, damp and factorize, with more precision and then more damping until it works."""
        rounds = problem.products == torch.bfloat16 and can_round(hessian.matrix)
        for attempt in _attempts(self.damping, rounds=rounds):
            factor = self._attempt(problem, hessian, attempt)
            if factor is not None:
                return factor
        diagonal = hessian.diagonal[hessian.diagonal > 0]
        raise NumericsError(
            f"the Hessian of {len(diagonal)} columns{problem.seen} cannot be factorized in "
            f"{attempt.number} attempts, "
            f"damping {self.damping:g} to {attempt.damping:g}; its diagonal runs from "
            f"{float(diagonal.min()):.4g} to {float(diagonal.max()):.4g}",
            where=problem.title,
            remedy="check the calibration data, or use solver: rtn for this layer",
        )

    def _attempt(self, problem: LayerProblem, hessian: Triangles, own: Attempt) -> Factor | None:
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
        return Factor(columns, lines, roots, hessian.diagonal, damped, own)

    def _factorize_lines(
        self, lines: Tensor, order: Tensor | None, *, rounded: bool
    ) -> Tensor | None:
        """Column at each position, once what is below the diagonal is a factor; or None."""
        if self.order == "pivot":
            return factorize_smallest_last(lines, rounded=rounded)
        if not factorize_in_place(lines, rounded=rounded):
            return None
        return torch.arange(len(lines), device=lines.device) if order is None else order

    def _damped(self, diagonal: Tensor, damping: float) -> Tensor:
        """The diagonal with damping, ``[n]``.

        Columns that calibration never excites have nothing but zeros in a Hessian. With next to
        nothing on the diagonal they can be factorized, cost nothing, and are rounded to nearest.
        """
        alive = diagonal > 0
        if not bool(alive.any()):
            return torch.ones_like(diagonal)
        basis = diagonal if self.damping_basis == "column" else diagonal[alive].mean()
        damped = diagonal + damping * basis
        return torch.where(alive, damped, _DEAD * damped[alive].min())

    def _order(self, damped: Tensor, spec: NumberSpec) -> Tensor | None:
        """Before the factorization, if not the original one; pivots are ordered by it."""
        if self.order == "activation":
            return torch.argsort(damped, descending=True, stable=True)
        if self.order == "group":
            columns = torch.arange(len(damped), device=damped.device)
            return _group_by_group(damped, scale_lines(columns, spec))
        return None

    def _importance(self, factor: Factor) -> Tensor | None:
        """What an error in each column costs, ``[in]``, for the search for scales."""
        if self.scale_weighting == "none":
            return None
        cost = factor.diagonal
        if self.scale_weighting == "pivot":
            cost = torch.empty_like(cost)
            cost[factor.columns] = factor.roots.square().to(cost.dtype)
        alive = factor.diagonal > 0
        if not bool(alive.any()):
            return None
        # Dead columns have no cost of their own but are rounded with the same scales.
        return torch.where(alive, cost, cost[alive].min())


@dataclass(frozen=True, eq=False)
class _Solution:
    """What was chosen for all rows.

    Attributes:
        codes: int8 ``[out, in]`` of each layer; nearest where those of the sweep are worse.
        losses: Of each row after sweep and descent, float64.
        baselines: With the nearest codes.
        swept_loss: Of all rows after the sweep, under the damped Hessian.
        refined_loss: After descent.
    """

    codes: list[Tensor]
    losses: Tensor
    baselines: Tensor
    swept_loss: float
    refined_loss: float


def _attempts(damping: float, *, rounds: bool) -> Iterator[Attempt]:
    """Ways to factorize, cheapest and least damped first.

    Args:
        damping: To begin with.
        rounds: Whether products that round their factors save time.
    """
    number = 0
    while damping <= _DAMPING_LIMIT:
        for dtype, rounded in _PRECISIONS[0 if rounds else 1 :]:
            number += 1
            yield Attempt(number, damping, dtype, rounded)
        damping = max(10 * damping, _DAMPING_FLOOR)


def _group_by_group(diagonal: Tensor, groups: Tensor) -> Tensor:
    """Groups by their largest entry, and columns within them by their own, largest first.

    Columns that share a scale stay next to one another.

    Args:
        diagonal: Of the Hessian, ``[n]``.
        groups: Which group each column belongs to, int64 ``[n]``.

    Returns:
        Column at each position, int64 ``[n]``.
    """
    columns = torch.argsort(diagonal, descending=True, stable=True)
    _, group = groups[columns].unique(return_inverse=True)
    position = torch.arange(len(columns), device=columns.device)
    # A group's first column is its largest, so groups rank by where they first appear.
    first = torch.full_like(position, len(columns)).scatter_reduce_(0, group, position, "amin")
    return columns[torch.argsort(first[group], stable=True)]
