"""Checkpoints seen as if they had been rotated: same function, no outlier channels.

The residual stream, the values of attention and the input of the last MLP layer can each be
multiplied by an orthogonal matrix, when its inverse goes into whatever reads them (Ashkboos et al.,
QuaRot, 2024, sections 3 and 4). In a rotated basis no channel is much larger than the others, and
weights and activations lose less when they are rounded. The first two rotations live in the weights
alone. The third, behind a nonlinearity, is *online*: the weights hold one half, and whoever runs
the model multiplies the layer's input with the other; :class:`OnlineRotation` says how.

RMSNorm commutes with any rotation once its scale has moved into its readers. LayerNorm subtracts
the mean over channels as well, and still commutes with a rotation that fixes the vector of ones:
that is what vision towers get, so that every layer keeps its type and the model's own code runs the
result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from prismquant.errors import ModelError, RecipeError, suggest
from prismquant.models.arch import EdgeKind, Modality
from prismquant.models.bound import BoundEdge, BoundModel, BoundSite
from prismquant.numerics.hadamard import (
    KINDS,
    Kind,
    block_hadamard,
    power_of_two_block,
    random_signs,
)

# Checkpoints hold the matrix of each layer: a block of 4096 would take 32 MB a layer.
_WIDEST_BLOCK = 1024


@dataclass(frozen=True)
class Rotation:
    """Rotation of one tower.

    Attributes:
        modality: ``vision`` or ``llm``.
        residual: Rotate the residual stream.
        values: Rotate each attention head's values.
        online: Rotate the input of every block's last MLP layer, while the model runs.
        online_block: Width of the blocks of the online rotation, a power of two that divides the
            layer's input; None takes the largest up to 1024.
        signs: Random signs beside each Hadamard matrix, so that a constant part of the input does
            not pile up in one channel.
        kind: ``hadamard`` or ``random``; the online rotation is always a Hadamard matrix.
        seed: Of all that is random.

    Raises:
        RecipeError: An option is out of range, or nothing is rotated.
    """

    modality: Modality
    residual: bool = True
    values: bool = True
    online: bool = False
    online_block: int | None = None
    signs: bool = True
    kind: Kind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = (Modality.VISION, Modality.LLM)
        if self.modality not in allowed:
            raise RecipeError(
                f"the {self.modality} modality cannot be rotated",
                remedy="rotate vision or llm; the projector follows both of its neighbours",
            )
        object.__setattr__(self, "modality", Modality(self.modality))
        if self.kind not in KINDS:
            raise RecipeError(f"unknown kind {self.kind!r}", remedy=suggest(self.kind, KINDS))
        if not (self.residual or self.values or self.online):
            raise RecipeError(
                "a rotation of nothing", remedy="set residual, values or online, or leave it out"
            )
        block = self.online_block
        if block is not None and (not self.online or block < 2 or block & (block - 1)):
            raise RecipeError(
                f"online_block {block} needs online: true and a power of two from 2 up",
                remedy="leave it out for the largest block that fits",
            )

    @property
    def idle(self) -> dict[str, str]:
        """Options that change nothing as the others stand, and why."""
        if not (self.residual or self.values):
            return {"kind": "only the online rotation is on, which is always a Hadamard matrix"}
        unsigned = self.kind == "random" and not self.online
        return {"signs": "a random matrix has none"} if unsigned else {}


@dataclass(frozen=True)
class OnlineRotation:
    """Rotation of a layer's input at run time: ``block_hadamard(x * signs, block)``.

    Attributes:
        block: Width of the blocks.
        features: Features of the input.
        seed: Decides the signs; None where there are none, or the layer before has them in its
            weights.
    """

    block: int
    features: int
    seed: str | None = None

    @property
    def signs(self) -> Tensor | None:
        """int8 ``[in]`` of one and minus one; None: not applied at run time."""
        return None if self.seed is None else random_signs(self.features, self.seed)

    def apply(self, x: Tensor) -> Tensor:
        """The rotated input; ``[..., in]`` of any floating dtype."""
        signs = self.signs
        return block_hadamard(x if signs is None else x * signs.to(x), self.block)


def online_rotations(bound: BoundModel, rotations: Sequence[Rotation]) -> dict[str, OnlineRotation]:
    """Site name -> what must be done to its input when the rotated model runs.

    Raises:
        RecipeError: Two rotations are for one tower.
        ModelError: A block does not divide a layer's input.
    """
    result: dict[str, OnlineRotation] = {}
    for rotation in by_modality(rotations).values():
        for site in online_sites(bound, rotation):
            folded = not rotation.signs or gated_by(bound, site) is not None
            seed = None if folded else _online_seed(rotation, site)
            block = online_block(rotation, site)
            result[site.name] = OnlineRotation(block, site.in_features, seed)
    return result


def untied(bound: BoundModel, rotations: Sequence[Rotation]) -> bool:
    """Whether the head stops being the embedding: only the head takes the final norm's scale."""
    return bound.tied and any(
        rotation.residual and rotation.modality is Modality.LLM for rotation in rotations
    )


def by_modality(rotations: Sequence[Rotation]) -> dict[Modality, Rotation]:
    result: dict[Modality, Rotation] = {}
    for rotation in rotations:
        if rotation.modality in result:
            raise RecipeError(
                f"two rotations for {rotation.modality}", remedy="join their options in one"
            )
        result[rotation.modality] = rotation
    return result


def edges_of(bound: BoundModel, kind: EdgeKind, modality: Modality) -> Iterator[BoundEdge]:
    for edge in bound.edges:
        if edge.kind is kind and bound.steps[edge.step].modality is modality:
            yield edge


# ------------------------------------------------------------------------------------- online


def online_sites(bound: BoundModel, rotation: Rotation) -> Iterator[BoundSite]:
    for site in bound.sites:
        if rotation.online and site.online_rotation and site.modality is rotation.modality:
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


def gated_by(bound: BoundModel, site: BoundSite) -> str | None:
    """The layer whose rows can take the signs: only products lie between it and the site."""
    for edge in edges_of(bound, EdgeKind.LINEAR, site.modality):
        if edge.consumers == (site.name,) and edge.size == site.in_features:
            return edge.producer
    return None
