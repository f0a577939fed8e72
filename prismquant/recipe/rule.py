"""One statement of a recipe: what it says of the layers that it matches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from prismquant.algorithms.methods import (
    SOLVERS,
    TUNERS,
    build_solver,
    build_tuner,
    checked_options,
    refuse_idle,
)
from prismquant.errors import PrismQuantError, RecipeError, suggest
from prismquant.formats.spec import NumberSpec, spec
from prismquant.models.arch import Modality
from prismquant.numerics.rules import SEARCHES
from prismquant.recipe.field_checks import (
    as_finding,
    check_format_fields,
    known_fields,
    range_fields,
)
from prismquant.recipe.layer_config import FewTokens, OnFailure
from prismquant.recipe.match import Match, Strict

Fields = dict[str, Any]
Fallback = Literal["error", "channel", "nearest"]

# No text and no number in the place of a truth value.
Flag = Annotated[bool, Field(strict=True)]


class LayerRule(Strict):
    """One statement of a recipe. Fields left out keep what earlier rules said.

    Attributes:
        match: Which layers; left out, all.
        weights: A format's name (``int4-g128``) or fields of one, e.g. ``{bits: 4, group_size:
        64}``.
        activations: Likewise for the layer's input; ``none`` keeps it in floating point.
        outputs: Likewise for the layer's output; by default it stays in floating point.
        solver: The method that chooses the codes: ``rtn`` or ``gptq``.
        options: That method's options. A rule that names another solver starts from its defaults.
        correction: ``auto``, ``none``, or the fields of a :class:`Correction`: aim at the float
            model's output instead of that of the quantized layers before.
        tuner: ``none``, or who improves the codes on the output of the whole block: ``autoround``
            or ``zeroquant``.
        tuner_options: Its options.
        vision_weight: What an image or video token counts for in the statistics of the language
            model, a text token counting one; ``gradient`` takes the ratio of their gradients.
        weight_range: How a weight's range is chosen: ``minmax``, ``mse``, ``percentile``, or its
        fields.
        activation_range: Likewise for static activations, ``ema`` too.
        fallback: What to do where the format cannot hold the layer's shape: ``error``, ``channel``
            for one scale a row, or ``nearest`` for a smaller group first.
        on_failure: What to do where the solver fails for want of usable statistics: ``stop``, or
            ``rtn`` to round to nearest.
        min_tokens: Tokens that an expert must have been sent to be calibrated on them alone.
        few_tokens: What becomes of one that was sent fewer: ``all``, to be calibrated on all tokens
            of its block, or ``rtn`` to round to nearest.
        skip: ``true`` leaves the layer alone.
        optional: ``true`` where the rule may match no layer, which is told; else that is an error.
    """

    match: Match = Match()
    weights: Fields | None = None
    activations: Fields | Literal["none"] | None = None
    outputs: Fields | Literal["none"] | None = None
    solver: str | None = None
    options: Fields | None = None
    correction: Fields | Literal["none"] | None = None
    tuner: str | None = None
    tuner_options: Fields | None = None
    vision_weight: float | Literal["gradient"] | None = None
    weight_range: Fields | None = None
    activation_range: Fields | None = None
    fallback: Fallback | None = None
    on_failure: OnFailure | None = None
    min_tokens: int | None = Field(default=None, ge=0, strict=True)
    few_tokens: FewTokens | None = None
    skip: Flag | None = None
    optional: Flag | None = None

    @field_validator("weights", "activations", "outputs", mode="before")
    @classmethod
    def _format_fields(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "none" and info.field_name == "weights":
            raise ValueError("a weight has a format; `skip: true` leaves a layer alone")
        if value is None or value == "none":
            return value
        try:
            if isinstance(value, str):
                return spec(value).to_dict()
            fields = known_fields(value, NumberSpec, "number format")
            check_format_fields(fields)
        except PrismQuantError as error:
            raise as_finding(error) from error
        return fields

    @field_validator("weight_range", "activation_range", mode="before")
    @classmethod
    def _range_fields(cls, value: Any) -> Any:
        return None if value is None else range_fields(value)

    @field_validator("solver")
    @classmethod
    def _known_solver(cls, value: str | None) -> str | None:
        if value is not None and value not in SOLVERS:
            raise ValueError(f"unknown solver {value!r}; {suggest(value, SOLVERS)}")
        return value

    @field_validator("correction", mode="before")
    @classmethod
    def _correction_fields(cls, value: Any) -> Any:
        if value is None or value == "none":
            return value
        from prismquant.algorithms.correction import Correction

        named = {} if value == "auto" else value
        fields = known_fields(named, Correction, "correction")
        try:
            made = Correction(**checked_options(Correction, fields, "correction"))
            refuse_idle(made, fields, "correction")
        except PrismQuantError as error:
            raise as_finding(error) from error
        return fields

    @field_validator("tuner")
    @classmethod
    def _known_tuner(cls, value: str | None) -> str | None:
        if value not in (None, "none") and value not in TUNERS:
            raise ValueError(f"unknown tuner {value!r}; {suggest(str(value), TUNERS)}")
        return value

    @field_validator("vision_weight", mode="before")
    @classmethod
    def _weight_in_bounds(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("a token's weight is a number, or `gradient`")
        if isinstance(value, str) and value != "gradient":
            raise ValueError(f"a token's weight is a number, or `gradient`, not {value!r}")
        if isinstance(value, int | float) and not 0 <= value <= 1000:
            raise ValueError("a token's weight is a number from 0 to 1000")
        return value

    @model_validator(mode="after")
    def _says_something(self) -> LayerRule:
        if not self.model_fields_set - {"match", "optional"}:
            raise ValueError("the rule sets nothing")
        return self

    @model_validator(mode="after")
    def _options_are_of_the_solver(self) -> LayerRule:
        # Without a solver's name the options are of whichever solver is in force: see `resolve`.
        try:
            if self.solver is not None and self.options:
                solver = build_solver(self.solver, self.options)
                refuse_idle(solver, self.options, self.solver)
            if self.tuner not in (None, "none") and self.tuner_options:
                tuner = build_tuner(str(self.tuner), self.tuner_options)
                refuse_idle(tuner, self.tuner_options, str(self.tuner))
            if self.options and self.weight_range and "kind" in self.weight_range:
                check_weighting(self.options, self.weight_range["kind"])
        except PrismQuantError as error:
            raise as_finding(error) from error
        return self

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> LayerRule:
        towers = self.match.modality
        if self.vision_weight is not None and towers and Modality.LLM not in towers:
            raise ValueError("vision_weight has no effect: only the language model mixes tokens")
        inputs = self.activations if isinstance(self.activations, dict) else {}
        # The blocks of NVFP4 have dynamic scales, and one static scale above them all.
        dynamic = inputs.get("dynamic") and inputs.get("scale") != "e4m3"
        if self.activation_range is not None and dynamic and self.outputs is None:
            raise ValueError("activation_range has no effect: the input's scales are dynamic")
        return self


def check_weighting(options: Mapping[str, Any], kind: str) -> None:
    """Refuse a weighting of a range search where the range rule searches for nothing."""
    if options.get("scale_weighting", "none") != "none" and kind not in SEARCHES:
        raise RecipeError(
            f"scale_weighting has no effect: weight_range {kind} searches for nothing",
            remedy="use weight_range: mse, or leave scale_weighting out",
        )
