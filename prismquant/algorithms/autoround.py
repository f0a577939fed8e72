"""AutoRound: signed gradient descent on rounding offsets and ranges of a block.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent" (arXiv 2309.05516, section 3):
every weight has an offset V in [-1/2, 1/2] that is added before rounding, and every range factors
on its ends. Each iteration moves all of them against the sign of the gradient of the block's output
error; the learning rate falls to zero linearly. With a rate of 1 / iterations the moves of an
offset add up to at most half a step, which is what it takes to reach either neighbouring code.

Differences from the paper: factors begin at the start's scales rather than at the extremes and may
also grow, so scales that a search has found are refined, not forgotten; codes begin at the start's,
and where those lie further than half a step from the weight, the offset's bounds hold them too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from prismquant.algorithms.block_descent import (
    Schedule,
    idle_without_ranges,
    refine,
    schedule_bounds,
)
from prismquant.algorithms.block_problem import BlockProblem, BlockResult
from prismquant.algorithms.latent_weight import Latent
from prismquant.diagnostics.tuning_diagnostics import TuningDiagnostics
from prismquant.errors import check_bounds

if TYPE_CHECKING:
    from collections.abc import Sequence

# How far an offset may go, in steps: to either neighbouring code.
_REACH = 0.5
# A range moves all its codes at once, so it is given time; measured on 2 to 4 bits.
_RANGE_SHARE = 0.4


@dataclass(frozen=True)
class AutoRound:
    """Tunes rounding and ranges by signed gradient descent.

    Attributes:
        iterations: Steps of descent.
        learning_rate: Of the first step, in steps of the grid; ``None`` means ``1 / iterations``.
        range_learning_rate: Of the first step, as a fraction of the range; ``None`` means
            ``0.4 * learning_rate``.
        batch: Recorded calls that an iteration sees.
        learn_range: Tune scales and zero points too, not only the rounding.
        settle: Further steps that move scales only, where these are tuned at all.
        momentum: How much of the gradients before is kept, in [0, 1). The paper has none; it pays
            at 2 and 3 bits.
        seed: Of the order of calls.

    Raises:
        RecipeError: A value is out of bounds.
    """

    name: ClassVar[Literal["autoround"]] = "autoround"
    same_inputs: ClassVar[bool] = False

    iterations: int = 200
    learning_rate: float | None = None
    range_learning_rate: float | None = None
    batch: int = 4
    learn_range: bool = True
    settle: int = 50
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        rates = [
            (name, rate)
            for name in ("learning_rate", "range_learning_rate")
            if (rate := getattr(self, name)) is not None
        ]
        check_bounds(
            self,
            schedule_bounds(self.iterations, self.batch, self.settle, self.seed)
            | {name: (0 < rate <= 1, "above 0, at most 1, or left out") for name, rate in rates}
            | {"momentum": (0 <= self.momentum < 1, "from 0, below 1")},
        )

    @property
    def idle(self) -> dict[str, str]:
        """Options that change nothing as the others stand, and why."""
        return {} if self.learn_range else idle_without_ranges()

    def tune(self, problem: BlockProblem) -> BlockResult:
        """Tune all layers of a block together.

        Args:
            problem: The block.

        Returns:
            Codes and scales, never worse than the start over all calls. With diagnostics.

        Raises:
            NumericsError: The start's loss is not finite.
            FormatError: Outputs, targets and token weights do not fit one another.
        """
        latents = [Latent(layer) for layer in problem.layers]
        rate = 1 / self.iterations if self.learning_rate is None else self.learning_rate
        range_rate = self.range_learning_rate or _RANGE_SHARE * rate
        descent = _SignedDescent(latents, self.momentum, range_rate if self.learn_range else 0.0)
        schedule = Schedule(self.iterations, self.batch, self.seed)
        settle = replace(schedule, iterations=self.settle if self.learn_range else 0)
        known = TuningDiagnostics(self.name, rate)
        return refine(
            problem, latents, schedule, settle, lambda left: descent.step(rate, left), known
        )


class _SignedDescent:
    """Moves every number by the same length against the sign of its gradient.

    Args:
        latents: What to move.
        momentum: How much of the gradients before is kept.
        range_rate: How far the factors of ranges move first; zero leaves them.
    """

    def __init__(self, latents: Sequence[Latent], momentum: float, range_rate: float) -> None:
        self._latents = latents
        self._momentum = momentum
        self._range_rate = range_rate
        # A start further than half a step from the weight must stay within reach.
        self._entries = [latent.offset.clone() for latent in latents]
        self._velocity: dict[int, Tensor] = {}

    def step(self, rate: float, left: float) -> None:
        """Move by the gradients that are there: offsets by ``rate``, all scaled by ``left``."""
        for latent, entry in zip(self._latents, self._entries, strict=True):
            self._move(latent.offset, rate * left)
            latent.offset.clamp_(entry.clamp(max=-_REACH), entry.clamp(min=_REACH))
            if self._range_rate:
                for factor in latent.factors:
                    self._move(factor, self._range_rate * left)
                latent.limit()

    def _move(self, x: Tensor, rate: float) -> None:
        if x.grad is None:
            return
        direction = x.grad
        if self._momentum:
            velocity = self._velocity.setdefault(id(x), torch.zeros_like(x))
            direction = velocity.mul_(self._momentum).add_(direction)
        x.sub_(direction.sign(), alpha=rate)
