"""The engine's run of a model, unit by unit, beside the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from prismquant.data.batches import Batch
from prismquant.engine.visit import Visit
from prismquant.engine.walk import ModelWalk
from prismquant.errors import PrismQuantError
from prismquant.families.family_claims import FamilyClaim
from prismquant.families.specimen_run import TOLERANCE, SpecimenRun, largest_difference
from prismquant.models.bound import BoundModel

__all__ = ["replay_claims", "walked_logits"]


def replay_claims(run: SpecimenRun, refused: Mapping[str, str]) -> Iterator[FamilyClaim]:
    """That every unit sees what the model would show it, for each kind of sample.

    Args:
        run: The model.
        refused: Kinds that the model's own code does not take, with what it says.
    """
    for kind, batch in run.batches.items():
        what = f"units are run as by the model itself: {kind}"
        try:
            logits = walked_logits(run.bound, batch)
        except PrismQuantError as error:
            yield FamilyClaim(what, False, str(error.what))
            continue
        apart = largest_difference(logits, run.logits[kind])
        yield FamilyClaim(what, apart <= TOLERANCE, f"logits differ by {apart:.1e}")
    for kind, said in refused.items():
        what = f"units are run as by the model itself: {kind}"
        yield FamilyClaim(what, None, f"the model's own code refuses it: {said}")


@torch.no_grad()
def walked_logits(bound: BoundModel, batch: Batch) -> Tensor:
    """Logits of a batch where tokens count, by a walk that changes nothing."""
    walk = ModelWalk(bound, bound.shards(), [batch], visit=Visit(layers=(bound.arch.head,)))
    found: list[Tensor] = []
    for unit in walk.units():
        with unit.loaded():
            if unit.step.kind == "head":
                found += [unit.module(*call.args, **call.kwargs) for call in unit.calls()]
            unit.advance()
    return torch.cat([logits[batch.attended] for logits in found])
