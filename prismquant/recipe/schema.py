"""The recipe, or what the user wants: ordered rules over modalities, roles and names.

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

``choose`` leaves a choice. Each alternative adds rules and transforms to the recipe's own, and
quantizing takes the one whose model loses least on calibration samples that no statistic saw:

    choose:
      - {name: plain}
      - {name: corrected, rules: [{correction: auto}]}
      - {name: rotated, transforms: [{name: rotation, match: {modality: llm}}]}

``kv_cache`` says in what numbers a server keeps keys and values: ``fp8``, ``fp8-head``, ``int8``,
``int4-head-rotated`` and so on, or a mapping: ``{format: fp8, granularity: head, range: mse}``.

The recipe knows nothing of a particular model: :mod:`prismquant.plan.plan` lays it over one.
It is words: a method, and torch with it, is loaded only to check options that are given for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator

from prismquant.arguments import MAX_BATCH, MAX_SAMPLES
from prismquant.errors import PrismQuantError, RecipeError, listed, shortened, suggest
from prismquant.formats.kv_formats import KVCacheSpec, kv_cache_spec
from prismquant.numerics.rules import RangeRule
from prismquant.recipe.alternative import Alternative
from prismquant.recipe.field_checks import as_finding, range_fields
from prismquant.recipe.match import MAX_EXPRESSIONS, Match, Strict
from prismquant.recipe.plain_yaml import write_yaml
from prismquant.recipe.recipe_file import read_recipe_file
from prismquant.recipe.rule import Flag, LayerRule
from prismquant.recipe.sensitivity_source import SensitivitySource
from prismquant.recipe.transform_rule import TransformRule

Fields = dict[str, Any]

MAX_DEVICES = 1024
# What no file's name has, but a recipe's text.
_TEXT = re.compile(r"[\n{]|\brules\s*:")

# Numbers as pydantic takes them: no text and no truth values in their place.
Nats = Annotated[float, Field(allow_inf_nan=False)]
PredictedClass = Literal["answer", "text", "image", "video"]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]


def _count(most: int) -> Any:
    return Field(strict=True, ge=1, le=most)


class Calibration(Strict):
    """Settings of the calibration.

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
        choose: Alternatives, of which held-out loss takes one when the model is quantized; none, or
            two at least.
        calibration: How statistics are gathered.
        tensor_parallel: Over how many devices a server will split each layer; formats must fit the
            parts.
        predicted: KL divergence from the unquantized model, in nats a token, that a search has
            predicted for each class of token; evaluations show it, a run does not go by it.
        sensitivity: The file by which a search has found the recipe; a run that finds it there
            compares its layers with what was predicted of them.
    """

    version: Literal[1] = 1
    name: Annotated[str, Field(max_length=500)] = "custom"
    # Before the rules, which ask whether there is one.
    kv_cache: Fields | None = None
    rules: tuple[LayerRule, ...]
    transforms: tuple[TransformRule, ...] = ()
    choose: tuple[Alternative, ...] = ()
    calibration: Calibration = Calibration()
    tensor_parallel: Annotated[int, _count(MAX_DEVICES)] = 1
    predicted: dict[PredictedClass, Nats] | None = None
    sensitivity: SensitivitySource | None = None

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
            raise as_finding(error) from error
        return fields if "range" not in value else fields | {"range": range_fields(value["range"])}

    @field_validator("rules")
    @classmethod
    def _some_rules(
        cls, rules: tuple[LayerRule, ...], info: ValidationInfo
    ) -> tuple[LayerRule, ...]:
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

    @field_validator("choose")
    @classmethod
    def _distinct_alternatives(cls, choose: tuple[Alternative, ...]) -> tuple[Alternative, ...]:
        names = [one.name for one in choose]
        if len(names) == 1:
            raise ValueError(
                "one alternative leaves no choice: give two, or move it into the rules"
            )
        if len({*names}) < len(names):
            raise ValueError(f"two alternatives have one name: {', '.join(names)}")
        return choose

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
        for part in body["choose"] if self.choose else [body]:
            part["rules"] = [*part.get("rules", []), *rules]
        return parse_recipe(body | ({"name": name} if name else {}), source=self.name)

    def with_transforms(self, *transforms: Mapping[str, Any], name: str | None = None) -> Recipe:
        """This recipe with more transforms after its own."""
        body = self.to_dict()
        for part in body["choose"] if self.choose else [body]:
            part["transforms"] = [*part.get("transforms", []), *transforms]
        return parse_recipe(body | ({"name": name} if name else {}), source=self.name)

    def chosen(self, name: str) -> Recipe:
        """The ordinary recipe that is left when one of the alternatives is chosen.

        Args:
            name: Of the alternative.
        """
        body = self.to_dict()
        [one] = [part for part in body.pop("choose") if part["name"] == name]
        for key in ("rules", "transforms"):
            body[key] = [*body.get(key, []), *one.get(key, [])]
        return parse_recipe(body | {"name": f"{self.name}-{name}"}, source=self.name)

    def combined(self, names: Mapping[str, str]) -> Recipe:
        """The ordinary recipe that is left when an alternative is chosen for each part.

        Args:
            names: Of the alternatives, by part of the model.
        """
        known = {one.name: one for one in self.choose}
        body = self.to_dict()
        del body["choose"]
        for part, name in names.items():
            for key, entries in known[name].within(part).items():
                body[key] = [*body.get(key, []), *entries]
        told = "-".join(f"{part}-{name}" for part, name in names.items())
        return parse_recipe(body | {"name": f"{self.name}-{told}"}, source=self.name)

    def without_predicted(self) -> Recipe:
        """This recipe without what a search predicted of it."""
        body = self.to_dict()
        body.pop("predicted", None)
        return parse_recipe(body, source=self.name)

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
        """The recipe as :func:`parse_recipe` reads it back, without what was left out."""
        said = self.model_dump(mode="json", exclude_unset=True)
        return {"version": self.version, "name": self.name} | said

    def to_yaml(self) -> str:
        """The recipe as a YAML file."""
        return write_yaml(self.to_dict())


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe of our own grammar: a preset's name, a file, a dictionary, or a recipe.

    Other tools' recipes are read by
    :func:`prismquant.recipe.importers.import_recipe.import_recipe`.

    Raises:
        RecipeError: No such preset or file, or the content does not fit the grammar.
    """
    from prismquant.recipe.presets import NAMED

    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return parse_recipe(source, source="recipe")
    if not isinstance(source, str | Path):
        raise RecipeError(
            f"a recipe is a preset's name, a YAML file, a dictionary or a Recipe, not {source!r}"
        )
    if str(source) in NAMED:
        return parse_recipe(NAMED[str(source)] | {"name": str(source)}, source=str(source))
    if not os.path.exists(source):
        _refuse_missing(str(source))
    path = Path(source)
    content = read_recipe_file(path)
    if not isinstance(content, Mapping):
        raise RecipeError(
            "the file holds no mapping with a key 'rules'",
            where=str(path),
            remedy="begin with `version: 1` and `rules:`; of a script of another tool give the "
            "line of the command alone",
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
        what = f"the recipe is not valid:{listed(findings)}"
        raise RecipeError(what, where=source, findings=findings) from error


def _refuse_missing(name: str) -> NoReturn:
    from prismquant.recipe.presets import NAMED

    if _TEXT.search(name):
        raise RecipeError(
            f"a recipe's text was given in place of its name: {shortened(name)}",
            remedy="write it to a file and name that; in Python, give a dictionary",
        )
    raise RecipeError(
        f"no preset and no file is called {shortened(name)}", remedy=suggest(name, NAMED)
    )


def _finding(item: Any) -> str:
    steps = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"])
    path = "".join(steps).removeprefix(".") or "recipe"
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key; {suggest(str(item['loc'][-1]), _keys_at(item['loc']))}"
    return f"{path}: {item['msg'].removeprefix('Value error, ')}"


def _keys_at(location: Sequence[Any]) -> Iterable[str]:
    names = [part for part in location[:-1] if isinstance(part, str)]
    models: dict[str, type[BaseModel]] = {
        "rules": LayerRule,
        "match": Match,
        "transforms": TransformRule,
        "choose": Alternative,
        "calibration": Calibration,
        "sensitivity": SensitivitySource,
    }
    return models.get(names[-1] if names else "", Recipe).model_fields
