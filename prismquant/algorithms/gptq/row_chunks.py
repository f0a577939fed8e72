"""Chunks of the rows of a problem: how they are cut, and the working memory of one.

Rows are independent, so a problem is solved one chunk of its rows after the other: enough for
products to be fast, few enough for what is kept of them to be small beside the Hessian.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.algorithms.gptq.cholesky import blocks
from prismquant.algorithms.layer_scales import Scales, scale_lines, scales_by_column
from prismquant.algorithms.problem import LayerProblem, row_losses
from prismquant.kernels import products, sweep, transpose
from prismquant.kernels.rounding import LossAccumulator, ScaleLines

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prismquant.algorithms.gptq.damped_factor import CholeskyFactor
    from prismquant.algorithms.gptq.shared_hessian import SharedHessian
    from prismquant.formats.spec import NumberSpec
    from prismquant.kernels.rounding import Aim, Kernel

# Rows solved at once: enough for products to be fast, few enough for vectors to stay in a cache. A
# device with memory of its own wants them all.
CPU_ROWS = 1024
_DEVICE_ROWS = 1 << 20
# Chunks are multiples of what kernels take at once, so that their lines begin where those of the
# cache do.
_EVEN_ROWS = 64
# How small a loss, as a fraction of what the same errors would cost without correlations, is still
# a difference of sums and not of their rounding errors.
_LEAST_FRACTION = 1e-3
# How little of the damped loss it may be where factors are rounded, which changes that by some
# ten thousandths.
_LEAST_LEFT = 2e-2
# How many lines of the Hessian's width all panels of a solve come to at most.
_PANEL_LINES = 1280


@dataclass(frozen=True)
class ChunkRows:
    """Rows of the layers that are solved at once.

    Attributes:
        rows: Their numbers when all layers are put one after the other.
        pieces: The same as layers and rows of them.
    """

    rows: slice
    pieces: tuple[tuple[int, slice], ...]

    @property
    def widths(self) -> list[int]:
        """Number of rows of each piece."""
        return [rows.stop - rows.start for _, rows in self.pieces]


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

    def of_rows(self, rows: slice, columns: Tensor) -> ScaleLines:
        """The scales of some of the rows, for columns in an order."""
        zeros = None if self.zeros is None else self.zeros[:, rows]
        return ScaleLines(self.steps[:, rows], zeros, scale_lines(columns, self.spec))


class RowChunk:
    """Working memory of a chunk of ``r`` rows, columns first.

    The loss of a row is the sum of what its columns cost when they were rounded. With damping that
    is the sum of squares on which the column loop rests, changed by each column that is rounded
    again; what is on the diagonal alone is taken off in the end:

        e H e^T = sum over k of R_kk^2 (t_k - q_k)^2 - sum over k of (damped_k - H_kk) e_k^2

    Where factors of products are rounded, targets are off by some thousandths of a step, and losses
    told by some thousandths of themselves.

    Args:
        problem: The layers.
        rows: Rows of the chunk.
        table: The scales of all rows.
        factor: Of the damped Hessian; columns come in its order.
        kernel: What rounds the columns of a block.

    Attributes:
        kernel: What rounds the columns of a block.
        columns: The original column at each position, int64 ``[n]``.
        weights: ``w``, float32 ``[n, r]``.
        errors: ``w - q`` of the columns done, float32 ``[n, r]``.
        codes: int8 ``[n, r]``.
        nearest: Codes of rounding to nearest, int8 ``[n, r]``.
        distances: Between targets and values, times ``R_kk^2``, ``[n, r]``: what the column loop
            leaves to coordinate descent, or ``None``.
        scales: Of these rows, for the columns in their order.
        costs: float32 ``[3, n]``: of a distance; of an error without correlations; and what damping
            adds to that.
        sums: What squares times these costs come to, float64 ``[3, r]``.
    """

    def __init__(
        self,
        problem: LayerProblem,
        rows: ChunkRows,
        table: ScaleTable,
        factor: CholeskyFactor,
        kernel: Kernel,
    ) -> None:
        self._problem, self._rows, self._table = problem, rows, table
        self.kernel = kernel
        self.grid = problem.spec.grid
        self.columns = factor.columns
        self.weights = self._lines_of(self.columns)
        self.errors = torch.empty_like(self.weights)
        self.codes = torch.empty_like(self.weights, dtype=torch.int8)
        self.nearest = torch.empty_like(self.codes)
        self.distances: Tensor | None = None
        self.scales = table.of_rows(rows.rows, self.columns)
        costs = torch.stack([factor.damped, factor.diagonal, factor.damped - factor.diagonal])
        self.costs = costs[:, self.columns]
        self.sums = self.errors.new_zeros(len(self.costs), self.errors.shape[1]).double()

    def __len__(self) -> int:
        """Number of columns."""
        return len(self.weights)

    @property
    def rounds(self) -> bool:
        """Whether large products are of rounded factors: what they give is rounded to codes."""
        return self._problem.products == torch.bfloat16 and products.supports(
            self.weights.device, torch.bfloat16
        )

    def undo_order(self, factor: CholeskyFactor) -> None:
        """Put columns in their original order, in which the Hessian's lines are."""
        place = torch.argsort(self.columns)
        # One after the other: there is never more than one twice.
        self.weights = self.weights[place]
        self.errors = self.errors[place]
        self.codes, self.nearest = self.codes[place], self.nearest[place]
        self.costs = self.costs[:, place]
        self.costs[0] = factor.damped
        self.columns = self.columns[place]
        self.scales = self._table.of_rows(self._rows.rows, self.columns)

    def round(self, block: slice, targets: Tensor, coefficients: Tensor, aim: Aim) -> None:
        """Round the columns of a block one by one, and leave their errors, codes and costs.

        Args:
            block: The columns.
            targets: What they are rounded from but for errors inside the block, ``[b, r]``;
                completed in place.
            coefficients: Of errors inside the block, ``[b, b]``.
            aim: What they are rounded to.
        """
        sweep.round_columns(
            self.kernel,
            targets,
            self.weights[block],
            coefficients,
            self.scales.of(block),
            self.grid,
            errors=self.errors[block],
            points=self.codes[block],
            aim=aim,
            accumulator=self.accumulator(block),
        )

    def accumulator(self, block: slice) -> LossAccumulator:
        """Accumulator of the losses of some columns."""
        return LossAccumulator(self.costs[:, block], self.sums)

    def row_losses(self, hessian: SharedHessian) -> Tensor:
        """The loss of each row under the Hessian without damping.

        It is the difference of sums that are known; only where it is so small that their rounding
        errors would show is it measured.

        Args:
            hessian: Without damping.

        Returns:
            float64 ``[r]``, never negative.
        """
        damped, uncorrelated, added = self.sums
        losses: Tensor = damped - added
        least = _LEAST_FRACTION * uncorrelated
        if self.rounds:
            least = torch.maximum(least, _LEAST_LEFT * damped)
        unclear = ~(losses > least)
        if bool(unclear.any()):
            errors = self.errors.new_zeros(int(unclear.sum()), len(self.errors))
            errors[:, self.columns] = self.errors[:, unclear].T
            losses[unclear] = row_losses(errors, hessian.matrix)
        return losses

    def fall_back(self, rows: Tensor) -> None:
        """Give some rows, bool ``[r]``, the nearest codes."""
        if bool(rows.any()):
            self.codes[:, rows] = self.nearest[:, rows]

    def write_codes(self, codes: list[Tensor]) -> None:
        """Put codes in their places in those of whole layers."""
        parts = self.codes.split(self._rows.widths, dim=1)
        for (layer, rows), part in zip(self._rows.pieces, parts, strict=True):
            transpose.lines_as_columns(self.kernel, part, self.columns, codes[layer][rows])

    def _lines_of(self, columns: Tensor) -> Tensor:
        """Weights of some columns, ``[columns, r]``."""
        rows = self._rows.rows
        found = self._problem.weights[0].new_empty(len(columns), rows.stop - rows.start)
        parts = found.split(self._rows.widths, dim=1)
        for (layer, own), part in zip(self._rows.pieces, parts, strict=True):
            weight = self._problem.weights[layer][own]
            transpose.columns_as_lines(self.kernel, weight, columns, part)
        return found


def peak_solve_bytes(in_features: int, rows: int) -> int:
    """The most memory that a solve takes beside its problem, as long as float32 is precise enough.

    The factor is made in the Hessian's own memory. Weights in the order of the column loop, and
    what else is kept of them, are of a chunk of the rows. Codes are of all of them.

    Args:
        in_features: Columns of the weights, ``n``.
        rows: Of all layers that are solved together.

    Returns:
        Bytes on a CPU, beyond the Hessian (``4 n^2``) and the weights (``4 n rows``) that the
        caller holds. A Hessian that only float64 can factorize takes ``4 n^2`` more.
    """
    chunk = min(rows, CPU_ROWS)
    # Lines gathered, eliminated or multiplied at once, and what is derived from them.
    panels = 4 * _PANEL_LINES * (in_features + chunk)
    # Weights, errors, distances (also rounded) and products of a chunk; its codes, twice.
    work = 20 * in_features * chunk
    # Codes are a byte each, scales half a byte at most.
    codes = in_features * rows * 3 // 2
    return panels + work + codes


def chunk_size(device: torch.device) -> int:
    """Rows solved at once: few enough for a block's to stay in the cache, where there is one."""
    return CPU_ROWS if device.type == "cpu" else _DEVICE_ROWS


def chunks_of(rows: Sequence[int], most: int) -> Iterator[ChunkRows]:
    """Cut layers of so many rows, put one after the other, into chunks of at most ``most``."""
    ends = list(itertools.accumulate(rows))
    # Even chunks: a narrow last one would make slow matrix products.
    size = -(-ends[-1] // -(-ends[-1] // most))
    size = min(-(-size // _EVEN_ROWS) * _EVEN_ROWS, most)
    for part in blocks(ends[-1], size):
        pieces = []
        for layer, (end, count) in enumerate(zip(ends, rows, strict=True)):
            first, last = max(part.start, end - count), min(part.stop, end)
            if first < last:
                pieces.append((layer, slice(first - end + count, last - end + count)))
        yield ChunkRows(part, tuple(pieces))
