"""Inputs of single layers of a unit, also of experts', which see some tokens of each call."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

from prismquant.engine.expert_calls import RoutedCalls, middle
from prismquant.engine.passes import Inputs
from prismquant.engine.walk import Unit
from prismquant.models.bound import BoundSite, ExpertPlace
from prismquant.models.experts import LAST

if TYPE_CHECKING:
    from prismquant.models.experts import Expert


def inputs_of_layers(unit: Unit, layers: Sequence[str], of_all: Collection[str] = ()) -> Inputs:
    """Inputs of layers as they are by now, in passes that nothing else uses.

    Layers of experts come one expert at a time, each with its tokens of all calls.

    Args:
        unit: The unit; data flow.
        layers: Their names.
        of_all: Those of them that stand for all experts of their block, and are shown the tokens of
            all.
    """
    alone = [name for name in layers if unit.walk.bound.site(name).expert is not None]
    shared = [name for name in layers if name not in alone]
    plain = unit.first_inputs(shared) if shared else ()
    return itertools.chain(plain, _inputs_of_experts(unit, alone, of_all))


def _inputs_of_experts(unit: Unit, layers: Sequence[str], of_all: Collection[str]) -> Inputs:
    """Inputs of experts' layers as they are by now, one expert at a time, of all calls at once.

    Args:
        unit: The unit; data flow.
        layers: Their names; what none of the tokens was sent to is passed over.
        of_all: Those of the layers that stand for all experts of their block, and are shown the
            tokens of all.
    """
    sites = [unit.walk.bound.site(name) for name in layers]
    for module in dict.fromkeys(site.expert.module for site in sites if site.expert):
        calls = unit.main.passes(unit.step).experts(module)
        routed = RoutedCalls(calls, unit.main.module(module))
        whole = [site.name for site in sites if site.name in of_all and _in(site, module)]
        if whole:
            seen = routed.all_tokens()
            yield seen.call, dict.fromkeys(whole, seen.hidden)
        for number, expert in enumerate(routed.experts):
            place = ExpertPlace(module, number)
            own = [s.name for s in sites if s.expert == place and s.name not in of_all]
            given = routed.input(number)
            if not own or not len(given.hidden):
                continue
            with unit.as_served():
                inner = middle(cast("Expert", expert), given.hidden)
            reads = {name: inner if name.endswith(f".{LAST}") else given.hidden for name in own}
            yield given.call, reads


def _in(site: BoundSite, module: str) -> bool:
    return site.expert is not None and site.expert.module == module
