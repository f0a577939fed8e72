"""The column loop: every column of a chunk rounded once, each answering for those before it.

Column k is rounded from ``w_k + sum over j < k of e_j R_jk / R_kk``. Inside a block of columns a
kernel goes from one to the next; between blocks the errors so far pull by one matrix product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.algorithms.gptq.cholesky import blocks
from prismquant.kernels import products

if TYPE_CHECKING:
    from prismquant.algorithms.gptq.damped_factor import CholeskyFactor
    from prismquant.algorithms.gptq.row_chunks import RowChunk
    from prismquant.algorithms.gptq.shared_hessian import SharedHessian
    from prismquant.kernels.rounding import Aim


def round_to_nearest(
    chunk: RowChunk, factor: CholeskyFactor, hessian: SharedHessian, block_size: int
) -> Tensor:
    """Loss of rounding to nearest, without damping: by the same identity, in one product.

    The codes are kept for rows that fall back on them.

    Args:
        chunk: The rows.
        factor: Of the damped Hessian.
        hessian: Without damping.
        block_size: Columns between two large matrix products.

    Returns:
        float64 ``[r]``.
    """
    _loop(chunk, factor, "nearest", block_size)
    losses = chunk.row_losses(hessian)
    chunk.nearest.copy_(chunk.codes)
    chunk.sums.zero_()
    return losses


def round_with_feedback(
    chunk: RowChunk, factor: CholeskyFactor, block_size: int, *, descends: bool
) -> float:
    """Round every column once, from ``w_k + sum over j < k of e_j R_jk / R_kk``.

    Args:
        chunk: The rows.
        factor: Of the damped Hessian.
        block_size: Columns between two large matrix products.
        descends: Whether coordinate descent follows that needs the distances between targets and
            values.

    Returns:
        The loss under the damped Hessian, of all rows.
    """
    if descends:
        chunk.distances = torch.empty_like(chunk.errors)
    _loop(chunk, factor, "before", block_size)
    return float(chunk.sums[0].sum())


def _loop(chunk: RowChunk, factor: CholeskyFactor, aim: Aim, block_size: int) -> None:
    chunk.costs[0] = factor.roots.square()
    # Errors as products take them, where these are of rounded factors.
    rounded = torch.empty_like(chunk.errors, dtype=torch.bfloat16) if chunk.rounds else None
    for block in blocks(len(chunk), block_size):
        coefficients = factor.coefficients(block)
        targets = _targets(chunk, block, coefficients[:, : block.start], rounded)
        chunk.round(block, targets, coefficients[:, block], aim)
        if rounded is not None:
            rounded[block] = chunk.errors[block]
        if aim == "before" and chunk.distances is not None:
            distances = torch.sub(targets, chunk.weights[block], out=chunk.distances[block])
            distances.add_(chunk.errors[block]).mul_(chunk.costs[0, block].unsqueeze(1))


def _targets(chunk: RowChunk, block: slice, coefficients: Tensor, rounded: Tensor | None) -> Tensor:
    """Targets of a block but for errors inside it, ``[b, r]``."""
    before = slice(0, block.start)
    if rounded is None:
        return torch.addmm(chunk.weights[block], coefficients, chunk.errors[before])
    pulls = products.rounded_product(coefficients, rounded[before])
    return pulls.add_(chunk.weights[block])
