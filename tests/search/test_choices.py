"""Units of choice: what they hold, what each option becomes, and bytes that add up exactly."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prismquant.check.planned_checkpoint import KV_CACHE, refusals
from prismquant.errors import ArgumentError
from prismquant.models.bind import bind
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.schema import parse_recipe
from prismquant.search.choices import Choices, make_choices
from prismquant.search.format_grammar import formats_on_offer, rule_of
from prismquant.search.sensitivity import FLOAT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

FORMATS = (
    "int4-g128,int8-channel,w4a8,fp8-channel+fp8-tensor,nvfp4,mxfp6,fp4-g16,kv:fp8,kv:int4-head"
)

bound = functools.cache(bind)


@functools.cache
def choices_of(folder: Path, formats: str = FORMATS, **options: Any) -> Choices:
    return make_choices(bound(folder), formats_on_offer(formats), **options)


def mixed_recipe(choices: Choices, mix: Mapping[str, str]) -> dict[str, Any]:
    """The recipe that gives each unit the option that a mix names."""
    rules: list[dict[str, Any]] = []
    for one in choices.units:
        name = mix[one.unit.name]
        if one.unit.kind == "layers" and name != FLOAT:
            match = {"name": [site.name for site in one.sites]}
            rules.append({"match": match} | rule_of(choices.formats[name]))
    rules.append({"match": {"role": "patch_embed"}, "activations": "none"})
    cache = mix.get(KV_CACHE, FLOAT)
    kv_cache = {} if cache == FLOAT else {"kv_cache": dict(choices.formats[cache].cache or {})}
    return {"rules": rules} | kv_cache


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_vl", {"tie": True}),
        ("qwen2_5_vl", {"dtype": torch.bfloat16}),
        ("qwen3_vl", {}),
        ("qwen3_vl", {"tie": True, "dtype": torch.float16}),
        ("video_llama_3", {}),
    ],
)
@settings(max_examples=12)
@given(data=st.data())
def test_options_and_fixed_bytes_add_up_to_the_bytes_of_any_mix(
    tiny: Callable[..., Path], family: str, options: dict[str, Any], data: st.DataObject
) -> None:
    folder = tiny(family, **options)
    choices = choices_of(folder)
    picked = {
        one.unit.name: data.draw(st.sampled_from(one.unit.options), label=one.unit.name)
        for one in choices.units
    }
    total = choices.fixed_bytes + sum(option.stored_bytes for option in picked.values())
    mix = {name: option.format for name, option in picked.items()}
    if set(mix.values()) == {FLOAT}:
        return
    plan = make_plan(parse_recipe(mixed_recipe(choices, mix), source="mix"), bound(folder))
    assert plan.total_bytes == total
    rows = {row.site.name: row for row in plan.rows}
    for one in choices.units:
        asked = one.rows.get(mix[one.unit.name], ())
        assert all(rows[row.site.name] == row for row in asked)


def test_nothing_chosen_is_the_source(tiny: Callable[..., Path], family: str) -> None:
    for tie in (False, True):
        folder = tiny(family, tie=tie)
        choices = choices_of(folder)
        floats = [one.unit.options[0] for one in choices.units]
        assert {option.format for option in floats} == {FLOAT}
        total = choices.fixed_bytes + sum(option.stored_bytes for option in floats)
        assert total == next(iter(choices.plans.values())).float_bytes
        layers = [layer for one in choices.units for layer in one.unit.layers]
        # All tensors are of float32.
        assert choices.fixed_weights + sum(layer.weights for layer in layers) == total // 4
        head = next(one for one in choices.units if one.unit.name == "lm_head")
        assert len(head.unit.options) == (1 if tie else 9 - 1)
        assert any("lm_head: its weight is tied" in note for note in choices.notes) == tie


def test_layers_that_readers_fuse_share_a_unit(tiny: Callable[..., Path], family: str) -> None:
    folder = tiny(family)
    choices = choices_of(folder)
    owners = {site.name: one.unit.name for one in choices.units for site in one.sites}
    assert list(owners) == [site.name for site in bound(folder).sites]
    keys = {site.name: site.fuse_key for site in bound(folder).sites}
    for one, key in keys.items():
        for other, same in keys.items():
            together = one == other or (key is not None and key == same)
            assert (owners[one] == owners[other]) == together
    names = [one.unit.name for one in choices.units]
    assert len(set(names)) == len(names)
    assert {one.unit.modality for one in choices.units} == {"vision", "projector", "llm"}
    assert "model.language_model.layers.1.mlp.{gate_proj,up_proj}" in names


def test_keys_and_values_are_one_unit(tiny: Callable[..., Path]) -> None:
    cache = choices_of(tiny("qwen3_vl", dtype=torch.bfloat16)).units[-1]
    assert (cache.unit.kind, cache.unit.layers) == ("kv_cache", ())
    # Two blocks, two key-value heads of 32, keys and values.
    numbers = 2 * 2 * 2 * 32
    options = {o.format: (o.cache_bytes, o.stored_bytes) for o in cache.unit.options}
    assert options == {
        FLOAT: (2 * numbers, 0),
        "kv:fp8": (numbers, 2 * 2 * 2),
        "kv:int4-head": (numbers // 2, 2 * 2 * 2 * 2),
    }


def left_alone(choices: Choices) -> set[str]:
    return {one.unit.name for one in choices.units if len(one.unit.options) == 1}


def test_modalities_that_are_left_out_are_left_alone(tiny: Callable[..., Path]) -> None:
    folder = tiny("qwen3_vl")
    every, llm = choices_of(folder), choices_of(folder, modalities=("llm",))
    assert left_alone(every) == set()
    assert left_alone(llm) == {o.unit.name for o in every.units if o.unit.modality != "llm"}
    assert "left alone: vision and projector" in llm.notes
    assert llm.fixed_bytes == every.fixed_bytes


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("*lm_head*", {"lm_head"}),
        (
            "*layers.0.self_attn.k_proj",
            {"model.language_model.layers.0.self_attn.{q_proj,k_proj,v_proj}"},
        ),
        (
            "model.language_model.layers.1.mlp",
            {
                "model.language_model.layers.1.mlp.{gate_proj,up_proj}",
                "model.language_model.layers.1.mlp.down_proj",
            },
        ),
    ],
)
def test_a_disabled_layer_fixes_its_whole_unit(
    tiny: Callable[..., Path], pattern: str, gone: set[str]
) -> None:
    folder = tiny("qwen3_vl")
    choices = choices_of(folder, disable=(pattern,))
    assert left_alone(choices) == gone
    assert len([note for note in choices.notes if "disabled" in note]) == len(gone)


def test_a_pattern_that_names_nothing_is_told(tiny: Callable[..., Path]) -> None:
    choices = choices_of(tiny("qwen3_vl"), disable=("vpm", "resampler.*"))
    assert "--disable 'vpm' names no layer" in choices.notes
    assert "--disable 'resampler.*' names no layer" in choices.notes


def test_shapes_that_do_not_fit_become_what_they_would_be(tiny: Callable[..., Path]) -> None:
    choices = choices_of(tiny("qwen3_vl"))
    patch = choices.units[0]
    options = {option.format: option for option in patch.unit.options}
    # 3 x 2 x 4 x 4 inputs: no group of 128; a convolution's input stays in floating point.
    assert patch.unit.layers[0].in_features == 96
    name = patch.sites[0].name
    assert options["int4-g128"].formats == {name: "int4-g32"}
    assert options["w4a8"].formats == {name: "int4-channel"}
    assert options["int8-channel"].formats == {}
    assert {o.stored_bytes for o in options.values()} == {options[FLOAT].stored_bytes}
    assert any(f"int4-g128: {name}: group size 128 does not" in note for note in choices.notes)


def test_nothing_to_choose_and_a_cache_without_its_model_are_refused(
    tiny: Callable[..., Path],
) -> None:
    model = bound(tiny("qwen3_vl"))
    with pytest.raises(ArgumentError, match="nothing is left to choose"):
        make_choices(model, formats_on_offer("w4a8"), disable=["*"])
    with pytest.raises(ArgumentError, match="language model is left out"):
        make_choices(model, formats_on_offer("w4a8,kv:fp8"), modalities=["vision"])


def test_readers_that_refuse_a_format_are_told(tiny: Callable[..., Path]) -> None:
    folder = tiny("qwen3_vl")
    choices = choices_of(folder)
    for one in choices.units:
        names = [site.name for site in one.sites] or [KV_CACHE]
        for option in one.unit.options[1:]:
            for reader in ("vllm", "transformers", "prismquant"):
                told = refusals(choices.plans[option.format], bound(folder), reader)
                reasons = [told[name] for name in names if name in told]
                assert option.refused.get(reader) == next(iter(reasons), None)
    refused = {(o.format, r) for one in choices.units for o in one.unit.options for r in o.refused}
    assert ("mxfp6", "vllm") in refused
    assert ("kv:int4-head", "vllm") in refused
    assert ("int8-channel", "transformers") not in refused


def test_a_cache_alone_can_be_chosen_for(tiny: Callable[..., Path]) -> None:
    choices = choices_of(tiny("qwen3_vl"), "kv:fp8,kv:int8")
    assert {len(one.unit.options) for one in choices.units[:-1]} == {1}
    assert [o.format for o in choices.units[-1].unit.options] == [FLOAT, "kv:fp8", "kv:int8"]
