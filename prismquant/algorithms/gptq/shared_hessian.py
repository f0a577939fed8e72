"""A Hessian and its factor in the memory of one matrix.

A symmetric matrix is known by one half, and so is a factor. Wide layers have matrices of gigabytes,
so both share one: on and above the diagonal stays the Hessian in its original order, below it the
factorization works, in the order of the column loop. When the factor is done with, the Hessian's
lower half is copied back from the upper one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.algorithms.gptq.cholesky import below_diagonal, blocks
from prismquant.kernels import transpose

if TYPE_CHECKING:
    from prismquant.kernels.rounding import Kernel

# Lines that are gathered or copied at once.
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class SharedHessian:
    """A Hessian of which nothing below the diagonal is read.

    Attributes:
        matrix: float32 ``[n, n]``; on and above its diagonal the Hessian, below it a factor.
        diagonal: The Hessian's, float32 ``[n]``.
        kernel: What transposes parts of it.
    """

    matrix: Tensor
    diagonal: Tensor
    kernel: Kernel

    @staticmethod
    def of(hessian: Tensor, kernel: Kernel) -> SharedHessian:
        """Take over the memory of a Hessian; :meth:`restore` gives it back as it was.

        Args:
            hessian: Symmetric, float32 ``[n, n]``.
            kernel: One that works where it lies.
        """
        return SharedHessian(hessian, hessian.diagonal().clone(), kernel)

    def restore(self) -> None:
        """Make the matrix the whole Hessian again."""
        self.matrix.diagonal().copy_(self.diagonal)
        for block in blocks(len(self.matrix), _BLOCK):
            self._fill_before(block, self.matrix[block])
            own = self.matrix[block, block]
            own.copy_(own.triu() + own.triu(1).T)

    def lines(self, block: slice, memory: Tensor | None = None, *, whole: bool = True) -> Tensor:
        """Lines of the Hessian in its original order.

        Args:
            block: Which.
            memory: float32, at least ``[block, n]``: where to put them.
            whole: Whether columns before the block are wanted, which take most of the time.

        Returns:
            float32 ``[block, n]``; without these columns anything is in their places.
        """
        lines = self.matrix[block]
        found = torch.empty_like(lines) if memory is None else memory[: len(lines)]
        found[:, block.start :] = lines[:, block.start :]
        if whole:
            self._fill_before(block, found)
        own = found[:, block]
        own.copy_(own.triu(1) + own.triu(1).T)
        own.diagonal().copy_(self.diagonal[block])
        return found

    def arrange(self, order: Tensor, target: Tensor) -> None:
        """Put the Hessian in an order below a diagonal.

        Args:
            order: Column at each position, int64 ``[n]``.
            target: ``[n, n]``, this matrix or another; what is below its diagonal is replaced.
        """
        columns = torch.arange(len(order), device=order.device)
        for block in blocks(len(order), _BLOCK):
            index = order[block]
            above = columns > index.unsqueeze(1)
            rows = self.matrix.index_select(0, index)
            across = torch.empty_like(rows)
            transpose.columns_as_lines(self.kernel, self.matrix, index, across)
            lines = torch.where(above, rows, across).index_select(1, order[: block.stop])
            target[block, : block.start] = lines[:, : block.start]
            own, found = target[block, block], lines[:, block]
            own.copy_(torch.where(below_diagonal(own), found.to(own.dtype), own))

    def _fill_before(self, block: slice, lines: Tensor) -> None:
        """Put what is above the diagonal in the columns of a block where it is left of it in lines.

        Args:
            block: Of columns.
            lines: ``[block, n]``, filled up to the block.
        """
        columns = torch.arange(block.start, block.stop, device=lines.device)
        ahead = slice(0, block.start)
        transpose.columns_as_lines(self.kernel, self.matrix[ahead], columns, lines[:, ahead])
