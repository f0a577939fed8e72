"""What the user wants: ordered rules over modalities, roles and names.

    version: 1
    rules:
      - match: {modality: llm, role: [attn, mlp]}
        weights: int4-g128
        solver: gptq
      - match: {name: "*.layers.0.*"}
        weights: {bits: 8}

Rules are read from top to bottom; a later rule wins field by field, also inside ``weights``,
``activations`` and the two range rules. A layer is quantized when some rule gave it ``weights``
and none that came later said ``skip: true``. The same schema reads YAML and Python; every unknown
key is an error that names its path and the key that was probably meant.

``transforms`` change the model before anything is rounded, without changing its float function:

    transforms:
      - {name: rotation, match: {modality: llm}}
      - {name: smoothquant, match: {role: mlp}, options: {alpha: 0.4}}

They are applied in order: rotations first of all, then scales along edges.

``kv_cache`` says in what numbers a server keeps keys and values: ``fp8``, ``fp8-head``, ``int8``,
``int4-head-rotated`` and so on, or a mapping: ``{format: fp8, granularity: head, range: mse}``.

The recipe knows nothing of a particular model: :mod:`prismquant.plan.plan` lays it over one.
It is words: a method, and torch with it, is loaded only to check options that are given for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prismquant.algorithms.methods import (
    EQUALIZERS,
    SOLVERS,
    TUNERS,
    build_equalizer,
    build_solver,
    build_tuner,
    checked_options,
    refuse_idle,
)
from prismquant.algorithms.split import Split
from prismquant.arguments import MAX_BATCH, MAX_SAMPLES
from prismquant.errors import PrismQuantError, RecipeError, listed, suggest
from prismquant.formats.kv_formats import KVCacheSpec, kv_cache_spec
from prismquant.formats.spec import NumberSpec, spec
from prismquant.models.arch import Modality
from prismquant.numerics.rules import SEARCHES, RangeRule
from prismquant.opening import read_bounded
from prismquant.patterns import shortened
from prismquant.recipe.aliases import translated
from prismquant.recipe.match import MAX_EXPRESSIONS, Match, Strict
from prismquant.recipe.plain_yaml import MAX_BYTES, read_yaml, write_yaml

if TYPE_CHECKING:
    from prismquant.algorithms.correction import Correction
    from prismquant.models.rotation import Rotation

Fields = dict[str, Any]
Fallback = Literal["error", "channel", "nearest"]
OnFailure = Literal["stop", "rtn"]

ROTATION, SPLIT = "rotation", "split"
TRANSFORMS = (ROTATION, SPLIT, *EQUALIZERS)
MAX_DEVICES = 1024
# What no file's name has, but a recipe's text.
_TEXT = re.compile(r"[\n{]|\brules\s*:")

# Numbers as pydantic takes them: no text and no truth values in their place.
Flag = Annotated[bool, Field(strict=True)]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]


def _count(most: int) -> Any:
    return Field(strict=True, ge=1, le=most)


class Rule(Strict):
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
        skip: ``true`` leaves the layer alone.
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
    skip: Flag | None = None

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, content: Any) -> Any:
        return translated(content) if isinstance(content, Mapping) else content

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
            fields = _known_fields(value, NumberSpec, "number format")
            _check_format_fields(fields)
        except PrismQuantError as error:
            raise _with_remedy(error) from error
        return fields

    @field_validator("weight_range", "activation_range", mode="before")
    @classmethod
    def _range_fields(cls, value: Any) -> Any:
        return None if value is None else _range_rule(value)

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
        fields = _known_fields(named, Correction, "correction")
        try:
            made = Correction(**checked_options(Correction, fields, "correction"))
            refuse_idle(made, fields, "correction")
        except PrismQuantError as error:
            raise _with_remedy(error) from error
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
    def _says_something(self) -> Rule:
        if not self.model_fields_set - {"match"}:
            raise ValueError("the rule sets nothing")
        return self

    @model_validator(mode="after")
    def _options_are_of_the_solver(self) -> Rule:
        # Without a solver's name the options are of whichever solver is in force: see `resolve`.
        try:
            if self.solver is not None and self.options:
                solver = build_solver(self.solver, self.options)
                refuse_idle(solver, self.options, self.solver)
            if self.tuner not in (None, "none") and self.tuner_options:
                tuner = build_tuner(str(self.tuner), self.tuner_options)
                refuse_idle(tuner, self.tuner_options, str(self.tuner))
            if self.options and self.weight_range and "kind" in self.weight_range:
                _check_weighting(self.options, self.weight_range["kind"])
        except PrismQuantError as error:
            raise _with_remedy(error) from error
        return self

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Rule:
        towers = self.match.modality
        if self.vision_weight is not None and towers and Modality.LLM not in towers:
            raise ValueError("vision_weight has no effect: only the language model mixes tokens")
        inputs = self.activations if isinstance(self.activations, dict) else {}
        # The blocks of NVFP4 have dynamic scales, and one static scale above them all.
        dynamic = inputs.get("dynamic") and inputs.get("scale") != "e4m3"
        if self.activation_range is not None and dynamic and self.outputs is None:
            raise ValueError("activation_range has no effect: the input's scales are dynamic")
        return self


class Transform(Strict):
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
    def _is_known(self) -> Transform:
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
            raise _with_remedy(error) from error
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


class Calibration(Strict):
    """How statistics are gathered.

    Attributes:
        samples: At most so many calibration samples, spread over the kinds that are present.
        batch_size: Samples run together.
        seed: Chooses the samples when there are more than ``samples``.
        layer_sequential: Later layers of a block see the block's earlier layers quantized.
        block_sequential: The next block sees this block's quantized weights.
        quantized_inputs: Later layers and blocks, and Hessians, see quantized activations.
    """

    samples: Annotated[int, _count(MAX_SAMPLES)] = 128
    batch_size: Annotated[int, _count(MAX_BATCH)] = 8
    seed: Seed = 0
    layer_sequential: Flag = True
    block_sequential: Flag = True
    quantized_inputs: Flag = True


class Recipe(Strict):
    """Ordered rules and how to calibrate. See the module's text for the grammar.

    Attributes:
        version: Of the grammar; 1.
        name: What tables call it.
        kv_cache: In what numbers the language model's keys and values are kept, as fields of a
            :class:`KVCacheSpec` and the ``range`` rule of its scales; None: floating point.
        rules: Later ones win; there may be none beside a ``kv_cache``.
        transforms: Applied in order, before anything is rounded.
        calibration: How statistics are gathered.
        tensor_parallel: Over how many devices a server will split each layer; formats must fit the
            parts.
    """

    version: Literal[1] = 1
    name: Annotated[str, Field(max_length=500)] = "custom"
    # Before the rules, which ask whether there is one.
    kv_cache: Fields | None = None
    rules: tuple[Rule, ...]
    transforms: tuple[Transform, ...] = ()
    calibration: Calibration = Calibration()
    tensor_parallel: Annotated[int, _count(MAX_DEVICES)] = 1

    @field_validator("kv_cache", mode="before")
    @classmethod
    def _kv_cache_fields(cls, value: Any) -> Any:
        if value is None or value == "none":
            return None
        try:
            if isinstance(value, str):
                return kv_cache_spec(value).to_dict()
            if not isinstance(value, Mapping):
                raise ValueError(f"expected a name or a mapping, found {value!r}")
            spec_fields = {key: field for key, field in value.items() if key != "range"}
            fields = KVCacheSpec.from_dict(spec_fields).to_dict()
        except PrismQuantError as error:
            raise _with_remedy(error) from error
        return fields if "range" not in value else fields | {"range": _range_rule(value["range"])}

    @field_validator("rules")
    @classmethod
    def _some_rules(cls, rules: tuple[Rule, ...], info: ValidationInfo) -> tuple[Rule, ...]:
        if not rules and info.data.get("kv_cache") is None:
            raise ValueError("there is no rule")
        expressions = [name for rule in rules for name in rule.match.name if name.startswith("re:")]
        if len(expressions) > MAX_EXPRESSIONS:
            raise ValueError(
                f"there are {len(expressions)} regular expressions, more than {MAX_EXPRESSIONS}: "
                "join them with |, or use globs"
            )
        if any(rule.tuner_options for rule in rules) and not any(rule.tuner for rule in rules):
            raise ValueError("`tuner_options` but no rule names a tuner")
        return rules

    @property
    def kv_cache_settings(self) -> tuple[KVCacheSpec, RangeRule]:
        """The numbers of the key-value cache, and how the ranges of its scales are chosen.

        Raises:
            RecipeError: The recipe asks for none.
        """
        if self.kv_cache is None:
            raise RecipeError(f"recipe {self.name!r} has no kv_cache")
        fields = dict(self.kv_cache)
        rule = RangeRule(**fields.pop("range", {}))
        return KVCacheSpec.from_dict(fields), rule

    def with_kv_cache(self, kv_cache: str | Mapping[str, Any], name: str | None = None) -> Recipe:
        """This recipe with a quantized key-value cache, or with ``none``."""
        body = self.to_dict() | {"kv_cache": kv_cache}
        return parse_recipe(body | ({"name": name} if name else {}), source=self.name)

    def with_rules(self, *rules: Mapping[str, Any], name: str | None = None) -> Recipe:
        """This recipe with more rules after its own."""
        body = self.to_dict()
        body["rules"] = [*body["rules"], *rules]
        return parse_recipe(body | ({"name": name} if name else {}), source=self.name)

    def with_transforms(self, *transforms: Mapping[str, Any], name: str | None = None) -> Recipe:
        """This recipe with more transforms after its own."""
        body = self.to_dict()
        body["transforms"] = [*body.get("transforms", []), *transforms]
        return parse_recipe(body | ({"name": name} if name else {}), source=self.name)

    def without_transforms(self) -> Recipe:
        """This recipe with its rules alone."""
        return self.model_copy(update={"transforms": ()})

    def with_tensor_parallel(self, devices: int) -> Recipe:
        """This recipe for layers that are split over devices."""
        return parse_recipe(self.to_dict() | {"tensor_parallel": devices}, source=self.name)

    def with_calibration(self, **changes: int | bool) -> Recipe:
        """This recipe with other calibration settings."""
        body = self.to_dict()
        return parse_recipe(
            body | {"calibration": body.get("calibration", {}) | changes}, source=self.name
        )

    def to_dict(self) -> Fields:
        """What :func:`parse_recipe` reads back: JSON types only, nothing that was left out."""
        said = self.model_dump(mode="json", exclude_unset=True)
        return {"version": self.version, "name": self.name} | said

    def to_yaml(self) -> str:
        """The recipe as a YAML file."""
        return write_yaml(self.to_dict())


@dataclass(frozen=True)
class Setting:
    """What the rules, merged, say of one layer.

    Attributes:
        rules: Indices of the rules that matched, in order.
        weights: The weight's number format; None leaves the layer alone.
        activations: The input's number format; None keeps floating point.
        outputs: The output's number format; None keeps floating point.
        solver: The method's name.
        options: Its options.
        correction: How far weights are corrected for what precedes them; None: not.
        tuner: Who improves the codes on the block's output; None: nobody.
        tuner_options: Its options.
        vision_weight: What a vision token counts for in the language model's statistics.
        weight_range: How the weight's range is chosen.
        activation_range: How a static activation's range is chosen.
        fallback: What to do where the formats cannot hold the layer's shape.
        on_failure: What to do where the solver fails.
    """

    rules: tuple[int, ...]
    weights: NumberSpec | None
    activations: NumberSpec | None
    outputs: NumberSpec | None
    solver: str
    options: Fields
    correction: Correction | None
    tuner: str | None
    tuner_options: Fields
    vision_weight: float | Literal["gradient"]
    weight_range: RangeRule
    activation_range: RangeRule
    fallback: Fallback
    on_failure: OnFailure


def resolve(recipe: Recipe, *, modality: str, role: str, name: str) -> Setting:
    """Merge all the rules that match one layer; later ones win field by field.

    Raises:
        RecipeError: The merged fields make no number format, range rule or solver; the message
            names the layer and the rules that took part.
    """
    merged: Fields = {
        "solver": "gptq",
        "options": {},
        "fallback": "error",
        "on_failure": "stop",
        "skip": False,
    }
    matched: list[int] = []
    for index, rule in enumerate(recipe.rules):
        if rule.match.matches(modality=modality, role=role, name=name):
            matched.append(index)
            _merge(merged, rule)
    if merged["skip"]:
        merged["weights"] = None
    try:
        return _setting(merged, tuple(matched))
    except (PrismQuantError, TypeError, ValueError) as error:
        numbers = ", ".join(f"rules[{i}]" for i in matched)
        what = error.what if isinstance(error, PrismQuantError) else str(error)
        raise RecipeError(
            what,
            where=f"{name} ({modality}, {role}), set by {numbers} of recipe {recipe.name!r}",
            remedy=getattr(error, "remedy", None),
        ) from error


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe from a preset's name, a YAML file, a dictionary, or a recipe.

    Raises:
        RecipeError: No such preset or file, or the content does not fit the grammar.
    """
    from prismquant.recipe.presets import PRESETS

    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return parse_recipe(source, source="recipe")
    if not isinstance(source, str | Path):
        raise RecipeError(
            f"a recipe is a preset's name, a YAML file, a dictionary or a Recipe, not {source!r}"
        )
    if str(source) in PRESETS:
        return parse_recipe(PRESETS[str(source)] | {"name": str(source)}, source=str(source))
    if not os.path.exists(source):
        _refuse_missing(str(source))
    path = Path(source)
    try:
        content = read_yaml(read_bounded(path, MAX_BYTES).decode("utf-8"))
    except OSError as error:
        raise RecipeError(
            f"the recipe cannot be read: {error.strerror}", where=str(path)
        ) from error
    except ValueError as error:
        raise RecipeError(f"not valid YAML: {error}", where=str(path)) from error
    if not isinstance(content, Mapping):
        raise RecipeError(
            "the file holds no mapping with a key 'rules'",
            where=str(path),
            remedy="begin with `version: 1` and `rules:`",
        )
    return parse_recipe({"name": path.stem, **content}, source=str(path))


def parse_recipe(content: Mapping[str, Any], *, source: str) -> Recipe:
    """Check a dictionary against the grammar.

    Args:
        content: As read from YAML or written in Python.
        source: Named in errors.

    Raises:
        RecipeError: One error that lists everything that is wrong, each with its path.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        findings = [_finding(item) for item in error.errors(include_url=False)]
        raise RecipeError(f"the recipe is not valid:{listed(findings)}", where=source) from error


def _refuse_missing(name: str) -> NoReturn:
    from prismquant.recipe.presets import PRESETS

    if _TEXT.search(name):
        raise RecipeError(
            f"a recipe's text was given in place of its name: {shortened(name)}",
            remedy="write it to a file and name that; in Python, give a dictionary",
        )
    raise RecipeError(
        f"no preset and no file is called {shortened(name)}", remedy=suggest(name, PRESETS)
    )


_MERGED = (
    "weights",
    "activations",
    "outputs",
    "weight_range",
    "activation_range",
    "options",
    "correction",
    "tuner_options",
)


def _merge(merged: Fields, rule: Rule) -> None:
    if rule.solver is not None and rule.solver != merged["solver"]:
        merged["solver"] = rule.solver
        merged["options"] = {}
    if rule.tuner is not None and rule.tuner != merged.get("tuner"):
        merged["tuner"] = rule.tuner
        merged["tuner_options"] = {}
    if rule.vision_weight is not None:
        merged["vision_weight"] = rule.vision_weight
    for key in _MERGED:
        value = getattr(rule, key)
        if value == "none":
            merged[key] = None
        elif value is not None:
            merged[key] = {**(merged.get(key) or {}), **value, **_implied(key, value)}
    if rule.weights is not None:
        merged["skip"] = False
    if rule.fallback is not None:
        merged["fallback"] = rule.fallback
    if rule.on_failure is not None:
        merged["on_failure"] = rule.on_failure
    if rule.skip is not None:
        merged["skip"] = rule.skip


def _setting(merged: Fields, matched: tuple[int, ...]) -> Setting:
    weights, activations = merged.get("weights"), merged.get("activations")
    outputs, correction = merged.get("outputs"), merged.get("correction")
    tuner = None if merged.get("tuner") == "none" else merged.get("tuner")
    setting = Setting(
        rules=matched,
        weights=NumberSpec.from_dict(weights) if weights else None,
        activations=NumberSpec.from_dict(activations) if weights and activations else None,
        outputs=NumberSpec.from_dict(outputs) if weights and outputs else None,
        solver=merged["solver"],
        options=merged["options"],
        correction=None if correction is None else _correction(correction),
        tuner=tuner,
        tuner_options=merged.get("tuner_options") or {},
        vision_weight=merged.get("vision_weight", 1.0),
        weight_range=RangeRule(**(merged.get("weight_range") or {})),
        activation_range=RangeRule(**(merged.get("activation_range") or {})),
        fallback=merged["fallback"],
        on_failure=merged["on_failure"],
    )
    if setting.weights is not None:
        build_solver(setting.solver, setting.options)
        if setting.tuner is not None:
            build_tuner(setting.tuner, setting.tuner_options)
        _check_formats(setting)
        if "kind" not in (merged.get("weight_range") or {}):
            _check_weighting(setting.options, setting.weight_range.kind)
    return setting


def _correction(fields: Fields) -> Correction:
    from prismquant.algorithms.correction import Correction

    return Correction(**fields)


def _implied(key: str, value: Fields) -> Fields:
    """``granularity: channel`` drops an earlier group size; a group size alone says granularity."""
    if key not in ("weights", "activations", "outputs"):
        return {}
    granularity = value.get("granularity")
    if granularity not in (None, "group", "block"):
        return {"group_size": None}
    if granularity is None and value.get("group_size") is not None:
        return {"granularity": "group"}
    return {}


def _check_formats(setting: Setting) -> None:
    weights, activations = setting.weights, setting.activations
    if weights is not None and (weights.dynamic or weights.granularity == "token"):
        raise RecipeError("weights are neither dynamic nor scaled per token")
    if weights is not None and setting.weight_range.kind == "ema":
        raise RecipeError("a weight has no running range: 'ema' is for activations")
    for what, spec_of in (("activations", activations), ("outputs", setting.outputs)):
        if spec_of is not None and spec_of.granularity in ("channel", "block"):
            raise RecipeError(
                f"{what} with {spec_of.granularity} scales are not supported",
                remedy="use granularity tensor (static), token or group (dynamic)",
            )
        if spec_of is not None and spec_of.dynamic == (spec_of.granularity == "tensor"):
            raise RecipeError(
                f"{what} of {spec_of.describe()} are not supported",
                remedy="tensor scales are static, token and group scales dynamic",
            )


def _check_weighting(options: Fields, kind: str) -> None:
    if options.get("scale_weighting", "none") != "none" and kind not in SEARCHES:
        raise RecipeError(
            f"scale_weighting has no effect: weight_range {kind} searches for nothing",
            remedy="use weight_range: mse, or leave scale_weighting out",
        )


def _range_rule(value: Any) -> Fields:
    """The fields of a range rule that is given by its kind or by fields."""
    named = {"kind": value} if isinstance(value, str) else value
    fields = _known_fields(named, RangeRule, "range rule")
    try:
        rule = RangeRule(**checked_options(RangeRule, fields, "range rule"))
        # Without a kind the fields are of whichever an earlier rule has given.
        refuse_idle(rule, fields if "kind" in fields else {}, "range")
    except PrismQuantError as error:
        raise _with_remedy(error) from error
    return fields


def _known_fields(value: Any, kind: type, what: str) -> Fields:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a name or a mapping, found {value!r}")
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    for key in value:
        if key not in known:
            raise ValueError(f"unknown key {key!r} of a {what}; {suggest(str(key), known)}")
    return dict(value)


def _check_format_fields(fields: Fields) -> None:
    """Refuse what no other rule could make possible; fields left out are filled with what fits."""
    size, granularity = fields.get("group_size"), fields.get("granularity")
    if granularity is None:
        dynamic = fields.get("dynamic", False)
        granularity = "group" if size is not None else "token" if dynamic else "tensor"
    filled: Fields = {"dynamic": granularity == "token", **fields}
    if fields.get("kind", "int") == "int":
        filled = {"bits": 8, **filled}
    if granularity == "group" and size is None:
        filled["group_size"] = 128
    NumberSpec.from_dict(filled | {"granularity": granularity})


def _with_remedy(error: PrismQuantError) -> ValueError:
    """An error as a finding: pydantic adds the path."""
    return ValueError("; ".join(filter(None, [error.what, error.remedy])))


def _finding(item: Any) -> str:
    steps = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"])
    path = "".join(steps).removeprefix(".") or "recipe"
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key; {suggest(str(item['loc'][-1]), _keys_at(item['loc']))}"
    return f"{path}: {item['msg'].removeprefix('Value error, ')}"


def _keys_at(location: Sequence[Any]) -> Iterable[str]:
    names = [part for part in location[:-1] if isinstance(part, str)]
    models: dict[str, type[BaseModel]] = {
        "rules": Rule,
        "match": Match,
        "transforms": Transform,
        "calibration": Calibration,
    }
    return models.get(names[-1] if names else "", Recipe).model_fields
