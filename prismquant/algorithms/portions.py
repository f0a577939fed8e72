"""A portion of the rows of a GPTQ problem, on its way through sweep and descent.

Rows are independent, so a problem is solved a portion of its rows after the other: enough for
products to be fast, few enough for what a sweep keeps of them to be small beside the Hessian.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.algorithms.factor import blocks
from prismquant.algorithms.layer_scales import Scales, scales_by_column
from prismquant.algorithms.problem import LayerProblem, row_losses
from prismquant.kernels import descent, products, transpose
from prismquant.kernels import sweep as sweep_kernels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prismquant.algorithms.triangles import Factor, Triangles
    from prismquant.formats.spec import NumberSpec

# Rows solved at once: enough for products to be fast, few enough for vectors to stay in a cache. A
# device with memory of its own wants them all.
CPU_ROWS = 1024
_DEVICE_ROWS = 1 << 20
# Portions are multiples of what kernels take at once, so that their lines begin where those of the
# cache do.
_EVEN_ROWS = 64
# Columns that are rounded again between two looks at other rows.
_DESCENT_BLOCK = 512
# How small a loss, as a fraction of what the same errors would cost without correlations, is still
# a difference of sums and not of their rounding errors.
_LEAST_FRACTION = 1e-3
# How little of the damped loss it may be where factors are rounded, which changes that by some
# ten thousandths.
_LEAST_LEFT = 2e-2
# How many lines of the Hessian's width all panels of a solve come to at most.
_PANEL_LINES = 1280


@dataclass(frozen=True)
class Portion:
    """Rows of the layers that are solved at once.

    Attributes:
        rows: Which they are when all layers are put one after the other.
        pieces: The same as layers and rows of them.
    """

    rows: slice
    pieces: tuple[tuple[int, slice], ...]


@dataclass(frozen=True, eq=False)
class ScaleTable:
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
    def of(problem: LayerProblem, scales: tuple[Scales, ...]) -> ScaleTable:
        """The table of a problem."""
        rows = [len(weight) for weight in problem.weights]
        return ScaleTable(*scales_by_column(scales, rows, problem.spec), problem.spec)

    def of_rows(self, rows: slice, columns: Tensor) -> sweep_kernels.ScaleLines:
        """Those of some of the rows, for columns in an order."""
        zeros = None if self.zeros is None else self.zeros[:, rows]
        return sweep_kernels.ScaleLines(self.steps[:, rows], zeros, scale_lines(columns, self.spec))


class Sweep:
    """A portion of the rows of a problem, columns first: swept in an order, refined in their own.

    What the errors of a row cost is the sum of what its columns cost when they were rounded. With
    damping that is the sum of squares on which the sweep rests, changed by each column that is
    rounded again; what is on the diagonal alone is taken off in the end:

        e H e^T = sum over k of R_kk^2 (t_k - q_k)^2 - sum over k of (damped_k - H_kk) e_k^2

    Where factors of products are rounded, targets are off by some thousandths of a step, and losses
    told by some thousandths of themselves.

    Args:
        problem: The layers.
        portion: Of their rows, ``r``.
        table: The scales of all rows.
        factor: Of the damped Hessian.
        block_size: Columns between two large matrix products.
        kernel: What rounds the columns of a block.
        descends: Whether passes of descent will follow that start from what the sweep leaves.

    Attributes:
        errors: ``w - q`` of the columns done; float32 ``[n, r]``.
    """

    def __init__(
        self,
        problem: LayerProblem,
        portion: Portion,
        table: ScaleTable,
        factor: Factor,
        block_size: int,
        kernel: sweep_kernels.Kernel,
        *,
        descends: bool,
    ) -> None:
        self._problem, self._portion, self._table = problem, portion, table
        self._columns = factor.columns
        self._block_size = block_size
        self._grid = problem.spec.grid
        self._kernel = kernel
        self._weights = self._lines_of(self._columns)
        self.errors = torch.empty_like(self._weights)
        self._rounded = self._narrow(self.errors)
        self._codes = torch.empty_like(self._weights, dtype=torch.int8)
        self._nearest = torch.empty_like(self._codes)
        self._scales = table.of_rows(portion.rows, self._columns)
        self._distances = torch.empty_like(self.errors) if descends else None
        # Of a distance by pass; of an error without correlations, and what damping adds to that.
        costs = torch.stack([factor.damped, factor.diagonal, factor.damped - factor.diagonal])
        self._costs = costs[:, self._columns]
        self._sums = self.errors.new_zeros(len(self._costs), self.errors.shape[1]).double()

    def nearest(self, factor: Factor, hessian: Triangles) -> Tensor:
        """What rounding to nearest costs, without damping: by the same identity, in one product.

        The codes are kept for rows that fall back on them.

        Returns:
            float64 ``[r]``.
        """
        self._sweep(factor, "nearest")
        losses = self.row_losses(hessian)
        self._nearest.copy_(self._codes)
        self._sums.zero_()
        return losses

    def run(self, factor: Factor) -> float:
        """Round every column once, from ``w_k + sum over j < k of e_j R_jk / R_kk``.

        Returns:
            The loss under the factorized Hessian, of all rows.
        """
        self._sweep(factor, "before")
        return float(self._sums[0].sum())

    def refine(self, factor: Factor, hessian: Triangles, passes: int) -> float:
        """Round every column again and again, from ``w_k + sum over j != k of e_j H_jk / H_kk``.

        Args:
            factor: Of the damped Hessian.
            hessian: Without damping.
            passes: How often.

        Returns:
            By how much the loss under the damped Hessian changed, of all rows: the costs of the
            squared distances, less those of the values that were replaced.
        """
        if not passes:
            return 0.0
        swept = float(self._sums[0].sum())
        self._rounded = None
        kept = None if self._distances is None else self._products(factor, self._distances)
        self._distances = None
        self._undo_order(factor)
        for left in reversed(range(passes)):
            if kept is None:
                self._round_again(factor, hessian)
            else:
                self._descend(factor, hessian, kept, final=not left)
        return float(self._sums[0].sum()) - swept

    def _undo_order(self, factor: Factor) -> None:
        """Put columns in their original order, in which the Hessian's lines are."""
        place = torch.argsort(self._columns)
        # One after the other: there is never more than one twice.
        self._weights = self._weights[place]
        self.errors = self.errors[place]
        self._codes, self._nearest = self._codes[place], self._nearest[place]
        self._costs = self._costs[:, place]
        self._costs[0] = factor.damped
        self._columns = self._columns[place]
        self._scales = self._table.of_rows(self._portion.rows, self._columns)

    def _round_again(self, factor: Factor, hessian: Triangles) -> None:
        """One pass, with two products for each block."""
        for block in blocks(len(self._weights), self._block_size):
            coefficients = hessian.lines(block).div_(factor.damped[block].unsqueeze(1))
            before, behind = slice(0, block.start), slice(block.stop, len(self._weights))
            targets = torch.addmm(
                self._weights[block], coefficients[:, before], self.errors[before]
            )
            targets.addmm_(coefficients[:, behind], self.errors[behind])
            self._round(block, targets, coefficients[:, block], "others")

    def _products(self, factor: Factor, distances: Tensor) -> Tensor:
        """Errors of a sweep times the damped Hessian, ``e H = (e R) R^T``.

        ``e R`` is known: ``R_kk`` times the distances between targets and values. So this takes one
        triangular product, and no Hessian.

        Args:
            factor: Of the damped Hessian.
            distances: Between targets and values, times ``R_kk^2``, ``[n, r]``.

        Returns:
            float32 ``[strips, n, 16]``, columns in their original order.
        """
        count, rows = distances.shape
        strips = -(-rows // descent.STRIP)
        found = distances.new_empty(strips, count, descent.STRIP)
        rounded = self._narrow(distances)
        for block in blocks(count, self._block_size):
            own = factor.lines[block, block].to(torch.float32).tril(-1)
            own.diagonal().fill_(1.0)
            behind = slice(block.stop, count)
            across = factor.lines[behind, block].T
            part = own.T @ distances[block]
            if rounded is None:
                part.addmm_(across.to(torch.float32), distances[behind])
            else:
                part += products.rounded_product(across, rounded[behind])
            found.index_copy_(1, self._columns[block], descent.in_strips(part))
        return found

    def _descend(self, factor: Factor, hessian: Triangles, kept: Tensor, *, final: bool) -> None:
        """One pass that only touches what changes."""
        count = len(self._weights)
        memory = self._weights.new_empty(min(_DESCENT_BLOCK, count), count)
        for block in blocks(count, _DESCENT_BLOCK):
            first = block.start if final else 0
            coefficients = hessian.lines(block, memory, whole=not final)
            coefficients[:, first:] /= factor.damped[block].unsqueeze(1)
            coefficients[:, block].diagonal().fill_(1.0)
            descent.round_again(
                kept,
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

    def row_losses(self, hessian: Triangles) -> Tensor:
        """The loss of each row under the Hessian without damping.

        It is the difference of sums that are known; only where it is so small that their rounding
        errors would show is it measured.

        Args:
            hessian: Without damping.

        Returns:
            float64 ``[r]``, never negative.
        """
        damped, uncorrelated, added = self._sums
        losses: Tensor = damped - added
        least = _LEAST_FRACTION * uncorrelated
        if self._rounds:
            least = torch.maximum(least, _LEAST_LEFT * damped)
        unclear = ~(losses > least)
        if bool(unclear.any()):
            errors = self.errors.new_zeros(int(unclear.sum()), len(self.errors))
            errors[:, self._columns] = self.errors[:, unclear].T
            losses[unclear] = row_losses(errors, hessian.matrix)
        return losses

    def fall_back(self, rows: Tensor) -> None:
        """Give some rows, bool ``[r]``, the nearest codes."""
        if bool(rows.any()):
            self._codes[:, rows] = self._nearest[:, rows]

    def write_codes(self, codes: list[Tensor]) -> None:
        """Put codes in their places in those of whole layers."""
        widths = [rows.stop - rows.start for _, rows in self._portion.pieces]
        parts = self._codes.split(widths, dim=1)
        for (layer, rows), part in zip(self._portion.pieces, parts, strict=True):
            transpose.lines_as_columns(self._kernel, part, self._columns, codes[layer][rows])

    @property
    def _rounds(self) -> bool:
        """Whether large products are of rounded factors: what they give is rounded to codes."""
        return self._problem.products == torch.bfloat16 and products.supports(
            self._weights.device, torch.bfloat16
        )

    def _narrow(self, values: Tensor) -> Tensor | None:
        """A copy as products take it, if they are of rounded factors."""
        return values.to(torch.bfloat16) if self._rounds else None

    def _lines_of(self, columns: Tensor) -> Tensor:
        """Weights of some columns, ``[columns, r]``."""
        width = self._portion.rows.stop - self._portion.rows.start
        found = self._problem.weights[0].new_empty(len(columns), width)
        parts = found.split([rows.stop - rows.start for _, rows in self._portion.pieces], dim=1)
        for (layer, rows), part in zip(self._portion.pieces, parts, strict=True):
            weight = self._problem.weights[layer][rows]
            transpose.columns_as_lines(self._kernel, weight, columns, part)
        return found

    def _sweep(self, factor: Factor, aim: sweep_kernels.Aim) -> None:
        self._costs[0] = factor.roots.square()
        for block in blocks(len(self._weights), self._block_size):
            coefficients = factor.coefficients(block)
            targets = self._targets(block, coefficients[:, : block.start])
            self._round(block, targets, coefficients[:, block], aim)
            if self._rounded is not None:
                self._rounded[block] = self.errors[block]
            if aim == "before" and self._distances is not None:
                distances = torch.sub(targets, self._weights[block], out=self._distances[block])
                distances.add_(self.errors[block]).mul_(self._costs[0, block].unsqueeze(1))

    def _targets(self, block: slice, coefficients: Tensor) -> Tensor:
        """What a block is rounded from but for errors inside it, ``[b, r]``."""
        before = slice(0, block.start)
        if self._rounded is None:
            return torch.addmm(self._weights[block], coefficients, self.errors[before])
        pulls = products.rounded_product(coefficients, self._rounded[before])
        return pulls.add_(self._weights[block])

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

    The factor is made in the Hessian's own memory. Weights in the order of the sweep, and what else
    a sweep keeps of them, are of a portion of the rows. Codes are of all of them.

    Args:
        in_features: Columns of the weights, ``n``.
        rows: Of all layers that are solved together.

    Returns:
        Bytes on a CPU, beyond the Hessian (``4 n^2``) and the weights (``4 n rows``) that the
        caller holds. A Hessian that only float64 can factorize takes ``4 n^2`` more.
    """
    portion = min(rows, CPU_ROWS)
    # Lines gathered, eliminated or multiplied at once, and what is derived from them.
    panels = 4 * _PANEL_LINES * (in_features + portion)
    # Weights, errors, distances (also rounded) and products of a portion; its codes, twice.
    sweep = 20 * in_features * portion
    # Codes are a byte each, scales half a byte at most.
    codes = in_features * rows * 3 // 2
    return panels + sweep + codes


def portion_size(device: torch.device) -> int:
    """Rows solved at once: few enough for a block's to stay in the cache, where there is one."""
    return CPU_ROWS if device.type == "cpu" else _DEVICE_ROWS


def portions(rows: Sequence[int], most: int) -> Iterator[Portion]:
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
        yield Portion(part, tuple(pieces))


def scale_lines(columns: Tensor, spec: NumberSpec) -> Tensor:
    """Which line of the scales each column uses: that of its group in the original order."""
    if not spec.granularity.grouped or spec.group_size is None:
        return torch.zeros_like(columns)
    return columns // spec.group_size
