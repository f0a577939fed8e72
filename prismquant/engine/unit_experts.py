"""Experts of a unit on its walk: their calls, and what they put out, once for all batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from prismquant.engine.expert_calls import RoutedCalls
from prismquant.engine.passes import Passes
from prismquant.engine.streamed_model import StreamedModel
from prismquant.models.bound import BoundStep


@dataclass
class UnitExperts:
    """Experts of a unit on its walk.

    Each expert runs once on its tokens of all calls. A unit that is restored runs them the same
    way as one whose experts were solved, so that both hand on the same numbers.

    Attributes:
        step: The unit.
        passes: Its passes.
        model: The streamed model that it is of.
        given: Experts whose outputs were given to the passes.
    """

    step: BoundStep
    passes: Passes
    model: StreamedModel
    given: set[str] = field(default_factory=set)

    def calls(self, name: str, unsolved: Sequence[str] = ()) -> RoutedCalls:
        """Calls of the experts at this path, as the stages before them leave them.

        Args:
            name: Module path.
            unsolved: Layers before them whose weights are going to change.
        """
        return RoutedCalls(self.passes.experts(name, unsolved), self.model.module(name))

    def give(self, name: str, outputs: Sequence[Tensor]) -> None:
        """Let experts put out these tensors, one a call, in place of running once more."""
        self.given.add(name)
        self.passes.give(name, outputs)

    def run(self) -> None:
        """Run all whose outputs were not given yet."""
        for name in sorted({s.expert.module for s in self.step.sites if s.expert} - self.given):
            routed = self.calls(name)
            with self.model.as_served(self.step):
                self.give(name, routed.run())

    def restart(self) -> None:
        """Forget what was given: the passes have forgotten it."""
        self.given.clear()
