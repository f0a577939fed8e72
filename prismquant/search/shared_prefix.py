"""Units that several trials run alike, which only the first of them runs.

A trial changes nothing before the first unit that its plan touches: it quantizes a layer there,
moves scale, or reads rotated weights. Up to that unit its states are those of any other trial on
the same samples that has not changed anything before it either, bit for bit, and need not be
computed again: all of a vision tower, where the language model alone is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping

from prismquant.engine.walk import Unit
from prismquant.engine.walk_start import WalkStart
from prismquant.models.arch import Modality
from prismquant.models.bound import BoundModel
from prismquant.plan.plan import Plan

_EMBEDDINGS = -1


def touched_steps(plan: Plan, bound: BoundModel) -> frozenset[int]:
    """Indices of the units that a plan changes in any way; -1 stands for the embeddings.

    Args:
        plan: The plan.
        bound: The model.
    """
    found = {row.site.step for row in plan.quantized} | {one.edge.step for one in plan.edges}
    found |= set() if plan.kv_cache is None else {one.step for one in plan.kv_cache.layers}
    rotated = {tower.modality for tower in plan.towers}
    if rotated:
        # The projectors write to a rotated language model.
        spared = {Modality.VISION} if rotated == {Modality.LLM} else set()
        found |= {step.index for step in bound.steps if step.modality not in spared}
        found.add(_EMBEDDINGS)
    return frozenset(found)


class SharedPrefix:
    """States before the first unit that a trial touches, for trials on the same samples.

    Args:
        touched: Indices of the units that each trial changes, by the trial's name.
    """

    def __init__(self, touched: Mapping[str, frozenset[int]]) -> None:
        self._left = dict(touched)
        self._starts: dict[str, WalkStart] = {}

    def begin(self, name: str) -> WalkStart | None:
        """Give the place where a trial's walk may begin, once; None: in front."""
        return self._starts.pop(name, None)

    def look(self, name: str, unit: Unit) -> None:
        """Keep the states before a unit for trials to come that touch it first.

        Args:
            name: Of the trial whose walk comes to the unit.
            unit: The unit; nothing was done to it so far.
        """
        if not unit.flows:
            return
        before = _steps_before(unit)
        if before & self._left.get(name, before):
            return
        waiting = [
            other
            for other, touched in self._left.items()
            if other not in {name, *self._starts}
            and unit.step.index in touched
            and not before & touched
        ]
        if waiting:
            self._starts |= dict.fromkeys(waiting, unit.start())

    def end(self, name: str) -> None:
        """A trial has ended: no states are kept for it."""
        self._left.pop(name, None)


def _steps_before(unit: Unit) -> frozenset[int]:
    """Indices of all that may shape the states before a unit."""
    order, steps = unit.walk.order, unit.walk.bound.steps
    if unit.step.modality is not Modality.LLM:
        return frozenset(step.index for step in order[: order.index(unit.step)])
    earlier = (s for s in steps if s.modality is not Modality.LLM or s.index < unit.step.index)
    return frozenset({_EMBEDDINGS, *(step.index for step in earlier)})
