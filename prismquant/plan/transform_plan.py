"""Places of a recipe's transforms: rotated towers, split columns, smooth edges."""

from __future__ import annotations

from collections.abc import Sequence

from prismquant.algorithms.methods import EQUALIZERS
from prismquant.algorithms.split import Split
from prismquant.errors import ModelError
from prismquant.models.arch import Modality
from prismquant.models.bound import BoundEdge, BoundModel
from prismquant.models.rotation import Rotation, online_rotations
from prismquant.plan.plan import PlanEdge, PlanRow
from prismquant.recipe.layer_config import Options
from prismquant.recipe.match import Match
from prismquant.recipe.schema import Recipe
from prismquant.recipe.transform_rule import ROTATION, SPLIT


def plan_rotations(recipe: Recipe, bound: BoundModel, findings: list[str]) -> tuple[Rotation, ...]:
    """The rotations that are asked for, at most one for each tower."""
    chosen: dict[Modality, Rotation] = {}
    for index, transform in enumerate(recipe.transforms):
        if transform.name != ROTATION:
            continue
        if Modality.PROJECTOR in transform.match.modality:
            findings.append(
                f"transforms[{index}]: the projector is not rotated itself, it follows both of its "
                "neighbours: match vision or llm"
            )
        towers = (Modality.VISION, Modality.LLM)
        for rotation in transform.rotations(towers):
            if rotation.modality in chosen:
                findings.append(
                    f"transforms[{index}]: the {rotation.modality} tower is rotated twice"
                )
            chosen[rotation.modality] = rotation
    try:
        online_rotations(bound, tuple(chosen.values()))
    except ModelError as error:
        findings.append(error.what + (f" ({error.remedy})" if error.remedy else ""))
    return tuple(chosen.values())


def plan_splits(recipe: Recipe, bound: BoundModel) -> dict[str, Split]:
    """Layers of which columns may be split off; a later transform wins."""
    return {
        site.name: transform.split()
        for transform in recipe.transforms
        if transform.name == SPLIT
        for site in bound.sites
        if transform.match.means(site)
    }


def plan_edges(
    recipe: Recipe, bound: BoundModel, rows: Sequence[PlanRow], findings: list[str]
) -> tuple[PlanEdge, ...]:
    """Edges along which scale is moved: those with a reader that matches and is quantized.

    A rotation at run time lies between the two ends of an edge and mixes its channels, so no scale
    passes it.
    """
    quantized = {row.site.name for row in rows if row.quantized}
    mixed = {row.site.name for row in rows if row.online is not None}
    open_edges = [edge for edge in bound.edges if not mixed.intersection(edge.consumers)]
    chosen: list[PlanEdge] = []
    for index, transform in enumerate(recipe.transforms):
        if transform.name not in EQUALIZERS:
            continue
        meant = [edge for edge in open_edges if _reads(edge, bound, quantized, transform.match)]
        if not meant:
            findings.append(
                f"transforms[{index}] ({transform.name}) matches no edge: none ends in a quantized "
                "layer that it means and whose input is not rotated at run time"
            )
        chosen += [PlanEdge(edge, transform.name, Options(transform.options)) for edge in meant]
    return tuple(chosen)


def _reads(edge: BoundEdge, bound: BoundModel, quantized: set[str], match: Match) -> bool:
    sites = [bound.site(name) for name in edge.consumers]
    if any(site.tied for site in sites):
        return False
    return any(site.name in quantized and match.means(site) for site in sites)
