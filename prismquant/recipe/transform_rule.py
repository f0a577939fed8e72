"""One transform of a recipe: a change of the model before anything is rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from prismquant.algorithms.methods import TRANSFORMS, WHOLE_TOWERS, build_transform, refuse_idle
from prismquant.errors import PrismQuantError, suggest
from prismquant.recipe.field_checks import as_finding
from prismquant.recipe.match import Match, Strict

if TYPE_CHECKING:
    from prismquant.algorithms.protocols import Transform


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
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_known(self) -> TransformRule:
        if self.name not in TRANSFORMS:
            raise ValueError(f"unknown transform {self.name!r}; {suggest(self.name, TRANSFORMS)}")
        if self.name in WHOLE_TOWERS and (self.match.role or self.match.name):
            raise ValueError(f"a {self.name} takes a whole tower: match it by modality alone")
        if self.name in WHOLE_TOWERS and "modality" in self.options:
            raise ValueError(f"`modality` of a {self.name} belongs into `match`")
        if not self.options:
            return self
        try:
            refuse_idle(self.build(), self.options, self.name)
        except PrismQuantError as error:
            raise as_finding(error) from error
        return self

    def build(self) -> Transform:
        """The transform, its options checked."""
        return build_transform(self.name, self.options)
