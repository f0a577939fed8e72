"""One transform of a recipe: a change of the model before anything is rounded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from prismquant.algorithms.methods import (
    EQUALIZERS,
    build_equalizer,
    checked_options,
    refuse_idle,
)
from prismquant.algorithms.split import Split
from prismquant.errors import PrismQuantError, suggest
from prismquant.models.arch import Modality
from prismquant.recipe.field_checks import as_finding
from prismquant.recipe.match import Match, Strict

if TYPE_CHECKING:
    from prismquant.models.rotation import Rotation

Fields = dict[str, Any]

ROTATION, SPLIT = "rotation", "split"
TRANSFORMS = (ROTATION, SPLIT, *EQUALIZERS)


class TransformRule(Strict):
    """A change of the model that leaves its float function as it is.

    Attributes:
        name: ``rotation``, ``split``, ``smoothquant`` or ``awq``.
        match: Where; a rotation takes whole towers, so it only asks for the modality. An edge is
            meant when any of the layers that read it matches.
        options: The transform's.
    """

    name: str
    match: Match = Match()
    options: Fields = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_known(self) -> TransformRule:
        if self.name not in TRANSFORMS:
            raise ValueError(f"unknown transform {self.name!r}; {suggest(self.name, TRANSFORMS)}")
        if self.name == ROTATION and (self.match.role or self.match.name):
            raise ValueError("a rotation takes a whole tower: match it by modality alone")
        if self.name == ROTATION and "modality" in self.options:
            raise ValueError("`modality` of a rotation belongs into `match`")
        if not self.options:
            return self
        try:
            if self.name in EQUALIZERS:
                refuse_idle(build_equalizer(self.name, self.options), self.options, self.name)
            elif self.name == SPLIT:
                self.split()
            else:
                for rotation in self.rotations((Modality.VISION, Modality.LLM)):
                    refuse_idle(rotation, self.options, self.name)
        except PrismQuantError as error:
            raise as_finding(error) from error
        return self

    def split(self) -> Split:
        """The options of a split."""
        return Split(**checked_options(Split, self.options, SPLIT))

    def rotations(self, towers: Iterable[Modality]) -> tuple[Rotation, ...]:
        """One rotation for each of ``towers`` that is meant."""
        from prismquant.models.rotation import Rotation

        options = checked_options(Rotation, self.options, ROTATION)
        wanted = self.match.modality or tuple(towers)
        return tuple(Rotation(modality=tower, **options) for tower in towers if tower in wanted)
