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

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from prismquant.algorithms.base import (
    LOSS_BLOCK,
    LayerProblem,
    LayerResult,
    Moments,
    Note,
    Scales,
    choose_scales,
    decode,
    nearest_codes,
    row_losses,
    scales_by_column,
)
from prismquant.algorithms.factor import blocks, factorize_in_place, factorize_smallest_last
from prismquant.errors import NumericsError, RecipeError
from prismquant.kernels import sweep as fused_sweep

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prismquant.formats.spec import NumberSpec

Order = Literal["pivot", "activation", "group", "original"]
Basis = Literal["column", "mean"]
Weighting = Literal["pivot", "diagonal", "none"]

# Damping grows tenfold until the factorization succeeds: a positive semidefinite Hessian needs at
# most rounding noise, one that still fails with this much is not a Hessian.
_DAMPING_LIMIT = 10.0
_DAMPING_FLOOR = 1e-6
# Columns of a block that are brought up to date by one product; within, one by one.
_INNER_BLOCK = 16
# Rows solved at once: enough for products to be fast, few enough for vectors to stay in a cache. A
# device with memory of its own wants them all.
_CPU_ROWS = 2048
_DEVICE_ROWS = 1 << 20
# Lines of the Hessian gathered at once.
_GATHER_BLOCK = 256
# How many lines of the Hessian's width all panels of a solve come to at most.
_PANEL_LINES = 2048


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

    @property
    def reads_lines(self) -> bool:
        """It gathers a Hessian block by block."""
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
            sweep: ``torch``, or ``triton`` on a GPU), ``dead_columns`` (never excited by
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
        hessian = hessian.to(problem.weights[0].device, torch.float32)
        alive = hessian.diagonal().nonzero().flatten()
        factor = self._factorize(problem, hessian, alive)
        scales = choose_scales(problem, self._importance(hessian, factor))
        nearest = [
            nearest_codes(weight, s, problem.spec)
            for weight, s in zip(problem.weights, scales, strict=True)
        ]
        swept_loss = refined_loss = 0.0
        codes, losses = [part.clone() for part in nearest], []
        table = _ScaleTable.of(problem, scales, factor.columns)
        coupling = _Coupling(hessian, factor.columns, factor.diagonal)
        fused = fused_sweep.supports(hessian.device, problem.spec.grid)
        for portion in _portions([len(part) for part in codes], _portion_size(hessian.device)):
            sweep = _Sweep(problem, portion, table, factor.columns, self.block_size, fused)
            swept = sweep.run(factor)
            last = self.refine_passes - 1
            passes = (sweep.refine(coupling, measure=i == last) for i in range(last + 1))
            refined = sum(passes, swept)
            swept_loss, refined_loss = swept_loss + swept, refined_loss + refined
            sweep.write_codes(codes)
            losses.append(sweep.row_losses)
            # Before the next portion's is made.
            del sweep
        notes: dict[str, Note] = {
            "damping": factor.damping,
            "damping_attempts": factor.attempts,
            "precision": str(factor.lines.dtype).removeprefix("torch."),
            "order": self.order,
            "scale_weighting": self.scale_weighting,
            "kernel": "triton" if fused else "torch",
            "dead_columns": problem.in_features - len(alive),
            "swept_loss": swept_loss,
            "refined_loss": refined_loss,
        }
        # What follows needs memory of its own, and the factor no more.
        del factor
        measured = [part for part in losses if part is not None]
        swept_rows = torch.cat(measured) if measured else None
        return _choose_rows(problem, scales, nearest, codes, hessian, swept_rows, notes)

    def _factorize(self, problem: LayerProblem, hessian: Moments, alive: Tensor) -> _Factor:
        """Order, damp and factorize, with more precision and then more damping until it works."""
        groups = _lines_of(alive, problem.spec)
        damping, attempts = self.damping, 0
        while damping <= _DAMPING_LIMIT:
            for dtype in (torch.float32, torch.float64):
                attempts += 1
                factor = self._attempt(hessian, alive, groups, damping, dtype, attempts)
                if factor is not None:
                    return factor
            damping = max(10 * damping, _DAMPING_FLOOR)
        diagonal = hessian.diagonal()[alive]
        raise NumericsError(
            f"the Hessian of {len(alive)} columns{problem.seen} cannot be factorized in "
            f"{attempts} attempts, "
            f"damping {self.damping:g} to {damping / 10:g}; its diagonal runs from "
            f"{float(diagonal.min()):.4g} to {float(diagonal.max()):.4g}",
            where=problem.title,
            remedy="check the calibration data, or use solver: rtn for this layer",
        )

    def _attempt(
        self,
        hessian: Moments,
        alive: Tensor,
        groups: Tensor,
        damping: float,
        dtype: torch.dtype,
        attempts: int,
    ) -> _Factor | None:
        diagonal = hessian.diagonal()[alive].to(dtype)
        basis = diagonal if self.damping_basis == "column" else diagonal.mean()
        damped = diagonal + damping * basis
        order = self._order(damped, groups)
        lines = _submatrix(hessian, alive[order], dtype)
        lines.diagonal().copy_(damped[order])
        if self.order == "pivot":
            found = factorize_smallest_last(lines)
            if found is None:
                return None
            order = found
        elif not factorize_in_place(lines):
            return None
        damped, roots = damped[order], lines.diagonal().clone()
        if not bool((roots.square() > _noise(dtype, len(damped)) * damped).all()):
            return None
        return _Factor(
            columns=alive[order],
            lines=lines,
            roots=roots,
            diagonal=damped.to(torch.float32),
            damping=damping,
            attempts=attempts,
        )

    def _order(self, damped: Tensor, groups: Tensor) -> Tensor:
        """Before the factorization; pivots are ordered by it."""
        if self.order == "activation":
            return torch.argsort(damped, descending=True, stable=True)
        if self.order == "group":
            return _group_by_group(damped, groups)
        return torch.arange(len(damped), device=damped.device)

    def _importance(self, hessian: Moments, factor: _Factor) -> Tensor | None:
        """What an error in each column costs, ``[in]``, for the search for scales."""
        if self.scale_weighting == "none" or not len(factor.columns):
            return None
        if self.scale_weighting == "diagonal":
            cost = hessian.diagonal()[factor.columns]
        else:
            cost = factor.roots.square().to(torch.float32)
        # Dead columns have no cost of their own but are rounded with the same scales.
        importance = cost.min().expand(len(hessian)).clone()
        return importance.index_copy_(0, factor.columns, cost)


@dataclass(frozen=True, eq=False)
class _Factor:
    """The factorization of the damped Hessian of ``n`` live columns, in the order of the sweep.

    Attributes:
        columns: Which column comes at each position, int64 ``[n]``.
        lines: ``R_jk`` at line k, column j up to k, undefined beyond; in the dtype it was computed
            in, ``[n, n]``.
        roots: ``R_kk``, in that dtype, ``[n]``.
        diagonal: Of the damped Hessian, float32 ``[n]``.
        damping: The fraction that was added.
        attempts: Factorizations tried, this one included.
    """

    columns: Tensor
    lines: Tensor
    roots: Tensor
    diagonal: Tensor
    damping: float
    attempts: int

    def coefficients(self, block: slice) -> Tensor:
        """What errors of columns up to the block do to its targets: ``R_jk / R_kk``.

        Returns:
            float32 ``[block, block.stop]``, undefined on and above the diagonal.
        """
        scaled = self.lines[block, : block.stop] / self.roots[block].unsqueeze(1)
        return scaled.to(torch.float32)


@dataclass(frozen=True, eq=False)
class _Coupling:
    """What coordinate descent reads: the Hessian of ``n`` live columns in the order of the sweep.

    It is gathered a block of lines at a time, so that there is no second one in memory.

    Attributes:
        hessian: Of all columns, without damping, ``[in, in]``.
        columns: Which column comes at each position, int64 ``[n]``.
        diagonal: Of the damped Hessian, float32 ``[n]``. Only the diagonal is damped.
    """

    hessian: Moments
    columns: Tensor
    diagonal: Tensor

    def coefficients(self, block: slice) -> Tensor:
        """What errors of all columns do to a block's targets: ``H_kj / H_kk``.

        Returns:
            float32 ``[block, n]``.
        """
        lines = self.hessian.index_select(0, self.columns[block])
        return lines.index_select(1, self.columns).div_(self.diagonal[block].unsqueeze(1))


@dataclass(frozen=True)
class _Portion:
    """Rows of the layers that are solved at once.

    Attributes:
        rows: Which they are when all layers are put one after the other.
        pieces: The same as layers and rows of them.
    """

    rows: slice
    pieces: tuple[tuple[int, slice], ...]


@dataclass(frozen=True, eq=False)
class _ScaleTable:
    """The scales of all rows as a loop over columns reads them.

    Attributes:
        steps: float32 ``[G, rows]``.
        zeros: Zero points, likewise, or ``None``.
        lines: Which of the ``G`` lines each column in the order of the sweep uses.
    """

    steps: Tensor
    zeros: Tensor | None
    lines: tuple[int, ...]

    @staticmethod
    def of(problem: LayerProblem, scales: tuple[Scales, ...], columns: Tensor) -> _ScaleTable:
        """The table of a problem whose columns are visited in an order."""
        rows = [len(weight) for weight in problem.weights]
        steps, zeros = scales_by_column(scales, rows, problem.spec)
        return _ScaleTable(steps, zeros, tuple(_lines_of(columns, problem.spec).tolist()))

    def on_device(self, rows: slice) -> fused_sweep.ScaleLines:
        """What a kernel reads of it."""
        zeros = None if self.zeros is None else self.zeros[:, rows]
        lines = torch.tensor(self.lines, dtype=torch.int64, device=self.steps.device)
        return fused_sweep.ScaleLines(self.steps[:, rows], zeros, lines)


class _Sweep:
    """A portion of the rows of a problem, columns first and in the order of the sweep.

    Args:
        problem: The layers.
        portion: Of their rows, ``r``.
        table: The scales of all rows.
        columns: Live columns in the order of the sweep, ``[n]``.
        block_size: Columns between two large matrix products.
        fused: Whether columns inside a block are rounded by one kernel.

    Attributes:
        errors: ``w - q`` of the columns done, zero of those to come; float32 ``[n, r]``.
        row_losses: The loss of each row under the Hessian without damping, measured along a pass
            of descent; float64 ``[r]``. ``None`` before.
    """

    def __init__(
        self,
        problem: LayerProblem,
        portion: _Portion,
        table: _ScaleTable,
        columns: Tensor,
        block_size: int,
        fused: bool,
    ) -> None:
        self._columns = columns
        self._block_size = block_size
        self._portion = portion
        self._grid = problem.spec.grid
        parts = [problem.weights[layer][rows] for layer, rows in portion.pieces]
        self._weights = torch.cat([part.index_select(1, columns).T for part in parts], dim=1)
        self.errors = torch.zeros_like(self._weights)
        self.row_losses: Tensor | None = None
        self._codes = torch.zeros_like(self._weights, dtype=torch.int8)
        self._steps = table.steps[:, portion.rows].unbind()
        self._zeros = None if table.zeros is None else table.zeros[:, portion.rows].unbind()
        self._lines = table.lines
        self._fused = table.on_device(portion.rows) if fused else None

    def run(self, factor: _Factor) -> float:
        """Round every column once, from ``w_k + sum over j < k of e_j R_jk / R_kk``.

        Returns:
            The loss under the factorized Hessian, of all rows: squared pivots times squared
            distances between targets and values, summed.
        """
        total = self.errors.new_zeros((), dtype=torch.float64)
        for block in blocks(len(self._weights), self._block_size):
            coefficients = factor.coefficients(block)
            targets = torch.addmm(
                self._weights[block], coefficients[:, : block.start], self.errors[: block.start]
            )
            self._round(block, targets, coefficients[:, block].contiguous())
            distances = targets.sub_(self._weights[block]).add_(self.errors[block])
            total += _weighted_squares(distances, factor.roots[block].square())
        return float(total)

    def refine(self, coupling: _Coupling, *, measure: bool) -> float:
        """Round every column again, from ``w_k + sum over j != k of e_j H_jk / H_kk``.

        The products with errors before and behind a block are kept apart, although one would give
        the targets: with all columns visited, those before are the final ones, so that

            e H e^T = sum over k of e_k (H_kk e_k + 2 sum over j < k of e_j H_jk)

        comes out on the way. That measures the result without a large product of its own.

        Args:
            coupling: The Hessian.
            measure: Whether to leave ``row_losses``.

        Returns:
            By how much the loss under the damped Hessian changed, of all rows: the costs of the
            squared distances, less those of the values that were replaced.
        """
        change = self.errors.new_zeros((), dtype=torch.float64)
        losses = self.errors.new_zeros(self._weights.shape[1], dtype=torch.float64)
        for block in blocks(len(self._weights), self._block_size):
            weights, costs = self._weights[block], coupling.diagonal[block]
            coefficients = coupling.coefficients(block)
            own, former = coefficients[:, block].contiguous(), self.errors[block].clone()
            pull = coefficients[:, : block.start] @ self.errors[: block.start]
            targets = torch.addmm(weights, coefficients[:, block.stop :], self.errors[block.stop :])
            targets.addmm_(own.triu(1), former).add_(pull)
            self._round(block, targets, own)
            errors = self.errors[block]
            distances = targets.sub_(weights)
            change -= _weighted_squares(former.add_(distances), costs)
            change += _weighted_squares(distances.add_(errors), costs)
            if measure:
                # Half of what a column's own error does, all of what earlier ones in the block do.
                within = own.tril(-1) + (own.diagonal() / 2).diag()
                pull.addmm_(within, errors).mul_(errors).mul_(2.0 * costs.unsqueeze(1))
                losses += pull.sum(0, dtype=torch.float64)
        if measure:
            # A positive semidefinite form can only come out negative by rounding.
            self.row_losses = losses.clamp_min_(0.0)
        return float(change)

    def write_codes(self, codes: list[Tensor]) -> None:
        """Put the codes of live columns in their places in those of whole layers."""
        widths = [rows.stop - rows.start for _, rows in self._portion.pieces]
        parts = self._codes.split(widths, dim=1)
        for (layer, rows), part in zip(self._portion.pieces, parts, strict=True):
            lines = codes[layer][rows].T.contiguous()
            codes[layer][rows] = lines.index_copy_(0, self._columns, part).T

    def _round(self, block: slice, targets: Tensor, coefficients: Tensor) -> None:
        """Round the columns of a block one by one, and leave their errors and codes.

        Args:
            block: Which they are.
            targets: What they are rounded from but for errors inside the block, ``[b, r]``;
                completed in place.
            coefficients: Of errors inside the block, ``[b, b]``; read below the diagonal.
        """
        weights, errors = self._weights[block], self.errors[block]
        points = torch.empty_like(targets)
        most = _INNER_BLOCK if self._fused is None else fused_sweep.MOST_COLUMNS
        for inner in blocks(len(targets), most):
            own = coefficients[inner, inner]
            if inner.start:
                before = slice(0, inner.start)
                targets[inner].addmm_(coefficients[inner, before], errors[before])
            parts = targets[inner], weights[inner], errors[inner], points[inner]
            if self._fused is None:
                self._round_inner(*parts, own, self._lines[block][inner])
            else:
                self._round_fused(*parts, own, self._fused.of(block).of(inner))
        self._grid.write(points, self._codes[block])

    def _round_fused(
        self,
        targets: Tensor,
        weights: Tensor,
        errors: Tensor,
        points: Tensor,
        own: Tensor,
        scales: fused_sweep.ScaleLines,
    ) -> None:
        """What :meth:`_round_inner` does, in one kernel."""
        fused_sweep.round_columns(
            targets, weights, own, scales, self._grid, errors=errors, points=points
        )

    def _round_inner(
        self,
        targets: Tensor,
        weights: Tensor,
        errors: Tensor,
        points: Tensor,
        own: Tensor,
        lines: Sequence[int],
    ) -> None:
        """Round a few columns ``[b, r]``, with coefficients ``own`` of their errors ``[b, b]``."""
        unbound = (part.unbind() for part in (targets, weights, errors, points))
        for i, (target, weight, error, point, line) in enumerate(zip(*unbound, lines, strict=True)):
            if i:
                target.addmv_(errors[:i].T, own[i, :i])
            self._round_column(target, weight, error, point, line)

    def _round_column(
        self, target: Tensor, weight: Tensor, error: Tensor, point: Tensor, line: int
    ) -> None:
        """Round targets ``[r]`` as the affine map does; fill ``point`` and ``error``."""
        step = self._steps[line]
        torch.div(target, step, out=point)
        if self._zeros is None:
            torch.addcmul(weight, self._grid.round_(point), step, value=-1, out=error)
            return
        zero = self._zeros[line]
        self._grid.round_(point.add_(zero))
        torch.addcmul(weight, point - zero, step, value=-1, out=error)


def peak_solve_bytes(in_features: int, rows: int) -> int:
    """The most memory that a solve takes beside its problem, as long as float32 is precise enough.

    The factor is the only matrix of the Hessian's size. Weights in the order of the sweep, and what
    else a sweep keeps of them, are of a portion of the rows. Codes are of all of them, and in the
    end, when the factor is gone, so is the error that is measured.

    Args:
        in_features: Columns of the weights, ``n``.
        rows: Of all layers that are solved together.

    Returns:
        Bytes on a CPU, beyond the Hessian (``4 n^2``) and the weights (``4 n rows``) that the
        caller holds. A Hessian that only float64 can factorize takes ``4 n^2`` more.
    """
    portion = min(rows, _CPU_ROWS)
    # Lines gathered, eliminated or multiplied at once, and what is derived from them.
    panels = 4 * _PANEL_LINES * (in_features + portion)
    # A byte each: the nearest codes and those of the sweep. Scales are half a byte at most.
    codes = in_features * rows * 5 // 2
    # Weights and errors of a portion, its codes and their transposes.
    sweep = 4 * in_features**2 + 11 * in_features * portion + codes
    # The codes that are kept, and an error.
    measure = 5 * in_features * rows + codes + 8 * LOSS_BLOCK * rows
    return panels + max(sweep, measure)


def _weighted_squares(values: Tensor, costs: Tensor) -> Tensor:
    """Squares ``[b, r]`` times the costs of their lines ``[b]``, summed; the values are spoilt.

    Returns:
        A float64 scalar on the device, for which the processor need not wait after each block.
    """
    return values.square_().sum(1, dtype=torch.float64) @ costs.to(torch.float64)


def _portion_size(device: torch.device) -> int:
    """Rows solved at once: few enough for a block's to stay in the cache, where there is one."""
    return _CPU_ROWS if device.type == "cpu" else _DEVICE_ROWS


def _portions(rows: Sequence[int], most: int) -> Iterator[_Portion]:
    """Cut layers of so many rows, put one after the other, into portions of at most ``most``."""
    ends = list(itertools.accumulate(rows))
    # Even portions: a narrow last one would make slow matrix products.
    size = -(-ends[-1] // -(-ends[-1] // most))
    for part in blocks(ends[-1], size):
        pieces = []
        for layer, (end, count) in enumerate(zip(ends, rows, strict=True)):
            first, last = max(part.start, end - count), min(part.stop, end)
            if first < last:
                pieces.append((layer, slice(first - end + count, last - end + count)))
        yield _Portion(part, tuple(pieces))


def _submatrix(matrix: Moments, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Lines and columns of a matrix in an order, ``[n, n]``, with no second copy on the way."""
    found = torch.empty(len(columns), len(columns), dtype=dtype, device=columns.device)
    for block in blocks(len(columns), _GATHER_BLOCK):
        lines = matrix.index_select(0, columns[block])
        found[block] = lines.index_select(1, columns)
    return found


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


def _choose_rows(
    problem: LayerProblem,
    scales: tuple[Scales, ...],
    nearest: list[Tensor],
    swept: list[Tensor],
    hessian: Moments,
    swept_rows: Tensor | None,
    notes: dict[str, Note],
) -> LayerResult:
    """Keep of each row the better of two sets of codes, and measure what is kept.

    Args:
        problem: The layers.
        scales: Of each.
        nearest: Codes of each, rounded to nearest.
        swept: Codes of each, from the sweep.
        hessian: Without damping.
        swept_rows: Losses of all rows with the swept codes, or ``None`` to measure them.
        notes: To be told beside how many rows fell back.

    Returns:
        The result.
    """
    rows = [len(weight) for weight in problem.weights]
    known = [None] * len(rows) if swept_rows is None else swept_rows.split(rows)
    weights, losses, baselines, fallen = [], [], [], 0
    for layer, (weight, own) in enumerate(zip(problem.weights, scales, strict=True)):
        loss = known[layer]
        if loss is None:
            loss = row_losses(_error(weight, swept[layer], own, problem.spec), hessian)
        baseline = row_losses(_error(weight, nearest[layer], own, problem.spec), hessian)
        worse = loss > baseline
        fallen += int(worse.sum())
        kept = torch.where(worse.unsqueeze(1), nearest[layer], swept[layer])
        weights.append(own.quantized(kept, problem.spec))
        losses.append(float(torch.minimum(loss, baseline).sum()))
        baselines.append(float(baseline.sum()))
    return LayerResult(
        tuple(weights), tuple(losses), tuple(baselines), notes | {"nearest_rows": fallen}
    )


def _error(weight: Tensor, codes: Tensor, scales: Scales, spec: NumberSpec) -> Tensor:
    return decode(codes, scales, spec).neg_().add_(weight)
