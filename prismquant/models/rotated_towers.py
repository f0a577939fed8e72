"""Checkpoints seen as if they had been rotated: same function, no outlier channels.

The residual stream, the values of attention and the input of the last MLP layer can each be
multiplied by an orthogonal matrix, when its inverse goes into whatever reads them (Ashkboos et al.,
QuaRot, 2024, sections 3 and 4). In a rotated basis no channel is much larger than the others, and
weights and activations lose less when they are rounded. The first two rotations live in the weights
alone. The third, behind a nonlinearity, is *online*: the weights hold one half, and whoever runs
the model multiplies the layer's input with the other, as
:class:`~prismquant.formats.online_rotation.OnlineRotation` says.

RMSNorm commutes with any rotation once its scale has moved into its readers. LayerNorm subtracts
the mean over channels as well, and still commutes with a rotation that fixes the vector of ones:
that is what vision towers get, so that every layer keeps its type and the model's own code runs the
result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from prismquant.algorithms.rotation import RotatedTower, Rotation
from prismquant.errors import ModelError, RecipeError
from prismquant.formats.online_rotation import OnlineRotation
from prismquant.models.arch import EdgeKind, Modality
from prismquant.models.bound import BoundEdge, BoundModel, BoundSite
from prismquant.numerics.hadamard import (
    power_of_two_block,
    random_signs,
)

# Checkpoints hold the matrix of each layer: a block of 4096 would take 32 MB a layer.
_WIDEST_BLOCK = 1024


def online_rotations(
    bound: BoundModel, towers: Sequence[RotatedTower]
) -> dict[str, OnlineRotation]:
    """Site name -> what must be done to its input when the rotated model runs.

    Raises:
        RecipeError: Two rotations are for one tower.
        ModelError: A block does not divide a layer's input.
    """
    result: dict[str, OnlineRotation] = {}
    for tower in by_modality(towers).values():
        for site in online_sites(bound, tower):
            folded = not tower.rotation.signs or gated_by(bound, site) is not None
            seed = None if folded else _online_seed(tower.rotation, site)
            block = online_block(tower.rotation, site)
            result[site.name] = OnlineRotation(block, site.in_features, seed)
    return result


def untied(bound: BoundModel, towers: Sequence[RotatedTower]) -> bool:
    """Whether the head stops being the embedding: only the head takes the final norm's scale."""
    return bound.tied and any(
        tower.rotation.residual and tower.modality == Modality.LLM for tower in towers
    )


def by_modality(towers: Sequence[RotatedTower]) -> dict[str, RotatedTower]:
    result: dict[str, RotatedTower] = {}
    for tower in towers:
        if tower.modality in result:
            raise RecipeError(
                f"two rotations for {tower.modality}", remedy="join their options in one"
            )
        result[tower.modality] = tower
    return result


def edges_of(bound: BoundModel, kind: EdgeKind, modality: str) -> Iterator[BoundEdge]:
    for edge in bound.edges:
        if edge.kind is kind and bound.steps[edge.step].modality == modality:
            yield edge


# ------------------------------------------------------------------------------------- online


def online_sites(bound: BoundModel, tower: RotatedTower) -> Iterator[BoundSite]:
    for site in bound.sites:
        if tower.rotation.online and site.online_rotation and site.modality == tower.modality:
            yield site


def online_block(rotation: Rotation, site: BoundSite) -> int:
    widest = min(power_of_two_block(site.in_features), _WIDEST_BLOCK)
    block = rotation.online_block or widest
    if site.in_features % block:
        raise ModelError(
            f"blocks of {block} do not divide the {site.in_features} inputs of {site.name}",
            remedy=f"use an online_block of {power_of_two_block(site.in_features)} at most",
        )
    return block


def online_signs(rotation: Rotation, site: BoundSite) -> Tensor | None:
    seed = _online_seed(rotation, site)
    return random_signs(site.in_features, seed) if rotation.signs else None


def _online_seed(rotation: Rotation, site: BoundSite) -> str:
    return f"{rotation.seed}:{site.name}"


def gated_by(bound: BoundModel, site: BoundSite) -> BoundEdge | None:
    """The edge whose rows can take the signs: only products lie between them and the site."""
    for edge in edges_of(bound, EdgeKind.LINEAR, site.modality):
        if edge.consumers == (site.name,) and edge.size == site.in_features:
            return edge
    return None
