"""Stages of a unit: which of its layers are taken together, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

from prismquant.models.bound import BoundSite

Stage = tuple[BoundSite, ...]


def stages_of(layers: Sequence[BoundSite], *, stagewise: bool) -> tuple[Stage, ...]:
    """Layers in the order in which their unit runs them.

    All layers of all experts make one stage: an expert is taken from its first layer to its last.

    Args:
        layers: Of a unit.
        stagewise: Else all are taken at once, before any of them has changed; the experts come
            first, as they are run one by one.
    """
    experts = [site for site in layers if site.expert is not None]
    first = min((site.stage for site in experts), default=0)
    stages: dict[int, list[BoundSite]] = {}
    for site in layers:
        number = site.stage if site.expert is None else first
        stages.setdefault(number if stagewise else int(site.expert is None), []).append(site)
    return tuple(tuple(stages[number]) for number in sorted(stages))


def has_one_input(stage: Stage) -> bool:
    """Whether passes can halt at a stage: its layers read one tensor, or are experts."""
    if stage[0].expert is not None:
        return len({site.expert.module for site in stage if site.expert}) == 1
    return len({site.input_key for site in stage}) == 1
