"""Coordinate descent: every column of a chunk rounded again, while all others are fixed.

Column k is rounded from ``w_k + sum over j != k of e_j H_jk / H_kk`` (QuantEase, Behdin et al.,
arXiv 2309.01885), which can only lower the damped loss. Where a kernel is at hand that touches only
what changes, a pass is nearly free; elsewhere it takes two products for each block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.algorithms.gptq.cholesky import blocks
from prismquant.kernels import descent, products

if TYPE_CHECKING:
    from prismquant.algorithms.gptq.damped_factor import CholeskyFactor
    from prismquant.algorithms.gptq.row_chunks import RowChunk
    from prismquant.algorithms.gptq.shared_hessian import SharedHessian

# Columns that are rounded again between two looks at other rows.
_DESCENT_BLOCK = 512


def refine(
    chunk: RowChunk, factor: CholeskyFactor, hessian: SharedHessian, passes: int, block_size: int
) -> float:
    """Round every column again and again.

    Args:
        chunk: The rows, after the column loop; left in the original order of columns.
        factor: Of the damped Hessian.
        hessian: Without damping.
        passes: How often.
        block_size: Columns between two large matrix products.

    Returns:
        By how much the loss under the damped Hessian changed, of all rows: the costs of the squared
        distances, less those of the values that were replaced.
    """
    if not passes:
        return 0.0
    before = float(chunk.sums[0].sum())
    kept = _error_products(chunk, factor, block_size)
    chunk.distances = None
    chunk.undo_order(factor)
    for left in reversed(range(passes)):
        if kept is None:
            _round_again(chunk, factor, hessian, block_size)
        else:
            _descend(chunk, factor, hessian, kept, final=not left)
    return float(chunk.sums[0].sum()) - before


def _round_again(
    chunk: RowChunk, factor: CholeskyFactor, hessian: SharedHessian, block_size: int
) -> None:
    """One pass, with two products for each block."""
    for block in blocks(len(chunk), block_size):
        coefficients = hessian.lines(block).div_(factor.damped[block].unsqueeze(1))
        before, behind = slice(0, block.start), slice(block.stop, len(chunk))
        targets = torch.addmm(chunk.weights[block], coefficients[:, before], chunk.errors[before])
        targets.addmm_(coefficients[:, behind], chunk.errors[behind])
        chunk.round(block, targets, coefficients[:, block], "others")


def _error_products(chunk: RowChunk, factor: CholeskyFactor, block_size: int) -> Tensor | None:
    """Errors of the column loop times the damped Hessian, ``e H = (e R) R^T``.

    ``e R`` is known: ``R_kk`` times the distances between targets and values. So this takes one
    triangular product, and no Hessian.

    Returns:
        float32 ``[strips, n, 16]``, columns in their original order; ``None`` where the column loop
        has kept no distances.
    """
    distances = chunk.distances
    if distances is None:
        return None
    count, rows = distances.shape
    strips = -(-rows // descent.STRIP)
    found = distances.new_empty(strips, count, descent.STRIP)
    rounded = distances.to(torch.bfloat16) if chunk.rounds else None
    for block in blocks(count, block_size):
        own = factor.lines[block, block].to(torch.float32).tril(-1)
        own.diagonal().fill_(1.0)
        behind = slice(block.stop, count)
        across = factor.lines[behind, block].T
        part = own.T @ distances[block]
        if rounded is None:
            part.addmm_(across.to(torch.float32), distances[behind])
        else:
            part += products.rounded_product(across, rounded[behind])
        found.index_copy_(1, chunk.columns[block], descent.in_strips(part))
    return found


def _descend(
    chunk: RowChunk, factor: CholeskyFactor, hessian: SharedHessian, kept: Tensor, *, final: bool
) -> None:
    """One pass that only touches what changes."""
    count = len(chunk)
    memory = chunk.weights.new_empty(min(_DESCENT_BLOCK, count), count)
    for block in blocks(count, _DESCENT_BLOCK):
        first = block.start if final else 0
        coefficients = hessian.lines(block, memory, whole=not final)
        coefficients[:, first:] /= factor.damped[block].unsqueeze(1)
        coefficients[:, block].diagonal().fill_(1.0)
        descent.round_again(
            kept,
            chunk.weights[block],
            coefficients,
            chunk.scales.of(block),
            chunk.grid,
            chunk.errors[block],
            chunk.codes[block],
            chunk.accumulator(block),
            column=block.start,
            final=final,
        )
