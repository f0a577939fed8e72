"""Names of modules joined into few expressions: what they mean, and which of them mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, strategies

from prismquant.models.bind import bind
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.importers.module_names import named_modules
from prismquant.recipe.joined_names import START, join_names, joined_names
from prismquant.recipe.match import Match

PARTS = strategies.sampled_from(["a", "layers", "1", "10", "q_proj", "x-y", "c+d", "(e)", "|"])
STARTS = strategies.sampled_from(["", "", "model.", "model.layers.", "model.layers"])
NAMES = strategies.builds(
    lambda start, parts: start + ".".join(parts), STARTS, strategies.lists(PARTS, max_size=4)
).filter(bool)
PATTERNS = NAMES.map(lambda name: named_modules(name).pattern)
PATHS = NAMES | NAMES.map(lambda name: name.replace("model.layers", "model.language_model.layers"))


def patterns_of(joined: list[str]) -> dict[str, str]:
    """The name of each pattern, of patterns that were joined."""
    found = {}
    for one in joined:
        names = joined_names(one)
        assert names is not None
        found |= {named_modules(name).pattern: name for name in names.names}
    return found


@dataclass(frozen=True)
class Layer:
    name: str
    modality: str = "llm"
    role: str = "mlp.up"


@given(patterns=strategies.lists(PATTERNS, min_size=1, max_size=12), path=PATHS)
def test_joined_names_mean_what_they_mean_alone(patterns: list[str], path: str) -> None:
    joined = join_names(patterns)
    assert len(joined) <= 3
    assert Match(name=tuple(joined)).means(Layer(path)) == Match(name=tuple(patterns)).means(
        Layer(path)
    )


@given(patterns=strategies.lists(PATTERNS, min_size=1, max_size=12))
def test_they_come_apart_again(patterns: list[str]) -> None:
    assert patterns_of(join_names(patterns)).keys() == {*patterns}


@given(
    patterns=strategies.lists(PATTERNS, min_size=1, max_size=12),
    paths=strategies.lists(PATHS, max_size=6),
)
def test_a_name_is_idle_where_its_own_expression_is(patterns: list[str], paths: list[str]) -> None:
    layers = [Layer(path) for path in paths]
    idle = {one for one in patterns if not any(Match(name=(one,)).means(at) for at in layers)}
    joined = [joined_names(one) for one in join_names(patterns)]
    told = {name for names in joined if names is not None for name in names.idle(paths)}
    assert {named_modules(name).pattern for name in told} == idle


@given(text=strategies.text("re:(?.*\\|)ab", max_size=12))
def test_other_expressions_are_not_taken_apart(text: str) -> None:
    for pattern in (text, f"re:{text}", f"{START}{text}", f"{START}(?:{text})"):
        names = joined_names(pattern)
        if names is not None:
            assert all(Match(name=(pattern,)).means(Layer(name)) for name in names.names)
            assert names.idle(names.names) == []


def ignoring(names: list[str]) -> object:
    keys = {"scheme": "W8A8", "ignore": names}
    return {"quant_stage": {"quant_modifiers": {"QuantizationModifier": keys}}}


def test_names_of_a_long_list_that_mean_no_layer_are_told(tiny: Callable[..., Path]) -> None:
    real = [f"model.language_model.layers.{n}.mlp.down_proj" for n in range(2)]
    other = [f"model.language_model.layers.{n}.mlp.fc1" for n in range(300)]
    recipe = import_recipe(ignoring([*real, *other, "nowhere"])).recipe
    told = [one for one in make_plan(recipe, bind(tiny("qwen3_vl"))).remarks if "no layer" in one]
    assert len([one for one in told if "mlp.fc1" in one]) == 20
    assert any("each of 281 more such names means no layer" in one for one in told)
    assert not any("down_proj" in one for one in told)


def test_what_one_modifier_alone_ignores_is_told_where_it_means_no_layer(
    tiny: Callable[..., Path],
) -> None:
    first = {"scheme": "W8A8", "targets": ["re:.*mlp.*"], "ignore": ["lm_head", "vpm", "down_proj"]}
    second = {"scheme": "W8A8", "targets": ["re:.*attn.*"], "ignore": ["lm_head"]}
    content = {
        "a_stage": {"quant_modifiers": {"QuantizationModifier": first}},
        "b_stage": {"quant_modifiers": {"GPTQModifier": second}},
    }
    recipe = import_recipe(content).recipe
    plan = make_plan(recipe, bind(tiny("qwen3_vl")))
    [told] = [one for one in plan.remarks if "no layer" in one]
    assert "vpm" in told
    quantized = {row.site.name.rpartition(".")[2] for row in plan.quantized}
    assert "up_proj" in quantized
    assert "down_proj" not in quantized
