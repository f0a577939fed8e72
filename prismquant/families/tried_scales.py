"""Random scales moved along the smooth edges of a model, which must not change what it computes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

import torch

from prismquant.engine.smoothing import move_scale
from prismquant.families.family_claims import FamilyClaim
from prismquant.families.specimen_run import TOLERANCE, SpecimenRun
from prismquant.models.bound import BoundEdge

__all__ = ["edge_claims", "scale_differences"]

_LARGEST_SCALE = 4.0
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def edge_claims(run: SpecimenRun) -> Iterator[FamilyClaim]:
    """That a scale which leaves a producer arrives at all its consumers, for each smooth edge.

    Equal edges of several blocks are one claim; the worst of them decides. An edge through which
    nothing passes on the way to the logits says nothing, so the producer is also scaled alone: that
    must change them. Such may be the edges of blocks whose output the model does not read.
    """
    named: defaultdict[str, list[BoundEdge]] = defaultdict(list)
    for edge in run.bound.edges:
        readers = dict.fromkeys(_NUMBER.sub("*", name) for name in edge.readers)
        source = _NUMBER.sub("*", edge.source)
        named[f"scale moves from {source} to {', '.join(readers)}"].append(edge)
    for what, edges in named.items():
        found = [scale_differences(run, edge) for edge in edges]
        passed = [(moved, alone) for moved, alone in found if alone > TOLERANCE]
        if not passed:
            yield FamilyClaim(what, None, "nothing of the samples passes it")
            continue
        moved, alone = zip(*passed, strict=True)
        said = f"logits differ by {max(moved):.1e}; by {min(alone):.1e} with half of it"
        if idle := len(found) - len(passed):
            said += f"; nothing passes {idle} of {len(found)}"
        yield FamilyClaim(what, max(moved) <= TOLERANCE, said)


def scale_differences(run: SpecimenRun, edge: BoundEdge) -> tuple[float, float]:
    """Change of the logits by a scale that moves, and by one that leaves and does not arrive.

    Args:
        run: The model; it is as before afterwards.
        edge: Along which a random scale moves.
    """
    draw = torch.Generator().manual_seed(edge.step)
    exponent = 2 * torch.rand(edge.size, generator=draw) - 1
    scale = _LARGEST_SCALE**exponent
    with run.restored([edge.source, *edge.readers]):
        with run.restored(edge.readers):
            move_scale(run.model, edge, scale, torch.float32)
            moved = run.difference()
        return moved, run.difference()
