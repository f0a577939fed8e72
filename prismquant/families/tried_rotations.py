"""Rotations of a model's towers, which must not change what it computes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from prismquant.algorithms.rotation import RotatedTower, Rotation
from prismquant.errors import PrismQuantError
from prismquant.families.family_claims import FamilyClaim
from prismquant.families.specimen_run import TOLERANCE, SpecimenRun
from prismquant.models.arch import EdgeKind, Modality
from prismquant.models.bound import BoundEdge, BoundModel
from prismquant.models.load import empty_model, materialize
from prismquant.models.rotated_reader import RotatedReader
from prismquant.models.rotated_towers import edges_of, online_rotations, online_sites, untied
from prismquant.runtime.input_rotation import rotate_inputs

__all__ = ["RotatedPart", "rotated_parts", "rotation_claims"]

RotatedPart = Literal["residual", "values", "online"]
_NAMES: dict[RotatedPart, str] = {
    "residual": "residual stream",
    "values": "values",
    "online": "inputs of the last MLP layers",
}


def rotation_claims(run: SpecimenRun) -> Iterator[FamilyClaim]:
    """That the streams, values and last MLP inputs which the file describes can be rotated."""
    for _, _, claim in rotated_parts(run):
        yield claim
    for modality in _towers(run.bound):
        values = edges_of(run.bound, EdgeKind.VALUE, modality)
        if gated := [replace(edge, gated=False) for edge in values if edge.gated]:
            yield _gate_claim(run, modality, gated)


def rotated_parts(run: SpecimenRun) -> Iterator[tuple[Modality, RotatedPart, FamilyClaim]]:
    """Each part of a tower that the file says can be rotated, and whether it can."""
    bound = run.bound
    for modality in _towers(bound):
        values = list(edges_of(bound, EdgeKind.VALUE, modality))
        parts: dict[RotatedPart, bool] = {
            "residual": any(stream.modality == modality for stream in bound.streams),
            "values": not all(edge.gated for edge in values),
            "online": any(online_sites(bound, _rotated(modality, "online"))),
        }
        for part, described in parts.items():
            if described:
                yield modality, part, _claim(run, modality, part)


def _towers(bound: BoundModel) -> Iterable[Modality]:
    """The modalities of towers with blocks."""
    return dict.fromkeys(step.modality for step in bound.steps if step.kind == "block")


def _rotated(modality: str, part: RotatedPart) -> RotatedTower:
    return RotatedTower(
        modality,
        Rotation(residual=part == "residual", values=part == "values", online=part == "online"),
    )


def _claim(run: SpecimenRun, modality: str, part: RotatedPart) -> FamilyClaim:
    what = f"the {modality} tower's {_NAMES[part]} can be rotated"
    try:
        apart = run.difference(_rotated_model(run.bound, _rotated(modality, part)))
    except PrismQuantError as error:
        return FamilyClaim(what, None, str(error.what))
    said = f"logits differ by {apart:.1e}"
    if part == "values" and apart > TOLERANCE:
        said += "; where a gate multiplies the values of heads, the edge says gated = true"
    return FamilyClaim(what, apart <= TOLERANCE, said)


def _gate_claim(run: SpecimenRun, modality: str, edges: list[BoundEdge]) -> FamilyClaim:
    """That no rotation passes what is said to be gated: else it would be left out for nothing."""
    bound = replace(run.bound, edges=tuple(edges))
    apart = run.difference(_rotated_model(bound, _rotated(modality, "values")))
    said = f"logits would differ by {apart:.1e}"
    if apart <= TOLERANCE:
        said += ", so no gate multiplies them: leave gated out"
    return FamilyClaim(f"a gate multiplies the {modality} tower's values", apart > TOLERANCE, said)


def _rotated_model(bound: BoundModel, tower: RotatedTower) -> nn.Module:
    """The model as it is with one tower rotated."""
    reader = RotatedReader(bound.folder, bound, [tower])
    online = online_rotations(bound, [tower])
    config = copy.deepcopy(bound.config)
    if untied(bound, [tower]):
        config.tie_word_embeddings = False
    model = empty_model(config, bound.arch)
    materialize(model, "", reader, bound.names, "cpu", torch.float32)
    for name, rotation in online.items():
        rotate_inputs(model, name, rotation.block, rotation.signs)
    return model
