"""ZeroQuant's layer-by-layer distillation: the float block teaches the quantized one.

Yao et al., "ZeroQuant" (arXiv 2206.01861, section 4.3): one block at a time is trained to give the
output of its float twin, by Adam on latent weights whose rounding gradients pass straight through.
No labels, and no more of the model than one block, are needed. The method's formats (weights in
groups, activations by token) belong to the recipe; this is the training.

Latent weights are kept in steps of their own scale: a learning rate then means the same for every
layer, where an absolute one is too large for one weight and too small for another. Ranges are
factors on those of the start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from prismquant.algorithms.block_descent import (
    ADAM_EPSILON,
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


@dataclass(frozen=True)
class ZeroQuant:
    """Tunes latent weights by Adam.

    Attributes:
        iterations: Steps of descent.
        learning_rate: Of the first step, in steps of the grid; it falls to zero linearly.
        batch: Recorded calls that an iteration sees.
        learn_range: Tune scales and zero points too.
        settle: Further steps that move scales only, where these are tuned at all.
        range_learning_rate: Of the first step, as a fraction of the range.
        seed: Of the order of calls.

    Raises:
        RecipeError: A value is out of bounds.
    """

    name: ClassVar[Literal["zeroquant"]] = "zeroquant"
    same_inputs: ClassVar[bool] = True

    iterations: int = 200
    learning_rate: float = 0.01
    batch: int = 4
    learn_range: bool = True
    settle: int = 50
    range_learning_rate: float = 0.002
    seed: int = 0

    def __post_init__(self) -> None:
        rates = ("learning_rate", "range_learning_rate")
        check_bounds(
            self,
            schedule_bounds(self.iterations, self.batch, self.settle, self.seed)
            | {name: (0 < getattr(self, name) <= 1, "above 0, at most 1") for name in rates},
        )

    @property
    def idle(self) -> dict[str, str]:
        """Options that change nothing as the others stand, and why."""
        return {} if self.learn_range else idle_without_ranges()

    def tune(self, problem: BlockProblem) -> BlockResult:
        """Distil a block.

        Args:
            problem: The block.

        Returns:
            Codes and scales, never worse than the start over all calls.

        Raises:
            NumericsError: The start's loss is not finite.
            FormatError: Outputs, targets and token weights do not fit one another.
        """
        latents = [Latent(layer) for layer in problem.layers]
        adam = torch.optim.Adam(self._parameters(latents), eps=ADAM_EPSILON)
        rates = [float(group["lr"]) for group in adam.param_groups]

        def step(left: float) -> None:
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * left
            adam.step()
            for latent in latents:
                latent.limit()

        schedule = Schedule(self.iterations, self.batch, self.seed)
        settle = replace(schedule, iterations=self.settle if self.learn_range else 0)
        known = TuningDiagnostics(self.name, self.learning_rate)
        return refine(problem, latents, schedule, settle, step, known)

    def _parameters(self, latents: Sequence[Latent]) -> list[dict[str, object]]:
        groups: list[dict[str, object]] = [
            {"params": [latent.offset for latent in latents], "lr": self.learning_rate}
        ]
        if self.learn_range:
            factors = [factor for latent in latents for factor in latent.factors]
            groups.append({"params": factors, "lr": self.range_learning_rate})
        return groups
