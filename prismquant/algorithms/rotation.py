"""Rotations of towers: in a rotated basis no channel is much larger than the others.

What is rotated, and why nothing is lost, is told in :mod:`prismquant.models.rotated_towers`
(Ashkboos et al., QuaRot, 2024, sections 3 and 4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from prismquant.errors import PlanError, RecipeError, suggest
from prismquant.numerics.hadamard import KINDS, Kind

if TYPE_CHECKING:
    from prismquant.algorithms.model_outline import ModelOutline, Scope

TOWERS = ("vision", "llm")
"""Modalities that can be rotated; a projector follows its neighbours."""


@dataclass(frozen=True)
class RotatedTower:
    """A tower that is seen as if it had been rotated.

    Attributes:
        modality: ``vision`` or ``llm``.
        rotation: What of it is rotated, and how.

    Raises:
        RecipeError: The modality is none that can be rotated.
    """

    modality: str
    rotation: Rotation = field(default_factory=lambda: Rotation())

    def __post_init__(self) -> None:
        if self.modality not in TOWERS:
            raise RecipeError(
                f"the {self.modality} modality cannot be rotated",
                remedy="rotate vision or llm; the projector follows both of its neighbours",
            )
        # Enumerations of models are words of their own kind.
        object.__setattr__(self, "modality", str(self.modality))


@dataclass(frozen=True)
class Rotation:
    """Transform that rotates every tower which is meant.

    Attributes:
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

    name: ClassVar[str] = "rotation"
    edit: ClassVar[type[RotatedTower]] = RotatedTower

    residual: bool = True
    values: bool = True
    online: bool = False
    online_block: int | None = None
    signs: bool = True
    kind: Kind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
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

    def plan(self, model: ModelOutline, scope: Scope) -> list[RotatedTower]:
        """Rotate the towers that are meant.

        Raises:
            PlanError: A part is meant that is no tower.
        """
        for modality in scope.modality:
            if modality not in TOWERS:
                raise PlanError(
                    f"the {modality} is not rotated itself, it follows its neighbours: match "
                    "vision or llm"
                )
        meant = (tower for tower in TOWERS if not scope.modality or tower in scope.modality)
        return [RotatedTower(tower, self) for tower in meant]
