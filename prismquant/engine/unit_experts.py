"""Experts of a unit on its walk: their calls, and what they put out, once for all batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor, nn

from prismquant.engine.expert_calls import RoutedCalls
from prismquant.engine.passes import Passes
from prismquant.models.bound import BoundStep


@dataclass
class UnitExperts:
    """Experts of a unit on its walk.

    Each expert runs once on its tokens of all calls. A unit that is restored runs them the same
    way as one whose experts were solved, so that both hand on the same numbers.

    Attributes:
        step: The unit.
        passes: Gives its passes.
        module: Gives a module by its path.
        as_served: Is entered while experts run.
        given: Experts whose outputs were given to the passes.
    """

    step: BoundStep
    passes: Callable[[], Passes]
    module: Callable[[str], nn.Module]
    as_served: Callable[[], AbstractContextManager[None]]
    given: set[str] = field(default_factory=set)

    def calls(self, name: str, unsolved: Sequence[str] = ()) -> RoutedCalls:
        """Calls of the experts at this path, as the stages before them leave them.

        Args:
            name: Module path.
            unsolved: Layers before them whose weights are going to change.
        """
        return RoutedCalls(self.passes().experts(name, unsolved), self.module(name))

    def give(self, name: str, outputs: Sequence[Tensor]) -> None:
        """Let experts put out these tensors, one a call, in place of running once more."""
        self.given.add(name)
        self.passes().give(name, outputs)

    def run(self) -> None:
        """Run all whose outputs were not given yet."""
        for name in sorted({s.expert.module for s in self.step.sites if s.expert} - self.given):
            routed = self.calls(name)
            with self.as_served():
                self.give(name, routed.run())

    def restart(self) -> None:
        """Forget what was given: the passes have forgotten it."""
        self.given.clear()
