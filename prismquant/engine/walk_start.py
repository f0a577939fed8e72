"""A place in a walk, with the states there, from which other walks over the same batches begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prismquant.engine.replay import Replay
from prismquant.models.bound import BoundStep


@dataclass(frozen=True, eq=False)
class WalkStart:
    """A place in a walk, with the states there.

    A walk that begins here gives the numbers of one that begins in front, if it would have changed
    nothing of the units before.

    Attributes:
        step: The unit that comes next.
        order: Units before the language model in the order of the walk.
        replay: States of calibration batches; they go on from a fork of it.
        followers: States of followers.
    """

    step: BoundStep
    order: Sequence[BoundStep]
    replay: Replay
    followers: Replay


def steps_from(start: WalkStart | None, steps: Sequence[BoundStep]) -> Sequence[BoundStep]:
    """The steps from that of a start on; all, where it is none of them."""
    if start is None or start.step not in steps:
        return steps
    return steps[steps.index(start.step) :]
