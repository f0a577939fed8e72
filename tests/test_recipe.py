"""Recipes: what they mean, that YAML and Python mean the same, and what is refused, where."""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prismquant.algorithms.correction import Correction
from prismquant.algorithms.split import Split
from prismquant.algorithms.table import EQUALIZERS, TUNERS
from prismquant.errors import RecipeError
from prismquant.formats.spec import spec
from prismquant.models.arch import Modality
from prismquant.models.bind import bind
from prismquant.models.rotation import Rotation
from prismquant.numerics.ranges import RangeRule
from prismquant.pipeline.plan import make_plan
from prismquant.recipe.presets import PRESETS, preset_yaml
from prismquant.recipe.schema import Match, Recipe, Setting, load_recipe, parse_recipe, resolve

if TYPE_CHECKING:
    from pathlib import Path


bound = functools.cache(bind)


def of(*rules: dict[str, Any], **more: Any) -> Recipe:
    return parse_recipe({"rules": list(rules), **more}, source="recipe.yaml")


def setting(
    *rules: dict[str, Any], modality: str = "llm", role: str = "mlp.up", name: str = "layers.0.up"
) -> Setting:
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
            "kind": st.sampled_from(["minmax", "mse", "percentile"]),
            "steps": st.integers(2, 90),
            "norm": st.sampled_from([2.0, 2.4]),
        },
    ),
    "activation_range": st.fixed_dictionaries(
        {"kind": st.sampled_from(["minmax", "ema"])}, optional={"momentum": st.just(0.5)}
    ),
    "fallback": st.sampled_from(["error", "channel"]),
    "skip": st.booleans(),
}
RULES = st.lists(
    st.tuples(
        st.booleans(),
        st.fixed_dictionaries({}, optional=FIELDS).filter(bool),
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
    merged = setting(*rules, name="a")
    assert merged.rules == (0, *(i for i, (on, _) in enumerate(drawn, start=1) if on))
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
    assert merged.fallback == table.get("fallback", "error")
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
    towers = (Modality.VISION, Modality.LLM)
    assert recipe.transforms[1].rotations(towers) == (Rotation(Modality.LLM, online=True, seed=3),)
    assert recipe.transforms[2].split() == Split()
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    longer = recipe.with_transforms({"name": "smoothquant"}, name="longer")
    assert longer.transforms[:3] == recipe.transforms
    assert (longer.transforms[3].name, longer.name) == ("smoothquant", "longer")
    assert len(recipe.transforms) == 3
    everywhere = of({"weights": "int8-channel"}, transforms=[{"name": "rotation"}])
    found = everywhere.transforms[0].rotations(towers)
    assert found == (Rotation(Modality.VISION), Rotation(Modality.LLM))


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
        ("attn.qk", "attn.qkv", False),
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


@pytest.mark.parametrize("source", [*PRESETS, "FULL"])
def test_every_recipe_survives_being_written_down(source: str, tmp_path: Path) -> None:
    """Through YAML and through JSON, twice, with the same meaning and the same text."""
    recipe = load_recipe(yaml.safe_load(FULL) if source == "FULL" else source)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    if source in PRESETS:
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
            "rules[0].weight_range: there is no range rule 'mes'; did you mean 'mse'?",
        ),
        ({"rules": [{"match": {"modality": "text"}, "skip": True}]}, "rules[0].match.modality[0]"),
        (
            {"rules": [{"match": {"name": "re:("}, "skip": True}]},
            "rules[0].match.name: 're:(' is not a regular expression",
        ),
        ({"rules": [{"fallback": "chanel"}]}, "rules[0].fallback: Input should be"),
        ({"rules": [{"weights": "none"}]}, "rules[0].weights: a weight has a format; `skip: true`"),
        ({"rules": [{"weights": 4}]}, "rules[0].weights: expected a name or a mapping, found 4"),
        ({"rules": [{"weight_range": {"norm": "x"}}]}, "rules[0].weight_range: a value of"),
        ({"rules": [{"weight_range": {"norm": -1}}]}, "rules[0].weight_range: norm of a range"),
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
            "transforms[0]: 0 columns cannot be split off",
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
            "rules[0].correction: a correction of strength 2.0 is out of bounds",
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
            "rules[0]: there cannot be 0 iterations",
        ),
        ({"rules": [{"outputs": "int8-tokn"}]}, "rules[0].outputs:"),
        ({"rules": [{"vision_weight": -1.0}]}, "rules[0].vision_weight: a token's weight is"),
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
    with pytest.raises(RecipeError, match="no preset and no file"):
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
        assert (row.weights is not None) is wanted, row.site.name
        if row.weights is not None:
            kind, bits = promised(preset, modality)
            if "instead" in row.note and "fp8 channel" in row.note:
                kind, bits = "e4m3", 8  # a width that no group of the format divides
            assert (row.weights.kind, row.weights.bits) == (kind, bits)
            # Block scales of NVFP4 inputs are dynamic, their global scale is not.
            static = "static" in preset or (preset.startswith("nvfp4") and "a16" not in preset)
            assert row.static_input is (static and role != "patch_embed")
            assert (row.activations is None) is ("a16" in preset or role == "patch_embed")
            tuner = preset.partition("-")[0]
            assert row.tuner == (tuner if tuner in TUNERS else None)
    methods = set(preset.split("-"))
    # One outlier channel would set a whole input's static scale.
    smoothed = {"smoothquant"} if "static" in methods and "mquant" not in methods else set()
    assert {edge.equalizer for edge in plan.edges} == methods & EQUALIZERS.keys() | smoothed
    assert bool(plan.rotations) is bool(methods & {"rotation", "mquant"})
    assert any(row.split for row in plan.rows) is ("mquant" in methods)
