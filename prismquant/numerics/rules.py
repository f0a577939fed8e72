"""Range rules: by what measure a scale is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, get_args

from prismquant.errors import RecipeError, check_bounds, suggest

if TYPE_CHECKING:
    from prismquant.numerics.grids import Grid

RuleKind = Literal["minmax", "percentile", "mse", "ema", "four_over_six", "sweep"]
# Rules that try scales and compare the errors.
SEARCHES: frozenset[RuleKind] = frozenset({"mse", "four_over_six", "sweep"})
# Which options each kind goes by; the others go by none.
_USED: dict[RuleKind, tuple[str, ...]] = {
    "percentile": ("percentile",),
    "ema": ("momentum",),
    "mse": ("max_shrink", "steps", "norm", "signed_scale"),
    "sweep": ("max_shrink", "steps", "signed_scale"),
}


@dataclass(frozen=True)
class RangeRule:
    """Rule that chooses the range of a scale.

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
            "percentile": (0.5 < self.percentile <= 1, "above 0.5, at most 1"),
            "max_shrink": (0 <= self.max_shrink < 1, "at least 0, below 1"),
            "steps": (
                2 <= self.steps <= 10_000 and self.steps == int(self.steps),
                "a whole number from 2 to 10000",
            ),
            "norm": (0 < self.norm <= 10, "above 0, at most 10"),
            "momentum": (0 < self.momentum <= 1, "above 0, at most 1"),
        }
        check_bounds(self, bounds)

    @property
    def ordered(self) -> bool:
        """Whether the range depends on the order of batches: ranks cannot share it."""
        return self.kind == "ema"

    @property
    def idle(self) -> dict[str, str]:
        """Options that change nothing with this kind of rule, and why."""
        used = _USED.get(self.kind, ())
        options = [field.name for field in fields(self) if field.name != "kind"]
        return {name: f"the rule is {self.kind}" for name in options if name not in used}


def check_rule(rule: RangeRule, grid: Grid) -> None:
    """Make sure that a rule makes sense for a grid.

    Args:
        rule: The rule.
        grid: The points of the elements.

    Raises:
        RecipeError: The rule is ``four_over_six`` and the grid is not E2M1.
    """
    if rule.kind == "four_over_six" and getattr(grid, "kind", None) != "e2m1":
        raise RecipeError(
            "the rule four_over_six is for E2M1 numbers",
            remedy="use a format of the fp4 family (nvfp4), or another range rule",
        )


def measured(rule: RangeRule) -> RangeRule:
    """The rule with the norm that its kind goes by: two, except for ``mse``."""
    return rule if rule.kind == "mse" else replace(rule, norm=2.0)


def rank_of(percentile: float, count: int) -> int:
    """The rank, from 1, of the last value to be held."""
    return min(max(math.ceil(percentile * count), 1), count)
