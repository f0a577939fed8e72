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

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from prismquant.algorithms.base import (
    LayerProblem,
    LayerResult,
    Note,
    Scales,
    choose_scales,
    decode,
    nearest_codes,
    row_losses,
    scales_by_column,
)
from prismquant.errors import NumericsError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prismquant.formats.spec import NumberSpec
    from prismquant.numerics.grids import Grid

Order = Literal["pivot", "activation", "group", "original"]
Basis = Literal["column", "mean"]
Weighting = Literal["pivot", "diagonal", "none"]

# Damping grows tenfold until the factorization succeeds: a positive semidefinite Hessian needs at
# most rounding noise, one that still fails with this much is not a Hessian.
_DAMPING_LIMIT = 10.0
_DAMPING_FLOOR = 1e-6
_PIVOT_BLOCK = 128


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
        if self.block_size < 1:
            raise RecipeError(f"a block of {self.block_size} columns is empty", where="block_size")
        if not 0 <= self.damping <= _DAMPING_LIMIT:
            raise RecipeError(
                f"damping {self.damping} is out of bounds",
                where="damping",
                remedy=f"use a fraction from 0 to {_DAMPING_LIMIT}, e.g. 0.1",
            )
        if self.refine_passes < 0:
            raise RecipeError(f"there cannot be {self.refine_passes} passes", where="refine_passes")

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
            ``precision`` of the factorization, ``order``, ``scale_weighting``, ``dead_columns``
            (never excited by calibration: rounded to nearest), ``swept_loss`` and ``refined_loss``
            (under the damped Hessian, all layers together), ``nearest_rows`` (that fell back).

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
        hessian = hessian.to(problem.weights[0].device, torch.float32)
        alive = hessian.diagonal().nonzero().flatten()
        groups = _lines_of(alive, problem.spec)
        factor = self._factorize(hessian[alive][:, alive], groups, problem.title)
        scales = choose_scales(problem, self._importance(hessian, alive, factor))
        nearest = [
            nearest_codes(weight, s, problem.spec)
            for weight, s in zip(problem.weights, scales, strict=True)
        ]
        sweep = _Sweep(problem, scales, alive[factor.order], self.block_size)
        swept_loss = sweep.run(factor.feedback, factor.pivots, revisit=False)
        refined_loss, coupling = swept_loss, _coupling(factor.damped)
        for _ in range(self.refine_passes):
            refined_loss += sweep.run(coupling, factor.damped.diagonal(), revisit=True)
        notes: dict[str, Note] = {
            "damping": factor.damping,
            "damping_attempts": factor.attempts,
            "precision": str(factor.dtype).removeprefix("torch."),
            "order": self.order,
            "scale_weighting": self.scale_weighting,
            "dead_columns": problem.in_features - len(alive),
            "swept_loss": swept_loss,
            "refined_loss": refined_loss,
        }
        codes = sweep.codes(torch.cat(nearest))
        return _choose_rows(problem, scales, nearest, codes, hessian, notes)

    def _factorize(self, hessian: Tensor, groups: Tensor, title: str) -> _Factor:
        """Order, damp and factorize, with more precision and then more damping until it works."""
        damping, attempts = self.damping, 0
        while damping <= _DAMPING_LIMIT:
            for dtype in (torch.float32, torch.float64):
                attempts += 1
                factor = self._attempt(hessian, groups, damping, dtype, attempts)
                if factor is not None:
                    return factor
            damping = max(10 * damping, _DAMPING_FLOOR)
        diagonal = hessian.diagonal()
        raise NumericsError(
            f"the Hessian of {len(hessian)} columns cannot be factorized in {attempts} attempts, "
            f"damping {self.damping:g} to {damping / 10:g}; its diagonal runs from "
            f"{float(diagonal.min()):.4g} to {float(diagonal.max()):.4g}",
            where=title,
            remedy="check the calibration data, or use solver: rtn for this layer",
        )

    def _attempt(
        self, hessian: Tensor, groups: Tensor, damping: float, dtype: torch.dtype, attempts: int
    ) -> _Factor | None:
        diagonal = hessian.diagonal().to(dtype)
        basis = diagonal if self.damping_basis == "column" else diagonal.mean()
        damped = hessian.to(dtype, copy=True)
        damped.diagonal().add_(damping * basis)
        order = self._order(damped, groups)
        if order is None:
            return None
        damped = damped[order][:, order]
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        # With the order restored, the lower factor of the reversed matrix is R.
        transposed = lower.flip(0, 1).T
        pivots = transposed.diagonal()
        feedback = transposed / pivots.unsqueeze(1)
        if int(failed) or not bool(torch.isfinite(feedback).all()):
            return None
        if not bool((pivots.square() > _noise(dtype, len(damped)) * damped.diagonal()).all()):
            return None
        feedback.fill_diagonal_(0.0)
        return _Factor(
            order=order,
            feedback=feedback.to(torch.float32).contiguous(),
            pivots=pivots.square().to(torch.float32),
            damped=damped.to(torch.float32),
            damping=damping,
            attempts=attempts,
            dtype=dtype,
        )

    def _order(self, damped: Tensor, groups: Tensor) -> Tensor | None:
        if self.order == "pivot":
            return _smallest_pivot_last(damped)
        if self.order == "activation":
            return torch.argsort(damped.diagonal(), descending=True, stable=True)
        if self.order == "group":
            return _group_by_group(damped.diagonal(), groups)
        return torch.arange(len(damped), device=damped.device)

    def _importance(self, hessian: Tensor, alive: Tensor, factor: _Factor) -> Tensor | None:
        """What an error in each column costs, ``[in]``, for the search for scales."""
        if self.scale_weighting == "none" or not len(alive):
            return None
        if self.scale_weighting == "diagonal":
            cost = hessian.diagonal()[alive]
        else:
            cost = torch.empty_like(factor.pivots).index_copy_(0, factor.order, factor.pivots)
        # Dead columns have no cost of their own but are rounded with the same scales.
        importance = cost.min().expand(len(hessian)).clone()
        return importance.index_copy_(0, alive, cost)


@dataclass(frozen=True, eq=False)
class _Factor:
    """The factorization of the damped Hessian of ``n`` live columns, in the order of the sweep.

    Attributes:
        order: Which column comes at each position, int64 ``[n]``.
        feedback: ``R_jk / R_kk`` at line k, column j; zero on and above the diagonal. ``[n, n]``.
        pivots: ``R_kk^2``, ``[n]``.
        damped: The damped Hessian, ``[n, n]``.
        damping: The fraction that was added.
        attempts: Factorizations tried, this one included.
        dtype: In which it was computed.
    """

    order: Tensor
    feedback: Tensor
    pivots: Tensor
    damped: Tensor
    damping: float
    attempts: int
    dtype: torch.dtype


class _Sweep:
    """The rows of all layers of a problem, columns first and in the order of the sweep.

    Args:
        problem: The layers.
        scales: Their scales.
        columns: Live columns in the order of the sweep, ``[n]``.
        block_size: Columns between two matrix products.

    Attributes:
        errors: ``w - q`` of the columns done, zero of those to come; float32 ``[n, rows]``.
    """

    def __init__(
        self,
        problem: LayerProblem,
        scales: tuple[Scales, ...],
        columns: Tensor,
        block_size: int,
    ) -> None:
        self._columns = columns
        self._block_size = block_size
        self._weights = torch.cat([w[:, columns].T for w in problem.weights], dim=1)
        self.errors = torch.zeros_like(self._weights)
        self._codes = torch.zeros_like(self._weights, dtype=torch.int8)
        rows = [len(weight) for weight in problem.weights]
        steps, zeros = scales_by_column(scales, rows, problem.spec)
        zero_lines = None if zeros is None else zeros.unbind()
        self._grid = problem.spec.grid
        self._rounder = _Rounder(self._grid, steps.unbind(), zero_lines)
        self._lines: list[int] = _lines_of(columns, problem.spec).tolist()

    def run(self, coefficients: Tensor, costs: Tensor, *, revisit: bool) -> float:
        """Round every column once, from ``w_k + sum over j of coefficients[k, j] * e_j``.

        Args:
            coefficients: ``[n, n]``, zero on the diagonal. A first sweep gives strictly lower
                triangular ones; a revisit couples every column with every other.
            costs: ``[n]``, of a squared distance between a column's target and its value.
            revisit: Whether the columns have values already.

        Returns:
            Costs times squared distances, summed: after a first sweep this is exactly the loss
            under the factorized Hessian. A revisit counts off those of the values it replaced: this
            is exactly by how much it changed the loss.
        """
        total = 0.0
        for block in self._blocks():
            reach = len(self._weights) if revisit else block.start
            distances = torch.addmm(
                self._weights[block], coefficients[block, :reach], self.errors[:reach]
            )
            change, points = torch.empty_like(distances), torch.empty_like(distances)
            for i, k in enumerate(range(block.start, block.stop)):
                # A target to begin with, in the end its distance from the value chosen.
                target = distances[i]
                if i:
                    # What has changed inside this block since the product above.
                    target.addmv_(change[:i].T, coefficients[k, block.start : k])
                values = self._rounder(target, self._lines[k], points[i])
                error = self._weights[k] - values
                torch.sub(error, self.errors[k], out=change[i])
                self.errors[k] = error
                target.sub_(values)
            self._grid.write(points, self._codes[block])
            squares = distances.square()
            if revisit:
                squares -= distances.sub_(change).square_()
            total += float(squares.sum(1, dtype=torch.float64) @ costs[block].to(torch.float64))
        return total

    def codes(self, nearest: Tensor) -> Tensor:
        """Codes of all rows ``[rows, in]`` in the original order; of dead columns, as given."""
        codes = nearest.clone()
        codes[:, self._columns] = self._codes.T
        return codes

    def _blocks(self) -> Iterator[slice]:
        count = len(self._weights)
        for start in range(0, count, self._block_size):
            yield slice(start, min(start + self._block_size, count))


@dataclass(frozen=True, eq=False)
class _Rounder:
    """Rounds one column of all rows.

    Attributes:
        grid: The points and their codes.
        steps: Scales, float32 ``[rows]`` for each of ``G`` lines.
        zeros: Zero points, likewise, or ``None``.
    """

    grid: Grid
    steps: tuple[Tensor, ...]
    zeros: tuple[Tensor, ...] | None

    def __call__(self, target: Tensor, line: int, points: Tensor) -> Tensor:
        """Round targets exactly as the affine map defines it.

        Args:
            target: float32 ``[rows]``; left as it is.
            line: Of the scales.
            points: float32 ``[rows]``, to be filled with points of the grid.

        Returns:
            The values that they stand for, float32 ``[rows]``.
        """
        step = self.steps[line]
        torch.div(target, step, out=points)
        if self.zeros is None:
            return self.grid.round_(points) * step
        zero = self.zeros[line]
        return (self.grid.round_(points.add_(zero)) - zero).mul_(step)


def _lines_of(columns: Tensor, spec: NumberSpec) -> Tensor:
    """Which line of the scales each column uses: that of its group in the original order."""
    if not spec.granularity.grouped or spec.group_size is None:
        return torch.zeros_like(columns)
    return columns // spec.group_size


def _noise(dtype: torch.dtype, count: int) -> float:
    """How small a pivot, as a fraction of its diagonal entry, is lost in rounding errors.

    A factorization may succeed with such a pivot, but what its column owes to others is noise.
    """
    return 10.0 * math.sqrt(count) * torch.finfo(dtype).eps


def _coupling(damped: Tensor) -> Tensor:
    """``H_kj / H_kk`` off the diagonal, zero on it: the coefficients of coordinate descent."""
    return (damped / damped.diagonal().unsqueeze(1)).fill_diagonal_(0.0)


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


def _smallest_pivot_last(matrix: Tensor) -> Tensor | None:
    """The order in which a pivoted factorization, last column first, finds the smallest pivots.

    A column's pivot is its variance given all columns that come later: with columns that correlate
    strongly, the diagonal alone says little about it. Rounding errors of early columns are
    compensated, those of late columns stay, so the late ones should be cheap.

    Args:
        matrix: Symmetric ``[n, n]``; not changed.

    Returns:
        Column at each position, int64 ``[n]``; ``None`` when a pivot is not positive.
    """
    remaining = torch.arange(len(matrix), device=matrix.device)
    chosen: list[Tensor] = []
    while len(remaining):
        picked, factors = _pick_smallest(matrix)
        if picked is None:
            return None
        chosen.append(remaining[picked])
        kept = torch.ones(len(remaining), dtype=torch.bool, device=matrix.device)
        kept[picked] = False
        remaining, factors = remaining[kept], factors[:, kept]
        matrix = matrix[kept][:, kept].addmm_(factors.T, factors, alpha=-1)
    order = torch.cat(chosen) if chosen else remaining
    return order.flip(0)


def _pick_smallest(matrix: Tensor) -> tuple[Tensor | None, Tensor]:
    """Eliminate up to a block of columns, each time the one with the smallest pivot.

    Returns:
        Their indices ``[b]`` in the order of elimination, or ``None`` when a pivot is not positive;
        and their Cholesky factors ``[b, n]``.
    """
    count = min(_PIVOT_BLOCK, len(matrix))
    left = matrix.diagonal().clone()
    factors = matrix.new_zeros(count, len(matrix))
    picked: list[Tensor] = []
    pivots: list[Tensor] = []
    for i in range(count):
        index = left.argmin().view(1)
        pivot = left.index_select(0, index)
        line = matrix.index_select(0, index).squeeze(0)
        if i:
            own = factors[:i].index_select(1, index).squeeze(1)
            line = line.addmv(factors[:i].T, own, alpha=-1)
        torch.div(line, pivot.sqrt(), out=factors[i])
        left.addcmul_(factors[i], factors[i], value=-1.0).index_fill_(0, index, math.inf)
        picked.append(index)
        pivots.append(pivot)
    found = torch.cat(pivots)
    fine = bool(((found > 0) & (found < math.inf)).all())
    return torch.cat(picked) if fine else None, factors


def _choose_rows(
    problem: LayerProblem,
    scales: tuple[Scales, ...],
    nearest: list[Tensor],
    swept: Tensor,
    hessian: Tensor,
    notes: dict[str, Note],
) -> LayerResult:
    """Keep of each row the better of two sets of codes, and measure what is kept."""
    weights, losses, baselines, fallen = [], [], [], 0
    parts = swept.split([len(weight) for weight in problem.weights])
    for weight, own, near, codes in zip(problem.weights, scales, nearest, parts, strict=True):
        loss = row_losses(weight - decode(codes, own, problem.spec), hessian)
        baseline = row_losses(weight - decode(near, own, problem.spec), hessian)
        worse = loss > baseline
        fallen += int(worse.sum())
        kept = torch.where(worse.unsqueeze(1), near, codes)
        weights.append(own.quantized(kept, problem.spec))
        losses.append(float(torch.minimum(loss, baseline).sum()))
        baselines.append(float(baseline.sum()))
    return LayerResult(
        tuple(weights), tuple(losses), tuple(baselines), notes | {"nearest_rows": fallen}
    )
