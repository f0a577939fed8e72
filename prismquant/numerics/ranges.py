"""Ranges of weights: the values that a scale must hold, and those that it may clip.

Weights are at hand whole, so :func:`weight_scales` reads them directly. Activations pass by in
batches: see :mod:`prismquant.statistics.input_range`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import NumericsError, RecipeError
from prismquant.numerics.affine import extremes, scale_zero_point, simulate
from prismquant.numerics.finite import check_finite
from prismquant.numerics.grouping import to_groups
from prismquant.numerics.kinds import Granularity, block_rows, check_group_size
from prismquant.numerics.rules import SEARCHES, RangeRule, RuleKind, check_rule, measured, rank_of
from prismquant.numerics.scale_search import Search, after_a_look, losses_in_steps
from prismquant.numerics.scales import AnyScale, as_scale_format

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prismquant.numerics.grids import Grid
    from prismquant.numerics.scale_search import Look

__all__ = [
    "SEARCHES",
    "RangeRule",
    "RuleKind",
    "check_rule",
    "coupled_weight_scales",
    "weight_scales",
]

# The search over shrink factors looks at every fourth first, then at the neighbours of the best.
# That is a third of the work, and over many units the error is within 0.1 % of trying all (4 bits
# and below); where one scale serves a whole tensor a miss would not average out, and all are tried.
_STRIDE = 4
_CPU_PIECE = 1 << 18
_DEVICE_PIECE = 1 << 26
# A look reads values once: pieces need not stay in the cache, but scales of their trials should.
_LOOKED_AT_PIECE = 1 << 20
# The search with a Hessian reads a block of it for every piece, which should be worth it.
_COUPLED_PIECE = 1 << 22


def weight_scales(
    weight: Tensor,
    grid: Grid,
    symmetric: bool,
    granularity: Granularity,
    group_size: int | None,
    rule: RangeRule,
    scale_dtype: AnyScale,
    importance: Tensor | None = None,
    *,
    look: Look | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Choose the scales, and the zero points, of a weight.

    ``mse`` tries ranges from the extremes down to ``1 - max_shrink`` of them. (It starts a little
    wider for a symmetric grid with all its integers, where neither sign is clipped, and for a
    floating-point grid, where the extremes come to the foot of the topmost binade.) It weighs each
    trial with the scale as it will be stored, and is never worse than ``minmax`` by its own
    measure:

        sum over the unit of importance * |w - dequantize(quantize(w))|^norm

    Where scales have 8 bits, ``mse`` tries every one in that range, and ``sweep`` also larger ones,
    up to twice that of the extremes.

    Args:
        weight: ``[out, in]``, any floating dtype.
        grid: The points and their codes.
        symmetric: Keep zero at code 0.
        granularity: tensor, channel, group or block.
        group_size: For group and block granularity.
        rule: Any but ``ema``.
        scale_dtype: How the scale is stored.
        importance: ``[in]``, not negative: how much an error in each input feature matters, e.g.
            the diagonal of the Hessian. Only the rules that search use it.
        look: Rules out trials before the others are weighed, see
            :func:`prismquant.kernels.range_search.weight_scales`; what is chosen is the same.

    Returns:
        Scale and zero point as :func:`prismquant.numerics.affine.scale_zero_point` gives them.

    Raises:
        RecipeError: The rule is ``ema``, or ``four_over_six`` and the grid is not E2M1.
        NumericsError: The weight or the importance is not finite, or the importance is negative or
            of the wrong shape.
        FormatError: The group size does not divide.
    """
    if rule.kind == "ema":
        raise RecipeError(
            "a weight has no batches to average over: the ema rule is for activations",
            remedy="use minmax, percentile or mse for weights",
        )
    check_rule(rule, grid)
    form = as_scale_format(scale_dtype)
    low, high = extremes(weight, granularity, group_size)
    if rule.kind == "minmax" or weight.numel() == 0:
        return scale_zero_point(low, high, grid, symmetric, form)
    if rule.kind == "percentile":
        low, high = _weight_percentiles(weight, symmetric, granularity, group_size, rule.percentile)
        return scale_zero_point(low, high, grid, symmetric, form)
    weights = None if importance is None else _checked_importance(importance, weight.shape[-1])
    search = Search(grid, symmetric, measured(rule), form)
    return _search_weight(weight, low, high, granularity, group_size, search, weights, look)


def _search_weight(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    granularity: Granularity,
    group_size: int | None,
    search: Search,
    importance: Tensor | None,
    look: Look | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the search over a weight in pieces of whole rows, so that memory stays bounded."""
    limit = _CPU_PIECE if weight.device.type == "cpu" else _DEVICE_PIECE
    if granularity == Granularity.TENSOR:
        pieces = weight.unsqueeze(-2).split(max(1, limit // weight.shape[-1]))

        def whole(scales: Tensor, zeros: Tensor | None) -> Tensor:
            parts = (losses_in_steps(piece, scales, zeros, search, importance) for piece in pieces)
            return torch.stack([part.sum(dim=1, dtype=torch.float64) for part in parts]).sum(0)

        return search.best(low, high, search.by_losses(whole), stride=1)
    # Below a norm of 1, losses are not norms, which bounds build upon.
    if search.rule.norm < 1:
        look = None
    limit = limit if look is None else _LOOKED_AT_PIECE
    scales, zeros = [], []
    start = 0
    for piece in _unit_pieces(weight, granularity, group_size, limit):
        costs = _by_unit(importance, piece, granularity, group_size)
        rows = slice(start, start + len(piece))
        if look is None:
            losses = partial(losses_in_steps, piece, search=search, importance=costs)
            choose = search.by_losses(losses)
        else:
            values = piece.to(torch.float32).reshape(-1, piece.shape[-1])
            choose = after_a_look(look, search, values, costs)
        scale, zero = search.best(low[rows], high[rows], choose, _STRIDE)
        scales.append(scale)
        zeros += [] if zero is None else [zero]
        start = rows.stop
    return torch.cat(scales), torch.cat(zeros) if zeros else None


def _unit_pieces(
    weight: Tensor, granularity: Granularity, group_size: int | None, limit: int
) -> Iterator[Tensor]:
    """Cut a weight into pieces ``[scale rows, G, values of one scale]`` of about ``limit`` values.

    Blocks that are cut off come last, in a piece of their own.
    """
    rows, features = weight.shape
    if granularity != Granularity.BLOCK:
        groups = to_groups(weight, granularity, group_size)
        yield from groups.split(max(1, limit // features))
        return
    size = check_group_size(features, group_size)
    full = rows // size * size
    if full:
        height = size * max(1, limit // (features * size))
        for part in weight[:full].split(height):
            yield to_groups(part, granularity, size)
    if full < rows:
        squares = weight[full:].reshape(1, rows - full, features // size, size).transpose(1, 2)
        yield squares.flatten(2)


def _by_unit(
    importance: Tensor | None, piece: Tensor, granularity: Granularity, group_size: int | None
) -> Tensor | None:
    """Importance ``[in]`` of the values that share a scale, ``[G, values]``."""
    if importance is None:
        return None
    groups, values = piece.shape[-2:]
    if granularity != Granularity.BLOCK:
        return importance.view(groups, values)
    size = check_group_size(len(importance), group_size)
    wide = importance.view(groups, 1, size).expand(groups, values // size, size)
    return wide.reshape(groups, values)


def _checked_importance(importance: Tensor, features: int) -> Tensor:
    if tuple(importance.shape) != (features,):
        raise NumericsError(
            f"importance must have shape [{features}], not {list(importance.shape)}"
        )
    check_finite(importance, "the importance")
    values = importance.to(torch.float32)
    if bool((values < 0).any()):
        raise NumericsError(f"importance must not be negative, found {float(values.min())}")
    return values


def _weight_percentiles(
    weight: Tensor,
    symmetric: bool,
    granularity: Granularity,
    group_size: int | None,
    percentile: float,
) -> tuple[Tensor, Tensor]:
    """Range of the values by rank: the ``ceil(p n)``-th smallest, counted from either side."""
    limit = _CPU_PIECE if weight.device.type == "cpu" else _DEVICE_PIECE
    lows, highs = [], []
    whole = granularity == Granularity.TENSOR
    pieces = (
        [to_groups(weight, granularity)]
        if whole
        else _unit_pieces(weight, granularity, group_size, limit)
    )
    for piece in pieces:
        values = piece.to(torch.float32)
        rank = rank_of(percentile, values.shape[-1])
        if symmetric:
            highs.append(values.abs().kthvalue(rank, dim=-1).values)
            lows.append(-highs[-1])
        else:
            highs.append(values.kthvalue(rank, dim=-1).values)
            lows.append(values.kthvalue(values.shape[-1] + 1 - rank, dim=-1).values)
    return torch.cat(lows), torch.cat(highs)


def coupled_weight_scales(
    weight: Tensor,
    grid: Grid,
    symmetric: bool,
    granularity: Granularity,
    group_size: int | None,
    rule: RangeRule,
    scale_dtype: AnyScale,
    hessian: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Choose the scales of a weight by what its errors do together.

    Like :func:`weight_scales`, but rules that search minimise, for every unit, the error of what
    the unit puts out (AWQ's search for clips, Lin et al., arXiv 2306.00978, section 3.2):

        e H e^T,    e = w - dequantize(quantize(w)) of the unit, H its block of the Hessian

    The norm of the rule is not used, it is 2 by nature; other rules do not look at the Hessian. A
    trial costs a product with the block: ``group_size`` times a pass over the weight.

    Args:
        weight: ``[out, in]``, any floating dtype.
        grid: The points and their codes.
        symmetric: Keep zero at code 0.
        granularity: tensor, channel, group or block.
        group_size: For group and block granularity.
        rule: Any but ``ema``.
        scale_dtype: How the scale is stored.
        hessian: ``[in, in]``, symmetric and positive semidefinite.

    Returns:
        Scale and zero point as :func:`prismquant.numerics.affine.scale_zero_point` gives them.

    Raises:
        RecipeError: The rule is ``ema``, or ``four_over_six`` and the grid is not E2M1.
        NumericsError: The weight or the Hessian is not finite, or the Hessian has the wrong shape.
        FormatError: The group size does not divide.
    """
    unit = (granularity, group_size)
    check_rule(rule, grid)
    if rule.kind not in SEARCHES or weight.numel() == 0:
        return weight_scales(weight, grid, symmetric, *unit, rule, scale_dtype)
    features = weight.shape[-1]
    if tuple(hessian.shape) != (features, features):
        raise NumericsError(
            f"the Hessian must have shape [{features}, {features}], not {list(hessian.shape)}"
        )
    check_finite(hessian, "the Hessian")
    low, high = extremes(weight, *unit)
    search = Search(grid, symmetric, replace(rule, norm=2.0), as_scale_format(scale_dtype))
    size = check_group_size(features, group_size) if granularity.grouped else features
    starts = range(0, features, size)
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in starts])
    # Only ratios matter; as they are, the numbers could overflow.
    blocks = blocks.to(weight.device, torch.float32)
    blocks = blocks / blocks.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)

    blocked = granularity == Granularity.BLOCK

    def losses(piece: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        found = []
        for t, scale in enumerate(scales):
            zero = None if zeros is None else zeros[t]
            error = piece - simulate(piece, scale, zero, grid, *unit)
            steps = error.reshape(len(piece), -1, size) / scale.to(torch.float32).unsqueeze(-1)
            steps = steps.transpose(0, 1)
            # A positive semidefinite form can only come out negative by rounding.
            loss = (steps @ blocks).mul_(steps).sum(-1).T.clamp_min_(0.0)
            found.append(loss.sum(0, keepdim=True) if blocked else loss)
        return torch.stack(found)

    limit = _COUPLED_PIECE if weight.device.type == "cpu" else _DEVICE_PIECE
    pieces = weight.to(torch.float32).split(size if blocked else max(1, limit // features))
    if granularity == Granularity.TENSOR:

        def whole(scales: Tensor, zeros: Tensor | None) -> Tensor:
            parts = (losses(piece, scales, zeros) for piece in pieces)
            return torch.stack([part.sum(dim=1, dtype=torch.float64) for part in parts]).sum(0)

        return search.best(low, high, search.by_losses(whole), stride=1)
    scales, zeros = [], []
    start = 0
    for piece in pieces:
        rows = slice(start, start + (block_rows(len(piece), size) if blocked else len(piece)))
        scale, zero = search.best(
            low[rows], high[rows], search.by_losses(partial(losses, piece)), _STRIDE
        )
        scales.append(scale)
        zeros += [] if zero is None else [zero]
        start = rows.stop
    return torch.cat(scales), torch.cat(zeros) if zeros else None
