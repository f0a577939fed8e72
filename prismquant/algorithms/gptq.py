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
    LayerProblem,
    LayerResult,
    Moments,
    Note,
    Scales,
    choose_scales,
    row_losses,
    scales_by_column,
)
from prismquant.algorithms.factor import blocks, factorize_in_place, factorize_smallest_last
from prismquant.errors import NumericsError, RecipeError
from prismquant.kernels import descent, transpose
from prismquant.kernels import sweep as sweep_kernels

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
# How small a loss, as a fraction of what the same errors would cost without correlations, is still
# a difference of sums and not of their rounding errors.
_LEAST_FRACTION = 1e-3
# Rows solved at once: enough for products to be fast, few enough for vectors to stay in a cache. A
# device with memory of its own wants them all.
_CPU_ROWS = 1024
_DEVICE_ROWS = 1 << 20
# Portions are multiples of what kernels take at once, so that their lines begin where those of the
# cache do.
_EVEN_ROWS = 64
# Columns that are rounded again between two looks at other rows.
_DESCENT_BLOCK = 512
# Lines of the Hessian gathered at once.
_GATHER_BLOCK = 256
# How many lines of the Hessian's width all panels of a solve come to at most.
_PANEL_LINES = 1280


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
        hessian = hessian.to(problem.weights[0].device, torch.float32)
        alive = hessian.diagonal().nonzero().flatten()
        factor = self._factorize(problem, hessian, alive)
        scales = choose_scales(problem, self._importance(hessian, factor))
        found = self._solve_rows(problem, hessian, factor, scales)
        notes: dict[str, Note] = {
            "damping": factor.damping,
            "damping_attempts": factor.attempts,
            "precision": str(factor.lines.dtype).removeprefix("torch."),
            "order": self.order,
            "scale_weighting": self.scale_weighting,
            "kernel": found.kernel,
            "dead_columns": problem.in_features - len(alive),
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
        self, problem: LayerProblem, hessian: Moments, factor: _Factor, scales: tuple[Scales, ...]
    ) -> _Solution:
        """Round all rows, a portion after the other."""
        codes = [torch.empty_like(weight, dtype=torch.int8) for weight in problem.weights]
        swept_loss = refined_loss = 0.0
        losses, baselines = [], []
        table = _ScaleTable.of(problem, scales)
        coupling = _Coupling(hessian, factor.columns, factor.damped)
        kernel = sweep_kernels.kernel_for(hessian.device, problem.spec.grid)
        descends = self.refine_passes > 0 and descent.supports(kernel)
        for portion in _portions([len(part) for part in codes], _portion_size(hessian.device)):
            sweep = _Sweep(
                problem, portion, table, factor, self.block_size, kernel, descends=descends
            )
            baselines.append(sweep.nearest(factor, hessian))
            swept = sweep.run(factor)
            swept_loss += swept
            refined_loss += swept + sweep.refine(factor, coupling, self.refine_passes)
            losses.append(sweep.row_losses(hessian))
            sweep.fall_back(losses[-1] > baselines[-1])
            sweep.write_codes(codes)
            # Before the next portion's is made.
            del sweep
        return _Solution(
            codes, torch.cat(losses), torch.cat(baselines), swept_loss, refined_loss, kernel
        )

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
        for block in blocks(len(lines), _GATHER_BLOCK):
            lines[block, : block.stop] /= roots[block].unsqueeze(1)
        return _Factor(
            columns=alive[order],
            lines=lines,
            roots=roots,
            diagonal=diagonal[order].to(torch.float32),
            damped=damped.to(torch.float32),
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
class _Solution:
    """What was chosen for all rows.

    Attributes:
        codes: int8 ``[out, in]`` of each layer; nearest where those of the sweep are worse.
        losses: Of each row after sweep and descent, float64.
        baselines: With the nearest codes.
        swept_loss: Of all rows after the sweep, under the damped Hessian.
        refined_loss: After descent.
        kernel: What rounded the columns.
    """

    codes: list[Tensor]
    losses: Tensor
    baselines: Tensor
    swept_loss: float
    refined_loss: float
    kernel: sweep_kernels.Kernel


@dataclass(frozen=True, eq=False)
class _Factor:
    """The factorization of the damped Hessian of ``n`` live columns, in the order of the sweep.

    Attributes:
        columns: Which column comes at each position, int64 ``[n]``.
        lines: ``R_jk / R_kk`` at line k, column j up to k, undefined beyond; in the dtype it was
            computed in, ``[n, n]``.
        roots: ``R_kk``, in that dtype, ``[n]``.
        diagonal: Of the Hessian without damping, float32 ``[n]``.
        damped: Of the damped one.
        damping: The fraction that was added.
        attempts: Factorizations tried, this one included.
    """

    columns: Tensor
    lines: Tensor
    roots: Tensor
    diagonal: Tensor
    damped: Tensor
    damping: float
    attempts: int

    def coefficients(self, block: slice) -> Tensor:
        """What errors of columns up to the block do to its targets: ``R_jk / R_kk``.

        Returns:
            float32 ``[block, block.stop]``, undefined on and above the diagonal.
        """
        return self.lines[block, : block.stop].to(torch.float32)


@dataclass(frozen=True, eq=False)
class _Coupling:
    """What coordinate descent reads: the Hessian of ``n`` live columns in the order of the sweep.

    It is gathered a block of lines at a time, so that there is no second one in memory.

    Attributes:
        hessian: Of all columns, without damping, ``[in, in]``.
        columns: Which column comes at each position, int64 ``[n]``.
        damped: Its diagonal with damping, which is added to nothing else, float32 ``[n]``.
    """

    hessian: Moments
    columns: Tensor
    damped: Tensor

    def coefficients(self, block: slice) -> Tensor:
        """What errors of all columns do to a block's targets: ``H_kj / H_kk``.

        Returns:
            float32 ``[block, n]``.
        """
        lines = self.hessian.index_select(0, self.columns[block])
        return lines.index_select(1, self.columns).div_(self.damped[block].unsqueeze(1))


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
        spec: The format, which says what columns share a line.
    """

    steps: Tensor
    zeros: Tensor | None
    spec: NumberSpec

    @staticmethod
    def of(problem: LayerProblem, scales: tuple[Scales, ...]) -> _ScaleTable:
        """The table of a problem."""
        rows = [len(weight) for weight in problem.weights]
        return _ScaleTable(*scales_by_column(scales, rows, problem.spec), problem.spec)

    def of_rows(self, rows: slice, columns: Tensor) -> sweep_kernels.ScaleLines:
        """Those of some of the rows, for columns in an order."""
        zeros = None if self.zeros is None else self.zeros[:, rows]
        return sweep_kernels.ScaleLines(self.steps[:, rows], zeros, _lines_of(columns, self.spec))


class _Sweep:
    """A portion of the rows of a problem, columns first and in the order of the sweep.

    What the errors of a row cost is the sum of what its columns cost when they were rounded. With
    damping that is the sum of squares on which the sweep rests, changed by each column that is
    rounded again; what is on the diagonal alone is taken off in the end:

        e H e^T = sum over k of R_kk^2 (t_k - q_k)^2 - sum over k of (damped_k - H_kk) e_k^2

    Args:
        problem: The layers.
        portion: Of their rows, ``r``.
        table: The scales of all rows.
        factor: Of the ``n`` live columns.
        block_size: Columns between two large matrix products.
        kernel: What rounds the columns of a block.
        descends: Whether passes of descent will follow that start from what the sweep leaves.

    Attributes:
        errors: ``w - q`` of the columns done; float32 ``[n, r]``.
    """

    def __init__(
        self,
        problem: LayerProblem,
        portion: _Portion,
        table: _ScaleTable,
        factor: _Factor,
        block_size: int,
        kernel: sweep_kernels.Kernel,
        *,
        descends: bool,
    ) -> None:
        self._problem, self._portion, self._table = problem, portion, table
        self._columns = factor.columns
        dead = torch.ones(problem.in_features, dtype=torch.bool, device=self._columns.device)
        self._dead = dead.index_fill_(0, self._columns, False).nonzero().flatten()
        self._block_size = block_size
        self._grid = problem.spec.grid
        self._kernel = kernel
        self._weights = self._lines_of(self._columns)
        self.errors = torch.empty_like(self._weights)
        self._codes = torch.empty_like(self._weights, dtype=torch.int8)
        self._nearest = torch.empty_like(self._codes)
        self._scales = table.of_rows(portion.rows, self._columns)
        self._distances = torch.empty_like(self.errors) if descends else None
        # Of a distance by pass; of an error without correlations, and what damping adds to that.
        self._costs = torch.stack([factor.damped, factor.diagonal, factor.damped - factor.diagonal])
        self._sums = self.errors.new_zeros(len(self._costs), self.errors.shape[1]).double()

    def nearest(self, factor: _Factor, hessian: Moments) -> Tensor:
        """What rounding to nearest costs, without damping: by the same identity, in one product.

        Codes of live columns are kept for rows that fall back on them.

        Returns:
            float64 ``[r]``.
        """
        self._sweep(factor, "nearest")
        losses = self.row_losses(hessian)
        self._nearest.copy_(self._codes)
        self._sums.zero_()
        return losses

    def run(self, factor: _Factor) -> float:
        """Round every column once, from ``w_k + sum over j < k of e_j R_jk / R_kk``.

        Returns:
            The loss under the factorized Hessian, of all rows.
        """
        self._sweep(factor, "before")
        return float(self._sums[0].sum())

    def refine(self, factor: _Factor, coupling: _Coupling, passes: int) -> float:
        """Round every column again and again, from ``w_k + sum over j != k of e_j H_jk / H_kk``.

        Args:
            factor: Of the damped Hessian.
            coupling: That Hessian.
            passes: How often.

        Returns:
            By how much the loss under the damped Hessian changed, of all rows: the costs of the
            squared distances, less those of the values that were replaced.
        """
        swept = float(self._sums[0].sum())
        self._costs[0] = coupling.damped
        if self._distances is not None:
            products = self._products(factor, self._distances)
            self._distances = None
            for left in reversed(range(passes)):
                self._descend(coupling, products, final=not left)
        else:
            for _ in range(passes):
                self._round_again(coupling)
        return float(self._sums[0].sum()) - swept

    def _round_again(self, coupling: _Coupling) -> None:
        """One pass, with two products for each block."""
        for block in blocks(len(self._weights), self._block_size):
            coefficients = coupling.coefficients(block)
            before, behind = slice(0, block.start), slice(block.stop, len(self._weights))
            targets = torch.addmm(
                self._weights[block], coefficients[:, before], self.errors[before]
            )
            targets.addmm_(coefficients[:, behind], self.errors[behind])
            self._round(block, targets, coefficients[:, block], "others")

    def _products(self, factor: _Factor, distances: Tensor) -> Tensor:
        """Errors of a sweep times the damped Hessian, ``e H = (e R) R^T``.

        ``e R`` is known: ``R_kk`` times the distances between targets and values. So this takes one
        triangular product, and no Hessian.

        Args:
            factor: Of the damped Hessian.
            distances: Between targets and values, times ``R_kk^2``, ``[n, r]``.

        Returns:
            float32 ``[strips, n, 16]``.
        """
        count, rows = distances.shape
        strips = -(-rows // descent.STRIP)
        products = distances.new_empty(strips, count, descent.STRIP)
        for block in blocks(count, self._block_size):
            own = factor.lines[block, block].to(torch.float32).tril(-1)
            own.diagonal().fill_(1.0)
            behind = slice(block.stop, count)
            part = own.T @ distances[block]
            part.addmm_(factor.lines[behind, block].to(torch.float32).T, distances[behind])
            products[:, block] = descent.in_strips(part)
        return products

    def _descend(self, coupling: _Coupling, products: Tensor, *, final: bool) -> None:
        """One pass that only touches what changes."""
        for block in blocks(len(self._weights), _DESCENT_BLOCK):
            coefficients = coupling.coefficients(block)
            coefficients[:, block].diagonal().fill_(1.0)
            descent.round_again(
                products,
                self._weights[block],
                coefficients,
                self._scales.of(block),
                self._grid,
                self.errors[block],
                self._codes[block],
                self._tally(block),
                column=block.start,
                final=final,
            )

    def row_losses(self, hessian: Moments) -> Tensor:
        """The loss of each row under the Hessian without damping.

        It is the difference of sums that are known; only where it is so small that their rounding
        errors would show is it measured.

        Args:
            hessian: Of all columns, without damping.

        Returns:
            float64 ``[r]``, never negative.
        """
        damped, uncorrelated, added = self._sums
        losses: Tensor = damped - added
        unclear = ~(losses > _LEAST_FRACTION * uncorrelated)
        if bool(unclear.any()):
            errors = self.errors.new_zeros(int(unclear.sum()), len(hessian))
            errors[:, self._columns] = self.errors[:, unclear].T
            losses[unclear] = row_losses(errors, hessian)
        return losses

    def fall_back(self, rows: Tensor) -> None:
        """Give some rows, bool ``[r]``, the nearest codes."""
        if bool(rows.any()):
            self._codes[:, rows] = self._nearest[:, rows]

    def write_codes(self, codes: list[Tensor]) -> None:
        """Put codes in their places in those of whole layers; dead columns have the nearest."""
        widths = [rows.stop - rows.start for _, rows in self._portion.pieces]
        parts = self._codes.split(widths, dim=1), self._round_dead().split(widths, dim=1)
        for (layer, rows), live, dead in zip(self._portion.pieces, *parts, strict=True):
            whole = codes[layer][rows]
            transpose.lines_as_columns(self._kernel, live, self._columns, whole)
            transpose.lines_as_columns(self._kernel, dead, self._dead, whole)

    def _round_dead(self) -> Tensor:
        """Codes of dead columns, int8 ``[dead, r]``."""
        weights = self._lines_of(self._dead)
        scales = self._table.of_rows(self._portion.rows, self._dead)
        points = torch.empty_like(weights)
        sweep_kernels.round_alone(
            weights, scales, self._grid, errors=torch.empty_like(weights), points=points
        )
        codes = torch.empty_like(weights, dtype=torch.int8)
        self._grid.write(points, codes)
        return codes

    def _lines_of(self, columns: Tensor) -> Tensor:
        """Weights of some columns, ``[columns, r]``."""
        width = self._portion.rows.stop - self._portion.rows.start
        found = self._problem.weights[0].new_empty(len(columns), width)
        parts = found.split([rows.stop - rows.start for _, rows in self._portion.pieces], dim=1)
        for (layer, rows), part in zip(self._portion.pieces, parts, strict=True):
            weight = self._problem.weights[layer][rows]
            transpose.columns_as_lines(self._kernel, weight, columns, part)
        return found

    def _sweep(self, factor: _Factor, aim: sweep_kernels.Aim) -> None:
        self._costs[0] = factor.roots.square()
        for block in blocks(len(self._weights), self._block_size):
            coefficients = factor.coefficients(block)
            before = slice(0, block.start)
            targets = torch.addmm(
                self._weights[block], coefficients[:, before], self.errors[before]
            )
            self._round(block, targets, coefficients[:, block], aim)
            if aim == "before" and self._distances is not None:
                distances = torch.sub(targets, self._weights[block], out=self._distances[block])
                distances.add_(self.errors[block]).mul_(self._costs[0, block].unsqueeze(1))

    def _round(
        self, block: slice, targets: Tensor, coefficients: Tensor, aim: sweep_kernels.Aim
    ) -> None:
        """Round the columns of a block one by one, and leave their errors, codes and costs.

        Args:
            block: Which they are.
            targets: What they are rounded from but for errors inside the block, ``[b, r]``;
                completed in place.
            coefficients: Of errors inside the block, ``[b, b]``.
            aim: What they are rounded to.
        """
        sweep_kernels.round_columns(
            self._kernel,
            targets,
            self._weights[block],
            coefficients,
            self._scales.of(block),
            self._grid,
            errors=self.errors[block],
            points=self._codes[block],
            aim=aim,
            tally=self._tally(block),
        )

    def _tally(self, block: slice) -> sweep_kernels.Tally:
        return sweep_kernels.Tally(self._costs[:, block], self._sums)


def peak_solve_bytes(in_features: int, rows: int) -> int:
    """The most memory that a solve takes beside its problem, as long as float32 is precise enough.

    The factor is the only matrix of the Hessian's size. Weights in the order of the sweep, and what
    else a sweep keeps of them, are of a portion of the rows. Codes are of all of them.

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
    # Weights, errors, distances and products of a portion; its codes, twice, and their transpose.
    sweep = 19 * in_features * portion
    # Codes are a byte each, scales half a byte at most.
    codes = in_features * rows * 3 // 2
    return 4 * in_features**2 + panels + sweep + codes


def _portion_size(device: torch.device) -> int:
    """Rows solved at once: few enough for a block's to stay in the cache, where there is one."""
    return _CPU_ROWS if device.type == "cpu" else _DEVICE_ROWS


def _portions(rows: Sequence[int], most: int) -> Iterator[_Portion]:
    """Cut layers of so many rows, put one after the other, into portions of at most ``most``."""
    ends = list(itertools.accumulate(rows))
    # Even portions: a narrow last one would make slow matrix products.
    size = -(-ends[-1] // -(-ends[-1] // most))
    size = min(-(-size // _EVEN_ROWS) * _EVEN_ROWS, most)
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
