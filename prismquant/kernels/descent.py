"""Coordinate descent that only touches what changes, where a compiler is at hand.

See :mod:`prismquant.kernels.cpu_descent`. Where it cannot run, each pass takes two matrix products
for each block of columns instead (:func:`prismquant.kernels.sweep.round_columns`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import pad

from prismquant.kernels.rounding import Rounding

if TYPE_CHECKING:
    from torch import Tensor

    from prismquant.kernels.rounding import Kernel, LossAccumulator, ScaleLines
    from prismquant.numerics.grids import Grid

# Rows whose products lie next to one another: those of one column make a line of the cache.
STRIP = 16


def supports(kernel: Kernel) -> bool:
    """Whether columns can be rounded again where a kernel rounds them first."""
    return kernel == "numba"


def in_strips(lines: Tensor) -> Tensor:
    """Rows cut into strips, the last filled up with zeros.

    Args:
        lines: float32 ``[b, r]``.

    Returns:
        ``[strips, b, 16]``, a view if ``r`` is a multiple of 16.
    """
    missing = -lines.shape[1] % STRIP
    even = pad(lines, (0, missing)) if missing else lines
    return even.view(len(lines), -1, STRIP).transpose(0, 1)


def round_again(
    products: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    scales: ScaleLines,
    grid: Grid,
    errors: Tensor,
    codes: Tensor,
    accumulator: LossAccumulator,
    *,
    column: int,
    final: bool,
) -> None:
    """Round ``b`` columns once more, column k from ``w_k - e_k + (e H)_k / H_kk``.

    Source: QuantEase, Behdin et al., arXiv 2309.01885; keeping the products is ours.

    Args:
        products: ``e H``, float32 ``[strips, n, 16]``, brought up to date.
        weights: float32 ``[b, r]``, lines contiguous, as are those of what follows.
        coefficients: ``H_kj / H_kk``, ``[b, n]``, 1 where ``j = k``.
        scales: Of these columns.
        grid: What to round to.
        errors: ``e``, ``[b, r]``, brought up to date.
        codes: int8 ``[b, r]``, filled.
        accumulator: To be added to; its first costs are ``H_kk``.
        column: The first of these columns.
        final: Whether no other pass follows, so that products of columns done do not matter.
    """
    from prismquant.kernels import cpu_descent

    rows = weights.shape[1]
    by_row = [weights, scales.steps, scales.zeros, errors, codes, accumulator.sums]
    even = rows // STRIP * STRIP
    shared = coefficients, scales.lines, accumulator.costs, Rounding.of(grid), column, final
    if even:
        parts = [None if m is None else m[:, :even] for m in by_row]
        cpu_descent.launch(products, parts, *shared)
    if even < rows:
        # The last rows, with as many of no meaning as fill a strip.
        missing = STRIP - rows + even
        parts = [None if m is None else pad(m[:, even:], (0, missing), value=1.0) for m in by_row]
        cpu_descent.launch(products[even // STRIP :], parts, *shared)
        for whole, part in zip(by_row[3:], parts[3:], strict=True):
            if whole is not None and part is not None:
                whole[:, even:] = part[:, : rows - even]
