"""How ranges are chosen: which values a scale must hold, and which it may clip.

Weights are at hand whole, so :func:`weight_scales` reads them directly. Activations pass by in
batches: a :class:`RangeRecord` keeps what is needed of them, and any rule can be asked of it later.
A record is a pure function of the values it has seen: neither the order of batches nor the way in
which partial records were merged changes it by one bit. (The moving average is by its nature the
exception: it weighs later batches more.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from prismquant.errors import FormatError, NumericsError, RecipeError, suggest
from prismquant.numerics.affine import (
    Granularity,
    block_rows,
    check_finite,
    check_group_size,
    extremes,
    scale_zero_point,
    simulate,
    to_groups,
)
from prismquant.numerics.grids import FloatGrid, IntGrid
from prismquant.numerics.scales import (
    AnyScale,
    ScaleFormat,
    ScaleKind,
    as_scale_format,
    global_scale,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prismquant.numerics.grids import Grid

RuleKind = Literal["minmax", "percentile", "mse", "ema", "four_over_six", "sweep"]
# Rules that try scales and compare the errors.
SEARCHES: frozenset[RuleKind] = frozenset({"mse", "four_over_six", "sweep"})
# What four-over-six tries in place of the scale that brings the largest magnitude to 6: that to 4.
_SIX_OVER_FOUR = 1.5

# Bins on each side of zero. The largest magnitude falls in their upper half, so a bin is never
# wider than 1/4096 of it.
_HALF = 1 << 13
# Bins are no narrower than 2^-100: far below, their reciprocal would leave float32.
_MIN_EXPONENT = -100
# The search over shrink factors looks at every fourth first, then at the neighbours of the best.
# That is a third of the work, and over many units the error is within 0.1 % of trying all (4 bits
# and below); where one scale serves a whole tensor a miss would not average out, and all are tried.
_STRIDE = 4
_CPU_PIECE = 1 << 18
_DEVICE_PIECE = 1 << 26
# The search with a Hessian reads a block of it for every piece, which should be worth it.
_COUPLED_PIECE = 1 << 22

# (scales [T, *units], zero points or None) -> losses [T, *units], in steps of each scale
_LossOf = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class RangeRule:
    """How to choose the range of a scale.

    Attributes:
        kind: ``minmax`` holds every value. ``percentile`` clips the outermost values. ``mse``
            searches the range whose quantization error is smallest. ``ema`` averages the extremes
            of batches (activations only). ``four_over_six`` takes for each block of E2M1 weights
            the better of two scales, which bring its largest magnitude to 6 or to 4 (Cook et al.,
            arXiv 2512.02010). ``sweep`` tries every scale that could be best, or all ``steps`` of
            them where scales have 16 bits or more. Both of these go by the squared error.
        percentile: Fraction of values to hold: of the magnitudes when symmetric, on either side
            when asymmetric. In (0.5, 1].
        max_shrink: How far below the extremes the search goes: 0.8 tries ranges down to a fifth.
        steps: Number of ranges the search tells apart, at least 2.
        norm: Exponent of the error that the search minimises; 2 is the mean square, 2.4 minds
            large errors more.
        momentum: Weight of a new batch in the moving average, in (0, 1].
        signed_scale: Let the search give a symmetric weight's scale a sign, so that the grid's
            longer side (-8 where 7 is the highest code) is spent on the heavier side of each unit.

    Raises:
        RecipeError: A value is out of bounds.
    """

    kind: RuleKind = "minmax"
    percentile: float = 0.9999
    max_shrink: float = 0.8
    steps: int = 80
    norm: float = 2.4
    momentum: float = 0.01
    signed_scale: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(RuleKind):
            raise RecipeError(
                f"there is no range rule {self.kind!r}",
                remedy=suggest(str(self.kind), get_args(RuleKind)),
            )
        bounds = {
            "percentile": 0.5 < self.percentile <= 1,
            "max_shrink": 0 <= self.max_shrink < 1,
            "steps": self.steps >= 2 and self.steps == int(self.steps),
            "norm": 0 < self.norm <= 10,
            "momentum": 0 < self.momentum <= 1,
        }
        legal = {
            "percentile": "above 0.5, at most 1",
            "max_shrink": "at least 0, below 1",
            "steps": "a whole number, at least 2",
            "norm": "above 0, at most 10",
            "momentum": "above 0, at most 1",
        }
        for name, fine in bounds.items():
            if not fine:
                raise RecipeError(
                    f"{name} of a range rule cannot be {getattr(self, name)}", remedy=legal[name]
                )


def weight_scales(
    weight: Tensor,
    grid: Grid,
    symmetric: bool,
    granularity: Granularity,
    group_size: int | None,
    rule: RangeRule,
    scale_dtype: AnyScale,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Choose the scales, and the zero points, of a weight.

    ``mse`` tries ranges from the extremes down to ``1 - max_shrink`` of them. (It starts a little
    wider for a symmetric grid with all its integers, where neither sign is clipped, and for a
    floating-point grid, where the extremes come to the foot of the topmost binade.) It weighs each
    trial with the scale as it will be stored, and is never worse than ``minmax`` by its own
    measure:

        sum over the unit of importance * |w - dequantize(quantize(w))|^norm

    Where scales have 8 bits, ``mse`` and ``sweep`` try every one in that range.

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
    search = _Search(grid, symmetric, _measured(rule), form)
    return _search_weight(weight, low, high, granularity, group_size, search, weights)


def check_rule(rule: RangeRule, grid: Grid) -> None:
    """Make sure that a rule makes sense for a grid.

    Args:
        rule: The rule.
        grid: The points of the elements.

    Raises:
        RecipeError: The rule is ``four_over_six`` and the grid is not E2M1.
    """
    if rule.kind == "four_over_six" and grid != FloatGrid("e2m1"):
        raise RecipeError(
            "the rule four_over_six is for E2M1 numbers",
            remedy="use a format of the fp4 family (nvfp4), or another range rule",
        )


def _measured(rule: RangeRule) -> RangeRule:
    """The rule with the norm that its kind goes by."""
    return rule if rule.kind == "mse" else replace(rule, norm=2.0)


@dataclass(frozen=True)
class _Search:
    """The part of a search over shrink factors that does not depend on the data."""

    grid: Grid
    symmetric: bool
    rule: RangeRule
    form: ScaleFormat

    @property
    def signed(self) -> bool:
        """Whether negative scales are worth a trial."""
        grid = self.grid
        lopsided = isinstance(grid, IntGrid) and not grid.narrow
        return self.rule.signed_scale and self.symmetric and lopsided and not self.form.coded

    @property
    def top(self) -> float:
        """The largest factor worth trying, relative to the min-max range."""
        if not self.symmetric:
            return 1.0
        return self.grid.headroom

    @property
    def bottom(self) -> float:
        """The smallest factor to try."""
        return 1.0 - self.rule.max_shrink

    @property
    def spacing(self) -> float:
        """The distance between neighbouring factors."""
        return (self.top - self.bottom) / (self.rule.steps - 1)

    def scales(self, low: Tensor, high: Tensor, factors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stored scales of shrunk ranges; ``factors`` broadcasts to ``[T, *units]``.

        A negative factor gives a negative scale.
        """
        low, high = low.to(torch.float32), high.to(torch.float32)
        limit = torch.finfo(torch.float32).max
        # A factor above 1 may not push the range of huge weights out of float32.
        scale, zero = scale_zero_point(
            (low * factors.abs()).clamp(min=-limit),
            (high * factors.abs()).clamp(max=limit),
            self.grid,
            self.symmetric,
            self.form,
        )
        return torch.where(factors < 0, -scale, scale), zero

    def best(
        self, low: Tensor, high: Tensor, loss_of: _LossOf, stride: int
    ) -> tuple[Tensor, Tensor | None]:
        """Search coarsely, then around the best, for every unit at once.

        Args:
            low: Lower extremes ``[*units]``.
            high: Upper extremes ``[*units]``.
            loss_of: Losses of candidate scales, in steps of each.
            stride: Look at every so-manieth factor first; 1 tries them all.

        Returns:
            Stored scale and zero point ``[*units]``.
        """
        if self.form.coded or self.rule.kind == "four_over_six":
            return self._best_of_few(torch.maximum(-low, high), loss_of), None
        if self.rule.kind == "sweep":
            stride = 1
        shape = (-1,) + (1,) * low.ndim
        ladder = torch.arange(0, self.rule.steps, stride, device=low.device)
        # The min-max range comes first, so that it wins ties.
        coarse = torch.cat([low.new_ones(1, dtype=torch.float32), self.top - self.spacing * ladder])
        if self.signed:
            coarse = torch.cat([coarse, -coarse[1:]])
        coarse = coarse.view(shape)
        scale, zero, loss, factor = self._pick(low, high, coarse.expand(-1, *low.shape), loss_of)
        if stride == 1:
            return scale, zero
        reach = torch.arange(1, stride, device=low.device)
        around = self.spacing * torch.cat([-reach, reach]).view(shape)
        fine = (factor.abs() + around).clamp(self.bottom, self.top) * factor.sign()
        scale_2, zero_2, loss_2, _ = self._pick(low, high, fine, loss_of)
        better = loss_2 < loss
        scale = torch.where(better, scale_2, scale)
        if zero is not None and zero_2 is not None:
            zero = torch.where(better, zero_2, zero)
        return scale, zero

    def _pick(
        self, low: Tensor, high: Tensor, factors: Tensor, loss_of: _LossOf
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The best of factors ``[T, *units]``: scale, zero point, loss and factor of each unit."""
        scales, zeros = self.scales(low, high, factors)
        unit, _ = self.scales(low, high, torch.ones((), device=low.device))
        losses = self._losses(scales, zeros, unit, loss_of)
        index = losses.argmin(dim=0, keepdim=True)

        def chosen(x: Tensor) -> Tensor:
            return x.gather(0, index).squeeze(0)

        zero = None if zeros is None else chosen(zeros)
        return chosen(scales), zero, chosen(losses), chosen(factors)

    def _best_of_few(self, magnitude: Tensor, loss_of: _LossOf) -> Tensor:
        """Try all the scales that a rule tells apart, largest magnitudes ``[*units]`` given."""
        magnitude = magnitude.to(torch.float32)
        # The min-max scale comes first, so that it wins ties.
        tried = [self.form.of_magnitude(magnitude, self.grid).to(torch.float32)]
        if self.rule.kind == "four_over_six":
            limit = torch.finfo(torch.float32).max
            larger = (magnitude * _SIX_OVER_FOUR).clamp(max=limit)
            tried.append(self.form.of_magnitude(larger, self.grid).to(torch.float32))
        else:
            tried += self.form.candidates(magnitude, self.grid, self.top, self.bottom)
        scales = torch.stack(tried)
        losses = self._losses(scales, None, scales[0], loss_of)
        return self.form.kept(scales.gather(0, losses.argmin(0, keepdim=True)).squeeze(0))

    def _losses(
        self, scales: Tensor, zeros: Tensor | None, unit: Tensor, loss_of: _LossOf
    ) -> Tensor:
        """Losses of candidates ``[T, *units]`` that can be compared."""
        # They come in steps of each scale; the min-max scale is the common unit, far from 0 and
        # infinity where a power of the scale itself might not be.
        ratio = (scales.to(torch.float32) / unit.to(torch.float32)).abs_()
        losses = loss_of(scales, zeros) * ratio.pow_(self.rule.norm)
        return losses.nan_to_num(nan=math.inf, posinf=math.inf)


def _search_weight(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    granularity: Granularity,
    group_size: int | None,
    search: _Search,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the search over a weight in pieces of whole rows, so that memory stays bounded."""
    limit = _CPU_PIECE if weight.device.type == "cpu" else _DEVICE_PIECE
    if granularity == Granularity.TENSOR:
        pieces = weight.unsqueeze(-2).split(max(1, limit // weight.shape[-1]))

        def whole(scales: Tensor, zeros: Tensor | None) -> Tensor:
            parts = (_losses(piece, scales, zeros, search, importance) for piece in pieces)
            return torch.stack([part.sum(dim=1, dtype=torch.float64) for part in parts]).sum(0)

        return search.best(low, high, whole, stride=1)
    scales, zeros = [], []
    start = 0
    for piece in _unit_pieces(weight, granularity, group_size, limit):
        costs = _by_unit(importance, piece, granularity, group_size)

        losses = partial(_losses, piece, search=search, importance=costs)
        rows = slice(start, start + len(piece))
        scale, zero = search.best(low[rows], high[rows], losses, _STRIDE)
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


def _losses(
    piece: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    search: _Search,
    importance: Tensor | None,
) -> Tensor:
    """Weighted sums of powers of the error, counted in steps of the scale.

    Args:
        piece: Rows of a weight ``[rows, G, group]``.
        scales: Candidates ``[T, rows, G]``, or ``[T, 1]`` for the whole tensor.
        zeros: Their zero points, or ``None``.
        search: The grid and the norm.
        importance: ``[G, group]`` or ``None``.

    Returns:
        ``[T, rows, G]``.
    """
    values = piece.to(torch.float32)
    error, codes = torch.empty_like(values), torch.empty_like(values)
    losses = []
    for t, step in enumerate(scales.to(torch.float32).unsqueeze(-1)):
        torch.div(values, step, out=error)
        _error_in_steps(error, codes, None if zeros is None else zeros[t], search.grid)
        _power_(error, search.rule.norm)
        if importance is not None:
            error.mul_(importance)
        losses.append(error.sum(-1))
    return torch.stack(losses)


def _error_in_steps(x: Tensor, codes: Tensor, zero: Tensor | None, grid: Grid) -> None:
    """Turn ``x / scale`` into its rounding error, in place; ``codes`` is scratch space."""
    if zero is None:
        grid.rounded(x, out=codes)
    else:
        shift = zero.to(x.dtype).unsqueeze(-1)
        torch.add(x, shift, out=codes)
        grid.round_(codes).sub_(shift)
    x.sub_(codes)


def _power_(x: Tensor, norm: float) -> None:
    """``|x|^norm`` in place; through logarithms, which are several times faster than pow."""
    if norm == 2:
        x.mul_(x)
    else:
        x.abs_().log2_().mul_(norm).exp2_()


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
        rank = _rank(percentile, values.shape[-1])
        if symmetric:
            highs.append(values.abs().kthvalue(rank, dim=-1).values)
            lows.append(-highs[-1])
        else:
            highs.append(values.kthvalue(rank, dim=-1).values)
            lows.append(values.kthvalue(values.shape[-1] + 1 - rank, dim=-1).values)
    return torch.cat(lows), torch.cat(highs)


def _rank(percentile: float, count: int) -> int:
    """The rank, from 1, of the last value to be held."""
    return min(max(math.ceil(percentile * count), 1), count)


class RangeRecord:
    """A running, mergeable record of the values of one activation.

    It keeps the extremes, the number of values, a moving average of each batch's extremes, and a
    histogram. Bins lie on either side of zero, and a bin's width is a power of two: the least that
    lets the largest magnitude so far fit. When a larger one arrives, neighbouring bins are merged
    in pairs, which is exact; so the histogram is always that of all values together.

    Values are counted as float32. Padding must be removed before they come here.

    Args:
        momentum: Weight of a new batch in the moving average, in (0, 1].
    """

    def __init__(self, momentum: float = 0.01) -> None:
        self.momentum = RangeRule(momentum=momentum).momentum
        self._counts = torch.zeros(2 * _HALF, dtype=torch.int64)
        self._exponent = _MIN_EXPONENT
        self._count = 0
        self._low = math.inf
        self._high = -math.inf
        # Sums over batches of momentum * (1 - momentum)^age, of low, high and 1: their quotients
        # are averages from the first batch on, and two records can be joined end to end.
        self._averages = torch.zeros(3, dtype=torch.float64)
        self._batches = 0

    @property
    def count(self) -> int:
        """How many values have been seen."""
        return self._count

    @property
    def low(self) -> float:
        """The smallest value seen; infinite when there was none."""
        return self._low

    @property
    def high(self) -> float:
        """The largest value seen; minus infinity when there was none."""
        return self._high

    @property
    def bin_width(self) -> float:
        """Width of a bin of the histogram: how exact percentile and mse are."""
        return math.ldexp(1.0, self._exponent)

    def update(self, x: Tensor) -> None:
        """Add a batch of values.

        Args:
            x: Any shape, any floating dtype, on any device. An empty tensor changes nothing.

        Raises:
            NumericsError: ``x`` holds NaN or an infinity; the record is unchanged.
        """
        if x.numel() == 0:
            return
        x = x.detach()
        ends = torch.cat(extremes(x, Granularity.TENSOR)).to(torch.float32)
        # float64 may not fit float32: the ends are checked again as they will be counted.
        check_finite(ends, "the range of the activation, in float32,")
        low, high = ends.tolist()
        self._widen(_exponent(max(abs(low), abs(high))))
        self._counts += _histogram(x, self._exponent)
        self._count += x.numel()
        self._low, self._high = min(self._low, low), max(self._high, high)
        batch = torch.tensor([low, high, 1.0], dtype=torch.float64)
        self._averages = self._averages * (1 - self.momentum) + batch * self.momentum
        self._batches += 1

    def merge(self, other: RangeRecord) -> None:
        """Add everything that another record has seen, as if it came after what this one saw.

        Args:
            other: A record with the same momentum; it is left as it is.

        Raises:
            NumericsError: The momenta differ.
        """
        if other.momentum != self.momentum:
            raise NumericsError(
                f"records with momenta {self.momentum} and {other.momentum} cannot be merged"
            )
        self._widen(other._exponent)
        self._counts += _coarsen(other._counts, self._exponent - other._exponent)
        self._count += other._count
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)
        decay = (1 - self.momentum) ** other._batches
        self._averages = self._averages * decay + other._averages
        self._batches += other._batches

    def low_high(self, rule: RangeRule, grid: Grid, symmetric: bool) -> tuple[float, float]:
        """The range that a rule chooses.

        Args:
            rule: Any but ``four_over_six``. ``percentile``, ``mse`` and ``sweep`` are exact to
                within one bin width: the first in the value of the range, the others in the p-norm
                error per value.
            grid: The points and their codes; only ``mse`` and ``sweep`` look at them.
            symmetric: Whether the scale will be; ``percentile``, ``mse`` and ``sweep`` then clip
                both sides at one magnitude.

        Returns:
            ``(low, high)``, to be given to
            :func:`prismquant.numerics.affine.scale_zero_point`.

        Raises:
            NumericsError: Nothing has been recorded.
            RecipeError: The rule is ``ema`` with another momentum than the record's, or is one
                for weights.
        """
        if self._count == 0:
            raise NumericsError(
                "no value has been recorded, so there is no range to choose",
                remedy="check that the calibration data reaches this layer",
            )
        if rule.kind == "minmax":
            return self._low, self._high
        if rule.kind == "ema":
            if rule.momentum != self.momentum:
                raise RecipeError(
                    f"the rule's momentum {rule.momentum} is not the record's {self.momentum}"
                )
            low, high, weight = self._averages.tolist()
            return low / weight, high / weight
        if rule.kind == "percentile":
            return self._percentile(rule.percentile, symmetric)
        if rule.kind == "four_over_six":
            raise RecipeError(
                "the rule four_over_six chooses for each block: it is for weights",
                remedy="use minmax, percentile, mse or ema for activations",
            )
        return self._least_error(_measured(rule), grid, symmetric)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole record as tensors, to be saved and given to :meth:`from_state_dict`."""
        return {
            "counts": self._counts.clone(),
            "exponent": torch.tensor(self._exponent, dtype=torch.int64),
            "extremes": torch.tensor([self._low, self._high], dtype=torch.float64),
            "averages": self._averages.clone(),
            "batches": torch.tensor(self._batches, dtype=torch.int64),
            "momentum": torch.tensor(self.momentum, dtype=torch.float64),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> RangeRecord:
        """Make the record again from :meth:`state_dict`.

        Args:
            state: Exactly the tensors of :meth:`state_dict`.

        Returns:
            An equal record.

        Raises:
            NumericsError: A tensor is missing, unknown, or of the wrong shape.
        """
        fresh = cls().state_dict()
        if set(state) != set(fresh):
            raise NumericsError(
                f"a range record is made of {', '.join(sorted(fresh))}, "
                f"not of {', '.join(sorted(state))}"
            )
        for name, like in fresh.items():
            if state[name].shape != like.shape or state[name].dtype != like.dtype:
                raise NumericsError(
                    f"{name} of a range record must be {like.dtype} {list(like.shape)}, "
                    f"not {state[name].dtype} {list(state[name].shape)}"
                )
        record = cls(float(state["momentum"]))
        record._counts = state["counts"].cpu().clone()
        record._exponent = int(state["exponent"])
        record._low, record._high = state["extremes"].tolist()
        record._averages = state["averages"].cpu().clone()
        record._batches = int(state["batches"])
        record._count = int(record._counts.sum())
        return record

    def _widen(self, exponent: int) -> None:
        """Make bins at least ``2^exponent`` wide."""
        if exponent > self._exponent:
            self._counts = _coarsen(self._counts, exponent - self._exponent)
            self._exponent = exponent

    def _percentile(self, percentile: float, symmetric: bool) -> tuple[float, float]:
        rank = _rank(percentile, self._count)
        if symmetric:
            magnitudes = self._counts[_HALF:] + self._counts[:_HALF].flip(0)
            edge = (_bin_of_rank(magnitudes, rank) + 1) * self.bin_width
            edge = min(edge, max(abs(self._low), abs(self._high)))
            return -edge, edge
        high = (_bin_of_rank(self._counts, rank) + 1 - _HALF) * self.bin_width
        low = -(_bin_of_rank(self._counts.flip(0), rank) + 1 - _HALF) * self.bin_width
        return max(low, self._low), min(high, self._high)

    def _least_error(self, rule: RangeRule, grid: Grid, symmetric: bool) -> tuple[float, float]:
        """Search shrink factors; an asymmetric range is searched end by end, twice."""
        used = self._counts.nonzero().squeeze(-1)
        counts = self._counts[used].to(torch.float64)
        centres = (used.to(torch.float64) + (0.5 - _HALF)) * self.bin_width
        centres = centres.clamp(self._low, self._high)
        search = _Search(grid, symmetric, rule, ScaleFormat(torch.float32))
        ladder = torch.arange(rule.steps, dtype=torch.float64)
        factors = torch.cat([ladder.new_ones(1), search.top - search.spacing * ladder])

        def best(lows: Tensor, highs: Tensor) -> int:
            scales, zeros = scale_zero_point(lows, highs, grid, symmetric, torch.float32)
            steps = scales.to(torch.float64).unsqueeze(-1)
            errors = centres / steps
            _error_in_steps(errors, torch.empty_like(errors), zeros, grid)
            losses = errors.mul_(steps).abs_().div_(self.bin_width).pow_(rule.norm) @ counts
            return int(losses.argmin())

        if symmetric:
            edge = max(abs(self._low), abs(self._high))
            edges = (factors * edge).clamp(max=torch.finfo(torch.float32).max)
            found = float(edges[best(-edges, edges)])
            return -found, found
        low, high = min(self._low, 0.0), max(self._high, 0.0)
        start_low, start_high = low, high
        for _ in range(2):
            highs = factors * start_high
            high = float(highs[best(torch.full_like(highs, low), highs)])
            lows = factors * start_low
            low = float(lows[best(lows, torch.full_like(lows, high))])
        return low, high


def static_scale_zero_point(
    record: RangeRecord,
    rule: RangeRule,
    grid: Grid,
    symmetric: bool,
    scale_dtype: torch.dtype,
    kind: ScaleKind = "float",
) -> tuple[Tensor, Tensor | None, float, float]:
    """What calibration has to find for an activation.

    Args:
        record: Its values.
        rule: How to choose the range. Where only a global scale is looked for, a search has nothing
            to search, and counts as ``minmax``.
        grid: The points and their codes.
        symmetric: Keep zero at code 0.
        scale_dtype: Dtype of a float scale.
        kind: Of the scales: ``float``, or ``e4m3`` (whose block scales are dynamic).

    Returns:
        The static scale ``[1]`` or, for ``e4m3``, the global scale float32 ``[1]``; the zero point
        or ``None``; and the ends of the range.

    Raises:
        NumericsError: Nothing has been recorded.
        RecipeError: The rule does not fit.
        FormatError: The kind has no static scale.
    """
    if kind not in ("float", "e4m3"):
        raise FormatError(f"scales of the kind {kind} are dynamic: there is nothing to calibrate")
    if kind == "e4m3" and rule.kind in SEARCHES:
        rule = replace(rule, kind="minmax")
    low, high = record.low_high(rule, grid, symmetric)
    if kind == "e4m3":
        return global_scale(torch.tensor(max(-low, high)), grid), None, low, high
    ends = torch.tensor([[low], [high]])
    scale, zero = scale_zero_point(ends[0], ends[1], grid, symmetric, scale_dtype)
    return scale, zero, low, high


def _exponent(magnitude: float) -> int:
    """The least exponent whose bins hold a magnitude: ``magnitude < 2^exponent * bins``."""
    if magnitude == 0:
        return _MIN_EXPONENT
    _, power = math.frexp(magnitude)
    return max(power - _HALF.bit_length() + 1, _MIN_EXPONENT)


def _histogram(x: Tensor, exponent: int) -> Tensor:
    """Count values by bin on the tensor's own device; the counts come to the CPU.

    Bins are taken by magnitude and mirrored (the conversion to integers drops the fraction), so
    that scaling by a power of two is exact where it matters: what underflows belongs to the first
    bin on its side anyway.
    """
    counts = torch.zeros(2 * _HALF, dtype=torch.int64, device=x.device)
    limit = _CPU_PIECE if x.device.type == "cpu" else _DEVICE_PIECE
    for piece in x.reshape(-1).split(limit):
        values = piece.to(torch.float32)
        index = (values * math.ldexp(1.0, -exponent)).to(torch.int32)
        index.add_(_HALF).sub_((values < 0).to(torch.int32))
        counts += torch.bincount(index, minlength=2 * _HALF)
    return counts.cpu()


def _coarsen(counts: Tensor, doublings: int) -> Tensor:
    """The histogram of the same values with bins ``2^doublings`` times as wide."""
    if doublings == 0:
        return counts
    magnitude = torch.arange(_HALF) >> min(doublings, 62)
    index = torch.cat([_HALF - 1 - magnitude.flip(0), _HALF + magnitude])
    return torch.zeros_like(counts).index_add_(0, index, counts)


def _bin_of_rank(counts: Tensor, rank: int) -> int:
    """The first bin by which ``rank`` values have been counted."""
    return int(torch.searchsorted(counts.cumsum(0), rank))


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
    search = _Search(grid, symmetric, replace(rule, norm=2.0), as_scale_format(scale_dtype))
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

        return search.best(low, high, whole, stride=1)
    scales, zeros = [], []
    start = 0
    for piece in pieces:
        rows = slice(start, start + (block_rows(len(piece), size) if blocked else len(piece)))
        scale, zero = search.best(low[rows], high[rows], partial(losses, piece), _STRIDE)
        scales.append(scale)
        zeros += [] if zero is None else [zero]
        start = rows.stop
    return torch.cat(scales), torch.cat(zeros) if zeros else None
