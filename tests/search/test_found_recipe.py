"""A recipe of a mix, laid over the model, gives every layer its format and all the bytes told."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import yaml
from sensitivities import made, of_model

from prismquant.errors import PlanError
from prismquant.models.bind import bind
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.schema import load_recipe, parse_recipe
from prismquant.search.allocate import Mix, allocate
from prismquant.search.constraints import parse_constraints
from prismquant.search.found_recipe import FIRST_WORDS, recipe_of
from prismquant.search.offers import layer_formats
from prismquant.search.sensitivity import FLOAT, Choice, Sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prismquant.models.bound import BoundModel

OFFERED = "int4-g128,int3-g32,w8a8,fp8,int8-channel-asym,nvfp4,fp8-channel+fp8-tensor"


def random_mix(found: Sensitivity, seed: int) -> Mix:
    """Any option for any unit."""
    dice = random.Random(seed)
    formats = {unit.name: dice.choice(unit.options).format for unit in found.units}
    options = [
        next(o for o in unit.options if o.format == formats[unit.name]) for unit in found.units
    ]
    size = found.fixed_bytes + sum(option.stored_bytes for option in options)
    return Mix(formats, 0.0, {}, size, 0.0, 0, None, 0.0, "loss")


def require_laid_over(bound: BoundModel, found: Sensitivity, mix: Mix, text: str) -> None:
    """The plan of a recipe's text is what the mix says, layer by layer and byte for byte."""
    plan = make_plan(parse_recipe(yaml.safe_load(text), source="test"), bound)
    assert plan.total_bytes == mix.stored_bytes
    rows = {row.site.name: row for row in plan.rows}
    layers = [layer.name for unit in found.units for layer in unit.layers]
    assert sorted(layers) == sorted(rows)
    for unit in found.units:
        option = next(o for o in unit.options if o.format == mix.formats[unit.name])
        assert sum(rows[la.name].stored_bytes for la in unit.layers) == option.stored_bytes or (
            unit.kind == "kv_cache"
        )
        for layer in unit.layers:
            config = rows[layer.name].config
            wanted = layer_formats(layer.name, option, found)
            assert (config.weights, config.activations) == wanted
            if config.weights is not None:
                choice = found.formats[option.format]
                kind = (choice.weight_range or {}).get("kind", "minmax")
                assert config.weight_range.kind == kind
                assert (config.solver, dict(config.options)) == (
                    found.solver,
                    dict(found.solver_options),
                )
    caches = [u for u in found.units if u.kind == "kv_cache" and mix.formats[u.name] != FLOAT]
    assert (plan.kv_cache is not None) == bool(caches)


def test_random_mixes_come_back_from_their_recipes(tiny_folder: Path) -> None:
    bound = bind(tiny_folder)
    found = of_model(bound, 0, f"{OFFERED},kv:fp8")
    for seed in range(12):
        mix = random_mix(found, seed)
        require_laid_over(bound, found, mix, recipe_of(found, mix, parse_constraints({}), "x").text)


@pytest.mark.parametrize("bits", [23, 25, 28, 31])
def test_found_mixes_come_back_from_their_recipes(tiny: Callable[..., Path], bits: float) -> None:
    bound = bind(tiny("qwen3_vl"))
    found = of_model(bound, 1, OFFERED, disable=["*blocks.1*"], modalities=["llm", "vision"])
    constraints = parse_constraints({"bits": bits})
    mix = allocate(found, constraints)
    require_laid_over(bound, found, mix, recipe_of(found, mix, constraints, "x").text)


def test_layers_for_several_devices_stay_as_they_were_scored(tiny: Callable[..., Path]) -> None:
    """The recipe says over how many devices: a plan then refuses what it could not cut."""
    bound = bind(tiny("qwen3_vl"))
    found = of_model(bound, 2, OFFERED)
    constraints = parse_constraints({"bits": 24, "tensor_parallel": 2})
    mix = allocate(found, constraints)
    written = recipe_of(found, mix, constraints, "x")
    assert written.recipe.tensor_parallel == 2
    require_laid_over(bound, found, mix, written.text)


def test_other_options_of_ranges_and_solvers_are_said(tiny: Callable[..., Path]) -> None:
    bound = bind(tiny("qwen2_vl"))
    found = of_model(bound, 3, "int4-g32,int8-channel")
    ranged = {
        "int4-g32": replace(found.formats["int4-g32"], weight_range={"kind": "mse", "steps": 40}),
        "int8-channel": Choice(
            found.formats["int8-channel"].weights,
            weight_range={"kind": "percentile", "percentile": 0.999},
        ),
    }
    found = replace(found, formats=ranged, solver="rtn", solver_options={})
    for seed in range(4):
        mix = random_mix(found, seed)
        written = recipe_of(found, mix, parse_constraints({}), "x")
        require_laid_over(bound, found, mix, written.text)
        for row in make_plan(written.recipe, bound).quantized:
            rule = row.config.weight_range
            assert (rule.kind, rule.steps) in [("mse", 40), ("percentile", rule.steps)]
            if rule.kind == "percentile":
                assert rule.percentile == 0.999


def test_general_rules_come_first_and_short() -> None:
    """Eighty blocks of which three differ are three short rules."""
    found = made(0, blocks=80)
    formats = {unit.name: "int4-g128" for unit in found.units}
    formats |= {f"llm.{n}.mlp.up": "int8-channel" for n in (0, 40, 79)}
    formats |= {u.name: FLOAT for u in found.units if u.name.endswith("attn.qkv")}
    mix = replace(random_mix(found, 0), formats=formats)
    text = recipe_of(found, mix, parse_constraints({}), "x").text
    rules = yaml.safe_load(text)["rules"]
    assert [rule.get("match") for rule in rules] == [
        None,
        {"modality": ["vision", "llm"]},
        {"modality": "vision", "role": "attn.qkv"},
        {"modality": "llm", "role": "attn.qkv"},
        {"name": r"re:llm\.(0|40|79)\.mlp\.up"},
    ]
    assert len(text) < 900


def test_a_comment_cannot_break_out(tmp_path: Path) -> None:
    found = made(0)
    mix = allocate(found, parse_constraints({"bits": 5}))
    lines = [FIRST_WORDS.removeprefix("# "), "a\nrules: []", "b\r\x85\u2028- x: 1\ud800"]
    text = recipe_of(found, mix, parse_constraints({}), "x", lines).text
    assert text.startswith(FIRST_WORDS)
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe == recipe_of(found, mix, parse_constraints({}), "x").recipe


def test_a_mix_that_changes_nothing_is_no_recipe() -> None:
    found = made(0)
    mix = allocate(found, parse_constraints({"bits": 17}))
    assert set(mix.formats.values()) == {FLOAT}
    with pytest.raises(PlanError, match="leaves everything alone"):
        recipe_of(found, mix, parse_constraints({}), "x")
