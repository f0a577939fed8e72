"""Record of an activation's values, of which any range rule can be asked later.

Activations pass by in batches: a :class:`InputRange` keeps what is needed of them. It is a pure
function of the values it has seen: neither the order of batches nor the way in which partial
records were merged changes it by one bit. (The moving average is by its nature the exception: it
weighs later batches more.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError, NumericsError, RecipeError
from prismquant.numerics.affine import extremes, scale_zero_point
from prismquant.numerics.finite import check_finite
from prismquant.numerics.kinds import Granularity, ScaleKind
from prismquant.numerics.rules import SEARCHES, RangeRule, measured, rank_of
from prismquant.numerics.scale_search import Search, error_in_steps
from prismquant.numerics.scales import ScaleFormat, global_scale

if TYPE_CHECKING:
    from prismquant.distributed import Ranks
    from prismquant.numerics.grids import Grid

# Bins on each side of zero. The largest magnitude falls in their upper half, so a bin is never
# wider than 1/4096 of it.
_HALF = 1 << 13
# Bins are no narrower than 2^-100: far below, their reciprocal would leave float32.
_MIN_EXPONENT = -100
_CPU_PIECE = 1 << 18
_DEVICE_PIECE = 1 << 26


class InputRange:
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
        """Number of values seen."""
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

    def merge(self, other: InputRange) -> None:
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

    def share(self, ranks: Ranks) -> None:
        """Add the values that the other processes have seen; each of them calls this."""
        if ranks.size == 1:
            return
        first, *others = map(self.from_state_dict, ranks.gather(self.state_dict()))
        for other in others:
            first.merge(other)
        vars(self).update(vars(first))

    def result(self, rule: RangeRule, grid: Grid, symmetric: bool) -> tuple[float, float]:
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
        return self._least_error(measured(rule), grid, symmetric)

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
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> InputRange:
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
        rank = rank_of(percentile, self._count)
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
        search = Search(grid, symmetric, rule, ScaleFormat(torch.float32))
        ladder = torch.arange(rule.steps, dtype=torch.float64)
        factors = torch.cat([ladder.new_ones(1), search.top - search.spacing * ladder])

        def best(lows: Tensor, highs: Tensor) -> int:
            scales, zeros = scale_zero_point(lows, highs, grid, symmetric, torch.float32)
            steps = scales.to(torch.float64).unsqueeze(-1)
            errors = centres / steps
            error_in_steps(errors, torch.empty_like(errors), zeros, grid)
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
    record: InputRange,
    rule: RangeRule,
    grid: Grid,
    symmetric: bool,
    scale_dtype: torch.dtype,
    kind: ScaleKind = "float",
) -> tuple[Tensor, Tensor | None, float, float]:
    """Static scale of an activation, as calibration finds it.

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
    low, high = record.result(rule, grid, symmetric)
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
