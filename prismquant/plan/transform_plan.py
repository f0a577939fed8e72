"""Places of a recipe's transforms: rotated towers, rotated inputs, kept columns, smooth edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prismquant.algorithms.protocols import Edit
from prismquant.algorithms.rotation import RotatedTower
from prismquant.algorithms.smooth_edge import ScaledEdge
from prismquant.algorithms.split import KeptColumns
from prismquant.errors import PrismQuantError, grouped
from prismquant.models.arch import EdgeKind, Modality
from prismquant.models.bound import BoundEdge, BoundModel
from prismquant.models.rotated_towers import edges_of, online_rotations
from prismquant.plan.plan import OutlierRoom, PlanEdge, PlanRow
from prismquant.recipe.layer_config import Options
from prismquant.recipe.match import Match
from prismquant.recipe.schema import Recipe
from prismquant.recipe.transform_rule import TransformRule


@dataclass(frozen=True)
class PlannedTransform:
    """One transform of a recipe, and where it edits the model.

    Attributes:
        where: Its place in the recipe.
        rule: What the recipe says of it.
        kind: The kind of its edits.
        edits: Where it edits the model.
    """

    where: str
    rule: TransformRule
    kind: type[Edit]
    edits: tuple[Edit, ...]

    @property
    def options(self) -> Options:
        """Its options, as the plan keeps them."""
        return Options(self.rule.options)


def plan_transforms(
    recipe: Recipe, bound: BoundModel, findings: list[str]
) -> tuple[PlannedTransform, ...]:
    """The transforms of a recipe, with all that is known of them without data."""
    planned = []
    for index, rule in enumerate(recipe.transforms):
        try:
            transform = rule.build()
            edits = tuple(transform.plan(bound, rule.match))
        except PrismQuantError as error:
            findings.append(f"transforms[{index}]: {_finding(error)}")
        else:
            planned.append(PlannedTransform(f"transforms[{index}]", rule, transform.edit, edits))
    return tuple(planned)


def rotated_towers(
    planned: Sequence[PlannedTransform], bound: BoundModel, findings: list[str]
) -> tuple[RotatedTower, ...]:
    """The towers that are rotated, each once."""
    chosen: dict[str, RotatedTower] = {}
    for one in planned:
        for tower in one.edits:
            if not isinstance(tower, RotatedTower):
                continue
            if tower.modality in chosen:
                findings.append(f"{one.where}: the {tower.modality} tower is rotated twice")
            chosen[tower.modality] = tower
    towers = tuple(chosen.values())
    try:
        online_rotations(bound, towers)
    except PrismQuantError as error:
        findings.append(_finding(error))
    return towers


def unrotated_values(towers: Sequence[RotatedTower], bound: BoundModel) -> list[str]:
    """Remarks on attention layers whose values a rotation leaves as they are."""
    lines = []
    for tower in towers:
        edges = edges_of(bound, EdgeKind.VALUE, tower.modality)
        gated = [edge.consumers[0] for edge in edges if edge.gated]
        if gated and tower.rotation.values:
            lines += [
                f"{name}: its input is not rotated, for a gate multiplies it" for name in gated
            ]
    return grouped(lines)


def unfit_drafts(
    towers: Sequence[RotatedTower], edges: Sequence[PlanEdge], bound: BoundModel
) -> list[str]:
    """A remark where carried tensors read what is rotated, or a head whose columns are scaled."""
    rotated = any(t.modality == Modality.LLM and t.rotation.residual for t in towers)
    scaled = any(bound.arch.head in edge.edge.consumers for edge in edges)
    if not bound.carried or not (rotated or scaled):
        return []
    what = "the residual stream is rotated" if rotated else "scale is moved into the head"
    return [
        f"{next(iter(bound.carried))} and its like are no part of the model, and {what}: "
        "tokens that they draft will be refused"
    ]


def outlier_rooms(planned: Sequence[PlannedTransform]) -> dict[str, OutlierRoom]:
    """Room for kept columns, by the layer's name; a later transform wins."""
    return {
        edit.layer: OutlierRoom(edit.columns, one.rule.name, one.options)
        for one in planned
        for edit in one.edits
        if isinstance(edit, KeptColumns)
    }


def idle_rooms(planned: Sequence[PlannedTransform], rows: Sequence[PlanRow]) -> list[str]:
    """Transforms that keep columns, and of no layer."""
    roomy = {row.site.name for row in rows if row.outliers is not None}
    return [
        f"{one.where} ({one.rule.name}) matches no layer that is stored quantized"
        for one in planned
        if one.kind is KeptColumns
        and not any(isinstance(e, KeptColumns) and e.layer in roomy for e in one.edits)
    ]


def plan_edges(
    planned: Sequence[PlannedTransform],
    bound: BoundModel,
    rows: Sequence[PlanRow],
    findings: list[str],
) -> tuple[PlanEdge, ...]:
    """Edges along which scale is moved: those with a reader that is meant and quantized.

    A rotation at run time lies between the two ends of an edge and mixes its channels, so no scale
    passes it.
    """
    quantized = {row.site.name for row in rows if row.quantized}
    mixed = {row.site.name for row in rows if row.online is not None}

    def carries(edge: BoundEdge, match: Match) -> bool:
        read = [bound.site(name) for name in edge.consumers if name in quantized]
        return not mixed.intersection(edge.consumers) and any(map(match.means, read))

    chosen: list[PlanEdge] = []
    for one in planned:
        if one.kind is not ScaledEdge:
            continue
        edges = [bound.edges[edit.index] for edit in one.edits if isinstance(edit, ScaledEdge)]
        meant = [edge for edge in edges if carries(edge, one.rule.match)]
        if not meant:
            findings.append(
                f"{one.where} ({one.rule.name}) matches no edge: none ends in a quantized "
                "layer that it means and whose input is not rotated at run time"
            )
        chosen += [PlanEdge(edge, one.rule.name, one.options) for edge in meant]
    return tuple(chosen)


def _finding(error: PrismQuantError) -> str:
    return error.what + (f" ({error.remedy})" if error.remedy else "")
