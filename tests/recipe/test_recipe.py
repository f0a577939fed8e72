"""Recipes: what they mean, that YAML and Python mean the same, and what is refused, where."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prismquant.algorithms.correction import Correction
from prismquant.algorithms.methods import TUNERS
from prismquant.algorithms.rotation import Rotation
from prismquant.algorithms.split import Split
from prismquant.errors import RecipeError
from prismquant.formats.spec import spec
from prismquant.models.bind import bind
from prismquant.numerics.ranges import RangeRule
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.layer_config import LayerConfig
from prismquant.recipe.match import Match
from prismquant.recipe.plain_yaml import read_yaml, write_yaml
from prismquant.recipe.presets import NAMED as RECIPES
from prismquant.recipe.presets import PRESETS, preset_yaml
from prismquant.recipe.resolve import Resolved, resolve, resolve_all
from prismquant.recipe.schema import Recipe, load_recipe, parse_recipe

if TYPE_CHECKING:
    from pathlib import Path


bound = functools.cache(bind)


def of(*rules: dict[str, Any], **more: Any) -> Recipe:
    return parse_recipe({"rules": list(rules), **more}, source="recipe.yaml")


def setting(
    *rules: dict[str, Any], modality: str = "llm", role: str = "mlp.up", name: str = "layers.0.up"
) -> LayerConfig:
    return resolved(*rules, modality=modality, role=role, name=name).config


def resolved(
    *rules: dict[str, Any], modality: str = "llm", role: str = "mlp.up", name: str = "layers.0.up"
) -> Resolved:
    return resolve(of(*rules), modality=modality, role=role, name=name)


# Merging


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "weights": st.fixed_dictionaries(
        {},
        optional={
            "bits": st.integers(2, 8),
            "granularity": st.sampled_from(["channel", "tensor"]),
            "symmetric": st.booleans(),
        },
    ),
    "activations": st.one_of(
        st.sampled_from(["none", "int8-token", "int8-tensor", "int8-tensor-asym"]),
        st.fixed_dictionaries({"bits": st.integers(2, 8)}),
    ),
    "solver": st.sampled_from(["rtn", "gptq"]),
    "weight_range": st.fixed_dictionaries(
        {},
        optional={
            "kind": st.sampled_from(["mse", "sweep"]),
            "steps": st.integers(2, 90),
            "max_shrink": st.sampled_from([0.5, 0.6]),
        },
    ),
    "activation_range": st.fixed_dictionaries(
        {}, optional={"kind": st.just("ema"), "momentum": st.just(0.5)}
    ),
    "fallback": st.sampled_from(["error", "channel"]),
    "skip": st.booleans(),
}
RULES = st.lists(
    st.tuples(
        st.booleans(),
        st.fixed_dictionaries({}, optional=FIELDS)
        .filter(bool)
        .filter(
            lambda rule: rule.get("activations") != "int8-token" or "activation_range" not in rule
        ),
    ),
    min_size=1,
    max_size=6,
)


def naive(rules: list[dict[str, Any]]) -> dict[str, Any]:
    """The language in a dozen lines: one flat table of dotted keys, written as they are said."""
    table: dict[str, Any] = {}
    for rule in rules:
        for key, value in rule.items():
            if value == "none":
                table = {k: v for k, v in table.items() if not k.startswith(f"{key}.")}
                continue
            fields = spec(value).to_dict() if isinstance(value, str) and "int" in value else value
            if isinstance(fields, dict):
                table |= {f"{key}.{field}": given for field, given in fields.items()}
                table |= {f"{key}.said": True} if fields else {}
            else:
                table[key] = value
        if "weights" in rule and "skip" not in rule:
            table["skip"] = False
    return table


def nested(table: dict[str, Any], key: str) -> dict[str, Any]:
    prefix = f"{key}."
    found = {k.removeprefix(prefix): v for k, v in table.items() if k.startswith(prefix)}
    return {k: v for k, v in found.items() if k != "said"}


@settings(max_examples=300)
@given(RULES)
def test_later_rules_win_field_by_field(drawn: list[tuple[bool, dict[str, Any]]]) -> None:
    """Whatever the rules say, merging equals writing one flat table in order."""
    base = {"weights": "int8-channel"}
    rules = [base, *(rule | {"match": {"name": "a" if on else "b"}} for on, rule in drawn)]
    applied = [base, *(rule for on, rule in drawn if on)]
    table = naive(applied)
    weights, activations = nested(table, "weights"), nested(table, "activations")
    complete = "granularity" in activations or not activations
    if not complete and not table.get("skip"):
        with pytest.raises(RecipeError, match="needs 'granularity'"):
            setting(*rules, name="a")
        return
    found = resolved(*rules, name="a")
    merged = found.config
    assert found.rules == (0, *(i for i, (on, _) in enumerate(drawn, start=1) if on))
    if table.get("skip"):
        assert merged.weights is None
        assert merged.activations is None
    else:
        assert merged.weights is not None
        assert weights.items() <= merged.weights.to_dict().items()
        said = merged.activations.to_dict() if merged.activations else {}
        assert said.items() >= activations.items()
        assert bool(said) == bool(activations)
    assert merged.solver == table.get("solver", "gptq")
    assert found.fallback == table.get("fallback", "error")
    assert merged.weight_range == RangeRule(**nested(table, "weight_range"))
    assert merged.activation_range == RangeRule(**nested(table, "activation_range"))


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        ("int4-g128", {"bits": 8}, "int8-g128"),
        ("int4-g128", {"group_size": 64}, "int4-g64"),
        ("int4-g128", {"granularity": "channel"}, "int4-channel"),
        ("int4-channel", {"group_size": 32}, "int4-g32"),
        ("int4-channel", {"granularity": "group", "group_size": 32}, "int4-g32"),
        ("int4-g128-asym", {"bits": 3}, "int3-g128-asym"),
        ("int4-g128", {"symmetric": False}, "int4-g128-asym"),
        ("int4-g128-asym", "int8-channel", "int8-channel"),
        ("int4-g128", {"narrow": True}, "int4-g128-narrow"),
    ],
)
def test_a_part_of_a_weight_format_can_be_overridden(first: str, later: Any, expected: str) -> None:
    """A name says all fields; a mapping only its own."""
    assert setting({"weights": first}, {"weights": later}).weights == spec(expected)


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        ("int8-token", {"bits": 6}, "int6-token"),
        ("int8-token", {"symmetric": False}, "int8-token-asym"),
        ("int8-token", {"granularity": "tensor", "dynamic": False}, "int8-tensor"),
        ("int8-tensor", {"granularity": "token", "dynamic": True}, "int8-token"),
        ("int8-tensor-asym", "int8-token", "int8-token"),
    ],
)
def test_a_part_of_an_input_format_can_be_overridden(first: str, later: Any, expected: str) -> None:
    rules = {"weights": "int8-channel", "activations": first}, {"activations": later}
    assert setting(*rules).activations == spec(expected)


def test_none_takes_an_input_format_back_and_a_mapping_starts_anew() -> None:
    start = {"weights": "int8-channel", "activations": "int8-token-asym"}
    assert setting(start, {"activations": "none"}).activations is None
    again = {"activations": {"bits": 8, "granularity": "tensor"}}
    assert setting(start, {"activations": "none"}, again).activations == spec("int8-tensor")


def test_parts_of_range_rules_can_be_overridden() -> None:
    merged = setting(
        {"weights": "int4-channel", "weight_range": "mse", "activation_range": "ema"},
        {"weight_range": {"steps": 40}, "activation_range": {"momentum": 0.2}},
        {"weight_range": {"norm": 2.0}},
    )
    assert merged.weight_range == RangeRule("mse", steps=40, norm=2.0)
    assert merged.activation_range == RangeRule("ema", momentum=0.2)


def test_options_merge_and_start_anew_with_another_solver() -> None:
    gptq = {"weights": "int4-channel", "solver": "gptq", "options": {"damping": 0.05}}
    more = {"options": {"block_size": 64}}
    assert setting(gptq, more).options == {"damping": 0.05, "block_size": 64}
    assert setting(gptq, {"solver": "gptq"}, more).options == {"damping": 0.05, "block_size": 64}
    assert setting(gptq, {"solver": "rtn"}).options == {}
    assert setting(gptq, {"solver": "rtn"}, {"solver": "gptq"}).options == {}


def test_corrections_merge_and_none_takes_them_back() -> None:
    rules = [
        {"weights": "int4-channel", "correction": "auto"},
        {"correction": {"strength": 1}},
        {"correction": {"damping": 0.1}},
    ]
    assert setting(rules[0]).correction == Correction()
    assert setting(*rules).correction == Correction(1.0, 0.1)
    assert setting(*rules, {"correction": "none"}).correction is None
    anew = setting(*rules, {"correction": "none"}, {"correction": {"damping": 0.5}})
    assert anew.correction == Correction(damping=0.5)
    assert setting({"weights": "int4-channel"}).correction is None


def test_a_tuner_is_kept_replaced_or_taken_back() -> None:
    rules = [
        {"weights": "int4-channel", "tuner": "autoround", "tuner_options": {"iterations": 3}},
        {"tuner_options": {"batch": 2}},
    ]
    assert setting(*rules).tuner == "autoround"
    assert setting(*rules).tuner_options == {"iterations": 3, "batch": 2}
    assert setting(*rules, {"tuner": "autoround"}).tuner_options == {"iterations": 3, "batch": 2}
    other = setting(*rules, {"tuner": "zeroquant"})
    assert (other.tuner, other.tuner_options) == ("zeroquant", {})
    nobody = setting(*rules, {"tuner": "none"})
    assert (nobody.tuner, nobody.tuner_options) == (None, {})
    assert setting({"weights": "int4-channel"}).tuner is None


def test_outputs_are_given_in_parts_and_taken_back_like_inputs() -> None:
    rules = [{"weights": "int8-channel", "outputs": "int8-tensor"}, {"outputs": {"bits": 6}}]
    assert setting(rules[0]).outputs == spec("int8-tensor")
    assert setting(*rules).outputs == spec("int6-tensor")
    assert setting(*rules, {"outputs": "none"}).outputs is None
    assert setting({"outputs": "int8-tensor"}).outputs is None


def test_transforms_are_read_in_order_with_all_their_words(tmp_path: Path) -> None:
    """And survive being written down; more can be added behind them."""
    transforms = [
        {"name": "awq", "match": {"role": ["mlp", "attn.qkv"]}, "options": {"grid": 5}},
        {"name": "rotation", "match": {"modality": "llm"}, "options": {"online": True, "seed": 3}},
        {"name": "split"},
    ]
    recipe = of({"weights": "int8-channel"}, transforms=transforms)
    assert [transform.name for transform in recipe.transforms] == ["awq", "rotation", "split"]
    assert recipe.transforms[0].match == Match(role=("mlp", "attn.qkv"))
    assert recipe.transforms[1].build() == Rotation(online=True, seed=3)
    assert recipe.transforms[2].build() == Split()
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    longer = recipe.with_transforms({"name": "smoothquant"}, name="longer")
    assert longer.transforms[:3] == recipe.transforms
    assert (longer.transforms[3].name, longer.name) == ("smoothquant", "longer")
    assert len(recipe.transforms) == 3


@dataclass(frozen=True)
class Layer:
    modality: str
    role: str
    name: str


LAYERS = [
    Layer(modality, role, f"{modality}.blocks.{block}.{role}")
    for modality in ("vision", "llm")
    for role in ("attn.qkv", "mlp.down")
    for block in range(3)
]
RULES = st.fixed_dictionaries(
    {},
    optional={
        "match": st.fixed_dictionaries(
            {},
            optional={
                "modality": st.sampled_from(["vision", "llm"]),
                "role": st.sampled_from(["attn", "mlp.down"]),
                "name": st.sampled_from(["*.blocks.1.*", "re:.*qkv"]),
            },
        ),
        "skip": st.booleans(),
    },
)


@given(st.lists(RULES.map(lambda rule: {"weights": "int4-g128"} | rule), min_size=1, max_size=4))
def test_layers_resolved_together_are_as_each_alone(rules: list[dict[str, Any]]) -> None:
    recipe = Recipe(rules=rules)
    found = resolve_all(recipe, LAYERS)
    assert found == {one.name: resolve(recipe, **vars(one)) for one in LAYERS}


def test_skip_holds_until_a_later_rule_gives_weights_again() -> None:
    weights, skip = {"weights": "int4-channel"}, {"skip": True}
    assert setting(weights, skip).weights is None
    assert setting(weights, skip, {"solver": "rtn"}).weights is None
    assert setting(weights, skip, {"weights": {"bits": 8}}).weights == spec("int8-channel")
    assert setting(weights, skip, {"skip": False}).weights == spec("int4-channel")
    assert setting(skip, weights).weights == spec("int4-channel")
    assert setting({"solver": "rtn"}).weights is None


# Matching


@pytest.mark.parametrize(
    ("pattern", "role", "hit"),
    [
        ("attn", "attn.qkv.q", True),
        ("attn.qkv", "attn.qkv", True),
        ("attn.qkv", "attn.qkv.k", True),
        ("attn.qkv.k", "attn.qkv", False),
        ("attn.out", "attn.qkv.v", False),
        ("mlp.up", "mlp.up", True),
        ("mlp", "mlpx.up", False),
    ],
)
def test_a_role_matches_itself_and_what_is_below(pattern: str, role: str, hit: bool) -> None:
    match = Match.model_validate({"role": pattern})
    assert match.matches(modality="llm", role=role, name="x") is hit


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ("model.layers.1.mlp.up_proj", True),
        ("*.layers.1.*", True),
        ("*.layers.?.mlp.*", True),
        ("*.layers.[01].mlp.*", True),
        ("*.layers.[!1].*", False),
        ("layers.1.*", False),
        ("model.layers.1", False),
        ("modelXlayers.1.mlp.up_proj", False),
        (r"re:.*layers\.\d+\.mlp\..*", True),
        (r"re:.*layers\.(0|2)\..*", False),
        (r"re:layers\.1", False),
        (r"re:model\.layers\.1\.mlp\.up_proj", True),
    ],
)
def test_names_match_as_globs_or_regular_expressions_as_a_whole(pattern: str, hit: bool) -> None:
    match = Match.model_validate({"name": pattern})
    name = "model.layers.1.mlp.up_proj"
    assert match.matches(modality="llm", role="mlp.up", name=name) is hit
    if not pattern.startswith("re:"):
        assert fnmatch.fnmatchcase(name, pattern) is hit


def test_all_criteria_must_hold_and_any_entry_of_a_list_may() -> None:
    match = Match.model_validate({"modality": ["llm", "vision"], "role": "mlp", "name": ["a", "b"]})
    assert match.matches(modality="vision", role="mlp.up", name="b")
    assert not match.matches(modality="projector", role="mlp.up", name="b")
    assert not match.matches(modality="llm", role="attn.out", name="b")
    assert not match.matches(modality="llm", role="mlp.up", name="c")
    assert Match().matches(modality="llm", role="mlp.up", name="anything")


# YAML and Python


FULL = """
version: 1
name: mixed
rules:
  - match: {modality: llm, role: [attn, mlp]}
    weights: int4-g128
    activations: {bits: 8, granularity: token, dynamic: true}
    solver: gptq
    options: {damping: 0.02}
    weight_range: {kind: mse, steps: 40}
  - match: {name: ["*.layers.0.*", 're:.*layers\\.1\\..*']}
    weights: {bits: 8}
    activations: none
    activation_range: ema
    fallback: channel
  - match: {modality: [vision, projector]}
    skip: true
calibration: {samples: 16, batch_size: 2, seed: 3, block_sequential: false}
"""


def test_yaml_python_and_a_recipe_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(FULL)
    from_file, from_python = load_recipe(path), load_recipe(yaml.safe_load(FULL))
    assert from_file == from_python == load_recipe(from_file) == load_recipe(str(path))
    assert from_file.name == "mixed"
    assert from_file.calibration.samples == 16
    assert from_file.calibration.layer_sequential


@pytest.mark.parametrize("source", [*RECIPES, "FULL"])
def test_every_recipe_survives_being_written_down(source: str, tmp_path: Path) -> None:
    """Through YAML and through JSON, twice, with the same meaning and the same text."""
    recipe = load_recipe(yaml.safe_load(FULL) if source == "FULL" else source)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    if source in RECIPES:
        assert load_recipe(yaml.safe_load(preset_yaml(source))) == recipe
    assert parse_recipe(json.loads(json.dumps(recipe.to_dict())), source="json") == recipe


def test_a_file_without_a_name_is_called_after_itself(tmp_path: Path) -> None:
    path = tmp_path / "my-recipe.yml"
    path.write_text("rules: [{weights: int8-channel}]")
    assert load_recipe(path).name == "my-recipe"


def test_recipes_are_frozen_and_changed_by_copies() -> None:
    recipe = load_recipe("w4a16")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]
    changed = recipe.with_rules({"solver": "rtn"}, name="other").with_calibration(samples=4)
    assert (changed.name, len(changed.rules), changed.calibration.samples) == ("other", 2, 4)
    assert changed.with_calibration(seed=1).calibration.samples == 4
    assert recipe == load_recipe("w4a16")
    with pytest.raises(RecipeError, match=re.escape("rules[1].solver")):
        recipe.with_rules({"solver": "rnt"})


# What is refused


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"verison": 1}, "verison: unknown key; did you mean 'version'?"),
        ({"rules": [{"weigths": "int4-g128"}]}, "rules[0].weigths: unknown key; did you mean 'wei"),
        (
            {"rules": [{"match": {"modalty": "llm"}, "skip": True}]},
            "rules[0].match.modalty: unknown key; did you mean 'modality'?",
        ),
        ({"calibration": {"sampels": 3}}, "calibration.sampels: unknown key; did you mean 'sample"),
        (
            {"rules": [{"skip": True}, {"weights": {"bitz": 4}}]},
            "rules[1].weights: unknown key 'bitz' of a number format; did you mean 'bits'?",
        ),
        (
            {"rules": [{"activations": {"dinamic": True}}]},
            "rules[0].activations: unknown key 'dinamic' of a number format; did you mean 'dyn",
        ),
        (
            {"rules": [{"weight_range": {"nrom": 2}}]},
            "rules[0].weight_range: unknown key 'nrom' of a range rule; did you mean 'norm'?",
        ),
        (
            {"rules": [{"activation_range": {"moment": 2}}]},
            "rules[0].activation_range: unknown key 'moment' of a range rule; did you mean 'mom",
        ),
        (
            {"rules": [{"solver": "gptq", "options": {"dampin": 1.0}}]},
            "rules[0]: gptq has no option 'dampin'; did you mean 'damping'?",
        ),
        ({"rules": [{"solver": "gtpq"}]}, "rules[0].solver: unknown solver 'gtpq'; did you mean"),
        (
            {"rules": [{"weights": "int4-g12x"}]},
            "rules[0].weights: there is no number format 'int4-g12x'; did you mean 'int4-g128'?",
        ),
        (
            {"rules": [{"weight_range": "mes"}]},
            "rules[0].weight_range: 'mes' is not a choice; did you mean 'mse'?",
        ),
        ({"rules": [{"match": {"modality": "text"}, "skip": True}]}, "rules[0].match.modality[0]"),
        (
            {"rules": [{"match": {"name": "re:("}, "skip": True}]},
            "rules[0].match.name: '(' is not a regular expression",
        ),
        ({"rules": [{"fallback": "chanel"}]}, "rules[0].fallback: Input should be"),
        ({"rules": [{"weights": "none"}]}, "rules[0].weights: a weight has a format; `skip: true`"),
        ({"rules": [{"weights": 4}]}, "rules[0].weights: expected a name or a mapping, found 4"),
        (
            {"rules": [{"weight_range": {"norm": "x"}}]},
            "rules[0].weight_range: 'x' is not of type float",
        ),
        ({"rules": [{"weight_range": {"norm": -1}}]}, "rules[0].weight_range: norm cannot be -1"),
        ({"rules": [{"match": {"role": "attn"}}]}, "rules[0]: the rule sets nothing"),
        ({"rules": []}, "rules: there is no rule"),
        ({"rules": "w4a16"}, "rules: Input should be"),
        ({"version": 2}, "version: Input should be 1"),
        ({"calibration": {"samples": 0}}, "calibration.samples: Input should be greater"),
        # One rule that contradicts itself.
        ({"rules": [{"weights": {"bits": 9, "granularity": "channel"}}]}, "no integer format of 9"),
        ({"rules": [{"weights": {"bits": "4"}}]}, "must be an integer, not '4'"),
        (
            {"rules": [{"weights": {"granularity": "channel", "group_size": 64}}]},
            "rules[0].weights: group size 64 has no meaning with channel granularity",
        ),
        (
            {"rules": [{"weights": {"narrow": True, "symmetric": False}}]},
            "rules[0].weights: a narrow grid is symmetric",
        ),
        (
            {"rules": [{"activations": {"granularity": "token", "dynamic": False}}]},
            "rules[0].activations: tokens are not known in advance",
        ),
        ({"rules": [{"weights": {"granularity": "chanel"}}]}, "did you mean 'channel'?"),
        (
            {"transforms": [{"name": "smothquant"}]},
            "transforms[0]: unknown transform 'smothquant'; did you mean 'smoothquant'?",
        ),
        (
            {"transforms": [{"name": "awq"}, {"name": "awq", "option": {}}]},
            "transforms[1].option: unknown key; did you mean 'options'?",
        ),
        ({"transforms": [{"match": {}}]}, "transforms[0].name: Field required"),
        ({"transforms": [{"name": "awq", "match": {"rol": "mlp"}}]}, "transforms[0].match.rol:"),
        (
            {"transforms": [{"name": "awq", "match": {"modality": "text"}}]},
            "transforms[0].match.modality[0]: Input should be 'vision', 'projector' or 'llm'",
        ),
        (
            {"transforms": [{"name": "smoothquant", "options": {"alfa": 0.5}}]},
            "transforms[0]: smoothquant has no option 'alfa'; did you mean 'alpha'?",
        ),
        (
            {"transforms": [{"name": "smoothquant", "options": {"alpha": 1.5}}]},
            "transforms[0]: alpha cannot be 1.5; from 0 to 1",
        ),
        (
            {"transforms": [{"name": "split", "options": {"treshold": 2}}]},
            "transforms[0]: split has no option 'treshold'; did you mean 'threshold'?",
        ),
        (
            {"transforms": [{"name": "split", "options": {"columns": 0}}]},
            "transforms[0]: columns cannot be 0",
        ),
        (
            {"transforms": [{"name": "rotation", "options": {"onlin": True}}]},
            "transforms[0]: rotation has no option 'onlin'; did you mean 'online'?",
        ),
        (
            {"transforms": [{"name": "rotation", "options": {"online": "yes"}}]},
            "transforms[0]: 'yes' is not of type bool",
        ),
        (
            {"transforms": [{"name": "rotation", "options": {"kind": "hadamar"}}]},
            "transforms[0]: 'hadamar' is not a choice; did you mean 'hadamard'?",
        ),
        (
            {"transforms": [{"name": "rotation", "options": {"online": True, "online_block": 96}}]},
            "transforms[0]: online_block 96 needs online: true and a power of two",
        ),
        (
            {"transforms": [{"name": "rotation", "match": {"role": "mlp"}}]},
            "transforms[0]: a rotation takes a whole tower: match it by modality alone",
        ),
        (
            {"transforms": [{"name": "rotation", "match": {"name": "*.layers.0.*"}}]},
            "transforms[0]: a rotation takes a whole tower: match it by modality alone",
        ),
        (
            {"transforms": [{"name": "rotation", "options": {"modality": "llm"}}]},
            "transforms[0]: `modality` of a rotation belongs into `match`",
        ),
        (
            {"rules": [{"correction": {"strenth": 1}}]},
            "rules[0].correction: unknown key 'strenth' of a correction; did you mean 'strength'?",
        ),
        (
            {"rules": [{"correction": {"strength": 2}}]},
            "rules[0].correction: strength cannot be 2.0",
        ),
        ({"rules": [{"correction": {"damping": True}}]}, "rules[0].correction: True is not of"),
        ({"rules": [{"correction": "yes"}]}, "rules[0].correction: expected a name or a mapping"),
        (
            {"rules": [{"tuner": "autorond"}]},
            "rules[0].tuner: unknown tuner 'autorond'; did you mean 'autoround'?",
        ),
        (
            {"rules": [{"tuner": "autoround", "tuner_options": {"iteration": 3}}]},
            "rules[0]: autoround has no option 'iteration'; did you mean 'iterations'?",
        ),
        (
            {"rules": [{"tuner": "zeroquant", "tuner_options": {"iterations": 0}}]},
            "rules[0]: iterations cannot be 0",
        ),
        ({"rules": [{"outputs": "int8-tokn"}]}, "rules[0].outputs:"),
        ({"rules": [{"vision_weight": -1.0}]}, "rules[0].vision_weight: a token's weight is"),
        ({"rules": [{"vision_weight": "5"}]}, "rules[0].vision_weight: a token's weight is"),
        # A misspelt word beside a good one.
        (
            {"rules": [{"match": {"role": ["attn", "mpl"]}, "skip": True}]},
            "rules[0].match.role: no layer has the role 'mpl'; did you mean 'mlp'?",
        ),
        ({"transforms": [{"name": "awq", "match": {"role": "attn.qk"}}]}, "no layer has the role"),
        ({"rules": [{"match": {"name": "a*" * 3000}, "skip": True}]}, "6000 characters is too"),
        (
            {"rules": [{"match": {"name": [f"re:{i}" for i in range(1001)]}, "skip": True}]},
            "rules: there are 1001 regular expressions, more than 1000",
        ),
        ({"name": "x" * 501}, "name: String should have at most 500 characters"),
        # Types: no text and no truth values for numbers, no numbers for truth values.
        ({"calibration": {"samples": True}}, "calibration.samples: Input should be a valid int"),
        ({"calibration": {"samples": "8"}}, "calibration.samples: Input should be a valid int"),
        ({"calibration": {"layer_sequential": 1}}, "calibration.layer_sequential: Input should"),
        ({"rules": [{"weights": "int8-channel", "skip": "no"}]}, "rules[0].skip: Input should be"),
        ({"rules": [{"weight_range": {"percentile": True}}]}, "True is not of type float"),
        # Counts have bounds.
        ({"calibration": {"samples": 10**12}}, "samples: Input should be less than or equal to"),
        ({"calibration": {"batch_size": 10**30}}, "batch_size: Input should be less than or eq"),
        ({"calibration": {"seed": 2**64}}, "calibration.seed: Input should be less than"),
        ({"tensor_parallel": 10**9}, "tensor_parallel: Input should be less than or equal to"),
        *[
            ({"rules": [{"solver": "gptq", "options": {option: 10**9}}]}, f"{option} cannot be")
            for option in ("refine_passes", "block_size", "damping")
        ],
        *[
            ({"rules": [{"tuner": name, "tuner_options": {option: 10**9}}]}, f"{option} cannot be")
            for name in ("autoround", "zeroquant")
            for option in ("iterations", "settle", "batch")
        ],
        ({"rules": [{"tuner": "autoround", "tuner_options": {"seed": 2**63}}]}, "seed cannot be"),
        *[
            ({"transforms": [{"name": name, "options": {option: 10**9}}]}, f"{option} cannot be")
            for name in ("awq", "smoothquant")
            for option in ("grid", "rows", "vision_weight", "max_scale")
        ],
        ({"rules": [{"weight_range": {"kind": "mse", "steps": 10**9}}]}, "steps cannot be"),
        # Other tools' names are no part of the grammar.
        ({"rules": [{"quantization_type": "static"}]}, "rules[0].quantization_type: unknown key"),
        ({"rules": [{"weights": "float16"}]}, "rules[0].weights: there is no number format"),
        # Options that change nothing as the others stand.
        (
            {"transforms": [{"name": "smoothquant", "options": {"alpha": 0.4, "search": True}}]},
            "transforms[0]: alpha 0.4 is given, but search: true chooses it",
        ),
        *[
            (
                {"transforms": [{"name": "smoothquant", "options": {"alpha": 0.4, option: 2}}]},
                f"transforms[0]: smoothquant option {option!r} has no effect: no strength is",
            )
            for option in ("grid", "rows", "vision_weight")
        ],
        (
            {"rules": [{"solver": "gptq", "options": {"damping": 0.0, "damping_basis": "mean"}}]},
            "rules[0]: gptq option 'damping_basis' has no effect: damping is 0",
        ),
        *[
            (
                {"rules": [{"tuner": n, "tuner_options": {"learn_range": False, option: value}}]},
                f"rules[0]: {n} option {option!r} has no effect: learn_range is false",
            )
            for n in ("autoround", "zeroquant")
            for option, value in (("settle", 5), ("range_learning_rate", 0.1))
        ],
        (
            {"rules": [{"correction": {"strength": 0, "damping": 0.1}}]},
            "rules[0].correction: correction option 'damping' has no effect: strength is 0",
        ),
        *[
            (
                {"rules": [{"weight_range": {"kind": kind, option: value}}]},
                f"range option {option!r} has no effect: the rule is {kind}",
            )
            for kind, option, value in (
                ("minmax", "percentile", 0.9),
                ("percentile", "steps", 9),
                ("mse", "momentum", 0.5),
                ("sweep", "norm", 2.0),
            )
        ],
        (
            {"rules": [{"solver": "rtn", "options": {"scale_weighting": "group"}}][:1]}
            | {"rules": [{"options": {"scale_weighting": "group"}, "weight_range": "minmax"}]},
            "rules[0]: scale_weighting has no effect: weight_range minmax searches for nothing",
        ),
        (
            {"rules": [{"activations": "int8-token", "activation_range": "mse"}]},
            "rules[0]: activation_range has no effect: the input's scales are dynamic",
        ),
        (
            {"rules": [{"match": {"modality": "vision"}, "vision_weight": 2}]},
            "rules[0]: vision_weight has no effect: only the language model mixes tokens",
        ),
        (
            {
                "transforms": [
                    {
                        "name": "rotation",
                        "options": {
                            "residual": False,
                            "values": False,
                            "online": True,
                            "kind": "random",
                        },
                    }
                ]
            },
            "transforms[0]: rotation option 'kind' has no effect: only the online rotation is on",
        ),
        (
            {"transforms": [{"name": "rotation", "options": {"kind": "random", "signs": True}}]},
            "transforms[0]: rotation option 'signs' has no effect: a random matrix has none",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_path(content: dict[str, Any], found: str) -> None:
    whole = {"rules": [{"weights": "int8-channel"}]} | content
    with pytest.raises(RecipeError, match=re.escape(found)) as caught:
        parse_recipe(whole, source="recipe.yaml")
    assert caught.value.where == "recipe.yaml"
    # Nothing but what is really wrong.
    assert caught.value.what.count("\n  - ") == 1


def test_everything_that_is_wrong_is_said_at_once() -> None:
    content = {
        "rules": [{"weights": "int4"}, {"solvr": "rtn"}],
        "calibration": {"seed": "x"},
        "naem": 1,
    }
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content, source="recipe.yaml")
    for path in ("rules[0].weights", "rules[1].solvr", "calibration.seed", "naem"):
        assert f"- {path}:" in caught.value.what


@pytest.mark.parametrize(
    ("rules", "what"),
    [
        (
            [
                {"weights": "int8-channel", "activations": "int8-tensor"},
                {"activations": {"granularity": "token"}},
            ],
            "tokens are not known in advance",
        ),
        (
            [{"weights": "int8-channel", "activations": "int8-tensor-dyn"}],
            "tensor scales are static",
        ),
        (
            [{"weights": "int8-channel", "activations": "int8-g128"}],
            "activations of int8 g128 sym are not supported",
        ),
        (
            [{"weights": "int8-channel", "activations": "int8-channel"}],
            "activations with channel scales are not supported",
        ),
        ([{"weights": "int8-token"}], "weights are neither dynamic nor scaled per token"),
        ([{"weights": "int8-tensor-dyn"}], "weights are neither dynamic nor scaled per token"),
        ([{"weights": "int8-channel", "weight_range": "ema"}], "'ema' is for activations"),
        ([{"weights": {"bits": 4}}], "needs 'granularity'"),
        ([{"weights": {"granularity": "channel"}}], "needs 'bits'"),
        ([{"weights": "int4-g128"}, {"options": {"dampin": 1.0}}], "gptq has no option 'dampin'"),
        (
            [{"weights": "int4-g128", "options": {"damping": 0.1}}, {"match": {}, "solver": "rtn"}],
            None,
        ),
        (
            [{"weights": "int4-g128", "solver": "rtn"}, {"options": {"damping": 0.1}}],
            "rtn has no option",
        ),
        ([{"weights": "int4-g128-asym"}, {"weights": {"narrow": True}}], "narrow grid is symm"),
        ([{"weights": "int4-channel"}, {"weights": {"granularity": "group"}}], "group size"),
        (
            [{"weights": "int8-channel"}, {"outputs": "int8-channel"}],
            "outputs with channel scales are not supported",
        ),
        (
            [{"weights": "int4-g32", "tuner": "autoround"}, {"tuner_options": {"iteration": 3}}],
            "autoround has no option 'iteration'",
        ),
    ],
)
def test_impossible_combinations_name_the_layer_and_the_rules(
    rules: list[dict[str, Any]], what: str | None
) -> None:
    """Each rule may be fine alone; together they make no format or no solver."""
    if what is None:
        assert setting(*rules).weights is not None
        return
    with pytest.raises(RecipeError, match=re.escape(what)) as caught:
        setting(*rules, name="model.layers.7.up")
    message = str(caught.value)
    assert "model.layers.7.up (llm, mlp.up)" in message
    assert all(f"rules[{index}]" in message for index in range(len(rules)))


def test_combinations_that_no_layer_is_given_are_not_looked_at() -> None:
    """A layer that is skipped in the end needs no complete format."""
    assert setting({"weights": {"bits": 4}}, {"skip": True}).weights is None


def test_an_unknown_preset_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no preset and no file is called 'w4a61'") as caught:
        load_recipe("w4a61")
    assert "did you mean 'w4a16'?" in str(caught.value.remedy)
    with pytest.raises(RecipeError, match="it is a folder"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("rules: [", "not valid YAML"),
        ("- weights: int4-g128", "no mapping with a key 'rules'"),
        ("", "no mapping with a key 'rules'"),
        ("name: x", "rules: Field required"),
        ("rules:\n  - 3: 4\n", "rules[0]"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(what)) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value.where)


RULE = "rules: [{weights: int8-channel}]\n"
# Each name is nine times the one before: a gigabyte once they are written out.
BOMB = "a: &a [x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB + RULE, "aliases (& and *) are not read: write the value out, line 1"),
        ("name: &x y\n" + RULE, "aliases (& and *) are not read"),
        (RULE + "name: !!python/object/apply:os.getcwd []\n", "tags (!) are not read"),
        (RULE + "name: !!set {x}\n", "tags (!) are not read: write plain values, line 2"),
        (RULE + RULE, "key 'rules' is there twice, line 2"),
        ("rules: [{weights: int8-channel, weights: int4-channel}]", "key 'weights' is there twice"),
        (RULE + "? [a]\n: b", "a key is a word, line 2"),
        ("rules: " + "[" * 100 + "]" * 100, "it is nested more than 20 deep, line 1"),
        ("rules: [" + "a, " * 60_000 + "]", "there are more than 50000 values"),
        (RULE + "tensor_parallel: " + "9" * 5000, "it is no number, line 2"),
        (RULE + "tensor_parallel: 0x" + "f" * 5000, "it is too large a number, line 2"),
        (RULE + "---\n" + RULE, "found another document"),
        (RULE + "name: \0", "not valid YAML"),
    ],
    ids=lambda value: value[:30],
)
def test_a_file_is_plain_yaml(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="not valid YAML") as caught:
        load_recipe(path)
    assert said in caught.value.what
    assert len(str(caught.value)) < 500


def test_dates_and_merge_keys_are_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: 2021-02-31\n" + RULE)
    assert load_recipe(path).name == "2021-02-31"
    path.write_text("<<: {name: x}\n" + RULE)
    with pytest.raises(RecipeError, match=r"<<: unknown key"):
        load_recipe(path)
    path.write_text("rules: [{weights: int8-channel, solver: gptq, options: {damping: 1e-3}}]")
    assert load_recipe(path).rules[0].options == {"damping": 1e-3}


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.text(max_size=8)
    # Words that other YAML takes for something else.
    | st.sampled_from(["2021-02-31", "1e-3", "<<", "=", "*a", "&a", "!x", "yes", "~", "0x1", "1:2"])
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@given(PLAIN)
def test_whatever_is_written_is_read_back(value: Any) -> None:
    shared = [value, value, {"again": value}]
    assert read_yaml(write_yaml(shared)) == shared


@given(st.text(alphabet="ab:-[]{}&*!'\"|>?#%@<=\n 0123.,", max_size=60))
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        read_yaml(text)


def test_only_regular_files_of_a_known_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="it is a named pipe, not a regular file"):
        load_recipe(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"#" * (2 << 20))
    with pytest.raises(RecipeError, match="it has 2097152 bytes; at most 1048576 are read"):
        load_recipe(tmp_path / "large")
    (tmp_path / "latin").write_bytes(b"name: caf\xe9")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "latin")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("rules: [{weights: int8-channel}]" + " " * 300, "a recipe's text was given"),
        ("version: 1\nrules: []", "a recipe's text was given"),
        ("x" * 5000, "no preset and no file is called 'xxx"),
        ("a\0b", "no preset and no file is called 'a\\x00b'"),
        ("", "no preset and no file is called ''"),
        (3, "a recipe is a preset's name, a YAML file, a dictionary or a Recipe, not 3"),
        (None, "a recipe is a preset's name"),
        (["w4a16"], "a recipe is a preset's name"),
    ],
    ids=repr,
)
def test_what_is_no_recipe_at_all(source: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert said in caught.value.what
    assert len(caught.value.what) < 200


def test_a_clip_search_without_a_search_is_refused() -> None:
    """The default range rule searches for nothing; a rule that says so later is a choice."""
    clip = {"weights": "int4-g32", "solver": "rtn", "options": {"scale_weighting": "group"}}
    with pytest.raises(RecipeError, match="scale_weighting has no effect: weight_range minmax"):
        setting(clip)
    assert setting(clip | {"weight_range": "mse"}, {"weight_range": "minmax"}).weights is not None


def test_a_long_list_of_what_is_wrong_is_cut() -> None:
    with pytest.raises(RecipeError) as caught:
        of(*({"weigths": "x" * 5000} for _ in range(500)))
    assert "and 480 more" in caught.value.what
    assert len(caught.value.what) < 30_000


NAMED = {
    "nvfp4": ("e2m1", 4),
    "mxfp4": ("e2m1", 4),
    "mxfp6": ("e2m3", 6),
    "mxfp8": ("e4m3", 8),
    "mxint8": ("int", 8),
    "fp8": ("e4m3", 8),
}


def promised(preset: str, modality: str) -> tuple[str, int]:
    """Kind and width of the weights that a preset's name promises."""
    for name, numbers in NAMED.items():
        if preset.startswith(name):
            return numbers
    if modality != "llm" and "vision" in preset:
        return "int", 8
    named = re.search(r"w(\d)a(\d+|fp8)(-static)?(-all)?$", preset)
    assert named is not None
    return "int", int(named[1])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_every_family(preset: str, tiny_folder: Path) -> None:
    """What the name promises is quantized, and nothing else; head and embeddings never."""
    plan = make_plan(load_recipe(preset), bound(tiny_folder))
    everything = preset.endswith("-all") or preset.startswith(("vision", "mquant"))
    for row in plan.rows:
        modality, role = str(row.site.modality), row.site.role
        wanted = (modality == "llm" and role != "lm_head") or (everything and modality != "llm")
        assert (row.config.weights is not None) is wanted, row.site.name
        if row.config.weights is not None:
            kind, bits = promised(preset, modality)
            if "instead" in row.note and "fp8 channel" in row.note:
                kind, bits = "e4m3", 8  # a width that no group of the format divides
            assert (row.config.weights.kind, row.config.weights.bits) == (kind, bits)
            # Block scales of NVFP4 inputs are dynamic, their global scale is not.
            static = "static" in preset or (preset.startswith("nvfp4") and "a16" not in preset)
            assert row.config.static_input is (static and role != "patch_embed")
            assert (row.config.activations is None) is ("a16" in preset or role == "patch_embed")
            tuner = preset.partition("-")[0]
            assert row.config.tuner == (tuner if tuner in TUNERS else None)
    methods = set(preset.split("-"))
    # One outlier channel would set a whole input's static scale.
    smoothed = {"smoothquant"} if "static" in methods and "mquant" not in methods else set()
    assert {edge.transform for edge in plan.edges} == methods & {"awq", "smoothquant"} | smoothed
    assert bool(plan.towers) is bool(methods & {"rotation", "mquant"})
    assert any(row.outliers for row in plan.rows) is ("mquant" in methods)
