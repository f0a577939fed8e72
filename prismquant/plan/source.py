"""The source checkpoint as a plan sees it."""

from __future__ import annotations

from prismquant.models.bound import BoundModel
from prismquant.models.rotated_reader import RotatedReader
from prismquant.plan.plan import Plan
from prismquant.shards import ShardReader


def source_reader(plan: Plan, bound: BoundModel) -> ShardReader:
    """The checkpoint as the run sees it: rotated, where the plan says so."""
    if not plan.towers:
        return bound.shards()
    exact = {f"{row.site.name}.weight" for row in plan.quantized}
    return RotatedReader(bound.folder, bound, plan.towers, exact)
