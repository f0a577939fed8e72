"""The search for scales: try some, compare the errors, keep the best of each unit.

Every trial is weighed with the scale as it will be stored. Losses are counted in steps of each
trial's scale, so that neither tiny nor huge weights leave float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from prismquant.numerics.affine import scale_zero_point
from prismquant.numerics.grids import IntGrid

if TYPE_CHECKING:
    from prismquant.numerics.grids import Grid
    from prismquant.numerics.rules import RangeRule
    from prismquant.numerics.scales import ScaleFormat

# What four-over-six tries in place of the scale that brings the largest magnitude to 6: that to 4.
_SIX_OVER_FOUR = 1.5
# Pairs are weighed in pieces that stay in the second-level cache; they are whole vectors of any
# processor, in pairs as torch takes them.
_PAIRS_PIECE = 1 << 15
_VECTOR = 64

# (scales [T, *units], zero points or None) -> losses [T, *units], in steps of each scale
LossOf = Callable[[Tensor, Tensor | None], Tensor]
# (scales [T, *units], zero points or None, min-max scale [*units]) -> the first of those trials
# that lose the least, int64 [1, *units]
Choice = Callable[[Tensor, Tensor | None, Tensor], Tensor]


class Look(Protocol):
    """Finds the trials that may be the best of their unit, and rules out all others."""

    def __call__(
        self,
        search: Search,
        values: Tensor,
        importance: Tensor | None,
        scales: Tensor,
        zeros: Tensor | None,
        unit: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Look at trials.

        Args:
            search: The grid, and a norm from 1 on.
            values: float32 ``[units, n]``.
            importance: float32 ``[G, n]`` or ``None``; unit ``u`` has that of row ``u % G``.
            scales: ``[T, units]``.
            zeros: Their zero points, or ``None``.
            unit: The min-max scales, by which losses in steps are compared, ``[units]``.

        Returns:
            Of each unit the first trial that may be the best, int64 ``[units]``; and, where others
            may be as well, marks of all that may, bool ``[units, T]``. Of equal scales only the
            first need be marked.
        """


@dataclass(frozen=True)
class Search:
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
        self, low: Tensor, high: Tensor, choose: Choice, stride: int
    ) -> tuple[Tensor, Tensor | None]:
        """Search coarsely, then around the best, for every unit at once.

        Args:
            low: Lower extremes ``[*units]``.
            high: Upper extremes ``[*units]``.
            choose: Which trial is the best.
            stride: Look at every so-manieth factor first; 1 tries them all.

        Returns:
            Stored scale and zero point ``[*units]``.
        """
        if self.form.coded or self.rule.kind == "four_over_six":
            return self._best_of_few(torch.maximum(-low, high), choose), None
        coarse = self._shaped(self.coarse(stride, low.device), low)
        found, factor = self._pick(low, high, coarse, choose)
        if stride == 1:
            return found
        # What was found leads, so that it wins ties.
        fine = torch.cat([factor, self.around(factor.squeeze(0), stride)])
        found, factor = self._pick(low, high, fine, choose)
        if self.rule.kind == "sweep":
            rest = torch.cat([factor, self._shaped(self._ladder(1, low.device), low)])
            found, _ = self._pick(low, high, rest, choose)
        return found

    def coarse(self, stride: int, device: torch.device) -> Tensor:
        """Factors ``[T]`` to try first. That of the min-max range leads, so that it wins ties."""
        least = torch.ones(1, dtype=torch.float32, device=device)
        return torch.cat([least, self._ladder(stride, device)])

    def around(self, factor: Tensor, stride: int) -> Tensor:
        """The factors that a stride left out beside those chosen ``[*units]``, ``[T, *units]``."""
        reach = torch.arange(1, stride, device=factor.device)
        steps = self._shaped(self.spacing * torch.cat([-reach, reach]), factor)
        return (factor.abs() + steps).clamp(self.bottom, self.top) * factor.sign()

    def _ladder(self, stride: int, device: torch.device) -> Tensor:
        """Factors from the largest down, every so-manieth; then those of negative scales."""
        steps = torch.arange(0, self.rule.steps, stride, device=device)
        factors = self.top - self.spacing * steps
        return torch.cat([factors, -factors]) if self.signed else factors

    @staticmethod
    def _shaped(factors: Tensor, like: Tensor) -> Tensor:
        """Factors ``[T]`` as ``[T, *units]``."""
        return factors.view(-1, *[1] * like.ndim).expand(-1, *like.shape)

    def _pick(
        self, low: Tensor, high: Tensor, factors: Tensor, choose: Choice
    ) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        """Best of factors ``[T, *units]``: scale, zero point; and that factor, ``[1, ...]``."""
        scales, zeros = self.scales(low, high, factors)
        unit, _ = self.scales(low, high, torch.ones((), device=low.device))
        index = choose(scales, zeros, unit)
        zero = None if zeros is None else zeros.gather(0, index).squeeze(0)
        return (scales.gather(0, index).squeeze(0), zero), factors.gather(0, index)

    def _best_of_few(self, magnitude: Tensor, choose: Choice) -> Tensor:
        """Try all the scales that a rule tells apart, largest magnitudes ``[*units]`` given."""
        magnitude = magnitude.to(torch.float32)
        # The min-max scale comes first, so that it wins ties.
        tried = [self.form.of_magnitude(magnitude, self.grid).to(torch.float32)]
        if self.rule.kind == "four_over_six":
            limit = torch.finfo(torch.float32).max
            larger = (magnitude * _SIX_OVER_FOUR).clamp(max=limit)
            tried.append(self.form.of_magnitude(larger, self.grid).to(torch.float32))
        else:
            # Twice the scale, and more, only takes points away where nothing clips.
            top = 2.0 if self.rule.kind == "sweep" else self.top
            tried += self.form.candidates(magnitude, self.grid, top, self.bottom)
        scales = torch.stack(tried)
        index = choose(scales, None, scales[0])
        return self.form.kept(scales.gather(0, index).squeeze(0))

    def by_losses(self, loss_of: LossOf) -> Choice:
        """The choice that weighs every trial."""

        def choose(scales: Tensor, zeros: Tensor | None, unit: Tensor) -> Tensor:
            losses = loss_of(scales, zeros) * self.per_step(scales, unit)
            return _comparable(losses).argmin(dim=0, keepdim=True)

        return choose

    def per_step(self, scales: Tensor, unit: Tensor) -> Tensor:
        """Factors that make losses in steps of scales ``[T, *units]`` comparable.

        The min-max scale ``[*units]`` is the common unit, far from 0 and infinity where a power of
        the scale itself might not be.
        """
        ratio = (scales.to(torch.float32) / unit.to(torch.float32)).abs_()
        # Whole vectors only, as with pairs: a power does not hang on its place.
        flat = pad(ratio.flatten(), (0, -ratio.numel() % _VECTOR), value=1.0)
        return flat.pow_(self.rule.norm)[: ratio.numel()].view(ratio.shape)


def after_a_look(look: Look, search: Search, values: Tensor, importance: Tensor | None) -> Choice:
    """The choice that weighs only trials that a look cannot tell apart, with the same outcome.

    Args:
        look: Finds them.
        search: The grid and the norm.
        values: float32 ``[units, n]``, contiguous.
        importance: ``[G, n]`` or ``None``; unit ``u`` has that of row ``u % G``.
    """

    def choose(scales: Tensor, zeros: Tensor | None, unit: Tensor) -> Tensor:
        flat = scales.reshape(len(scales), -1)
        shifts = None if zeros is None else zeros.reshape(flat.shape)
        best, left = look(search, values, importance, flat, shifts, unit.flatten())
        contested = left.any(1).nonzero().squeeze(1)
        row, trial = left[contested].nonzero(as_tuple=True)
        chosen = contested[row]
        shift = None if shifts is None else shifts[trial, chosen]
        scale = flat[trial, chosen]
        exact = pair_losses_in_steps(values, chosen, scale, shift, search, importance)
        exact *= search.per_step(scale, unit.flatten()[chosen])
        losses = exact.new_full((len(contested), len(flat)), math.inf)
        losses[row, trial] = _comparable(exact)
        # Where all losses are infinite, the first trial wins whether it was left or not.
        best[contested] = losses.argmin(1)
        return best.view(1, *scales.shape[1:])

    return choose


def _comparable(losses: Tensor) -> Tensor:
    return losses.nan_to_num(nan=math.inf, posinf=math.inf)


def losses_in_steps(
    piece: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    search: Search,
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
        zero = None if zeros is None else zeros[t]
        losses.append(_sum_in_steps(error, codes, zero, search, importance))
    return torch.stack(losses)


def pair_losses_in_steps(
    values: Tensor,
    units: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    search: Search,
    importance: Tensor | None,
) -> Tensor:
    """Losses of :func:`losses_in_steps`, bit for bit, for some pairs of a unit and a trial.

    Args:
        values: float32 ``[units, group]``.
        units: Of each pair the unit, int64 ``[pairs]``.
        scales: Of each pair the scale, ``[pairs]``.
        zeros: Of each pair the zero point, or ``None``.
        search: The grid and the norm.
        importance: ``[G, group]`` or ``None``; unit ``n`` has that of row ``n % G``.

    Returns:
        ``[pairs]``.
    """
    # Whole vectors only: what is left over is computed by other code, which may round otherwise.
    count = len(units)
    places = torch.arange(-(-count // _VECTOR) * _VECTOR, device=units.device) % max(count, 1)
    steps = scales.to(torch.float32).unsqueeze(-1)
    size = _VECTOR * max(1, _PAIRS_PIECE // (_VECTOR * values.shape[-1]))
    wide = min(size, len(places)), values.shape[-1]
    buffers = [values.new_empty(wide) for _ in range(3)]
    losses = []
    for part in places.split(size):
        error, scratch, costs = (buffer[: len(part)] for buffer in buffers)
        chosen = units[part]
        torch.index_select(values, 0, chosen, out=error).div_(steps[part])
        zero = None if zeros is None else zeros[part]
        if importance is not None:
            torch.index_select(importance, 0, chosen % len(importance), out=costs)
        used = None if importance is None else costs
        losses.append(_sum_in_steps(error, scratch, zero, search, used))
    return torch.cat(losses)[:count] if losses else scales.new_zeros(0, dtype=torch.float32)


def _sum_in_steps(
    quotients: Tensor, scratch: Tensor, zero: Tensor | None, search: Search, costs: Tensor | None
) -> Tensor:
    """Weighted sums of powers of the rounding error of ``x / scale``, which is overwritten."""
    error_in_steps(quotients, scratch, zero, search.grid)
    _power_(quotients, search.rule.norm)
    if costs is not None:
        quotients.mul_(costs)
    return quotients.sum(-1)


def error_in_steps(x: Tensor, codes: Tensor, zero: Tensor | None, grid: Grid) -> None:
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
