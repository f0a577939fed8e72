"""plan.json: what is written is read back as the same plan, and anything else is refused."""

from __future__ import annotations

import functools
import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from prismquant.errors import PlanError, RecipeError, StorageError
from prismquant.models.bind import bind
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import Plan
from prismquant.recipe.layer_config import LayerConfig, Options
from prismquant.recipe.presets import PRESETS
from prismquant.recipe.rule import LayerRule
from prismquant.recipe.schema import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# A convolution has no quantized input or output.
PLAIN = {"match": {"role": "patch_embed"}, "activations": "none", "outputs": "none"}
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "video_llama_3")
bound = functools.cache(bind)

RULE = st.fixed_dictionaries(
    {},
    optional={
        "match": st.sampled_from([{"modality": "llm"}, {"role": "mlp"}, {"modality": "vision"}]),
        "weights": st.sampled_from(["int4-g32", "int8-channel", "nvfp4", "mxfp4", "fp8-channel"]),
        "activations": st.sampled_from(["none", "int8-token", "int8-tensor-asym"]),
        "outputs": st.just("int8-tensor"),
        "solver": st.sampled_from(["rtn", "gptq"]),
        "options": st.sampled_from([{"scale_weighting": "none"}, {}]),
        "correction": st.sampled_from(["auto", "none", {"strength": 0.5}]),
        "tuner": st.sampled_from(["none", "autoround"]),
        "vision_weight": st.sampled_from([0.0, 1.0, 2.5, "gradient"]),
        "weight_range": st.sampled_from(["minmax", "mse", {"kind": "mse", "steps": 20}]),
        "activation_range": st.sampled_from(["ema", "minmax"]),
        "fallback": st.just("nearest"),
        "on_failure": st.sampled_from(["stop", "rtn"]),
        "skip": st.booleans(),
    },
)
TRANSFORM = st.sampled_from(
    [
        {"name": "rotation", "options": {"online": True}},
        {"name": "rotation", "match": {"modality": "vision"}, "options": {"seed": 3}},
        {"name": "split"},
        {"name": "smoothquant"},
        {"name": "awq", "options": {"grid": 5}},
    ]
)


def written(plan: Plan) -> Any:
    return json.loads(json.dumps(plan.to_dict()))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    family=st.sampled_from(FAMILIES),
    rules=st.lists(RULE, max_size=3),
    transforms=st.lists(TRANSFORM, max_size=2),
    kv_cache=st.sampled_from([None, "fp8", "int8-head-rotated"]),
    devices=st.sampled_from([1, 2]),
)
def test_a_plan_survives_being_written(
    tiny: Callable[..., Path],
    family: str,
    rules: list[dict[str, Any]],
    transforms: list[dict[str, Any]],
    kv_cache: str | None,
    devices: int,
) -> None:
    content = {
        "rules": [{"weights": "int8-channel"}, *(r for r in rules if set(r) - {"match"}), PLAIN],
        "transforms": transforms,
        "kv_cache": kv_cache,
        "tensor_parallel": devices,
    }
    try:
        plan = make_plan(load_recipe(content), bound(tiny(family)))
    except (PlanError, RecipeError):
        assume(False)
        return
    again = Plan.from_dict(written(plan))
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.fingerprint() == plan.fingerprint()
    assert again.to_dict() == plan.to_dict()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_of_every_preset_survives_being_written(
    preset: str, tiny: Callable[..., Path]
) -> None:
    plan = make_plan(load_recipe(preset), bound(tiny("qwen3_vl")))
    assert Plan.from_dict(written(plan)) == plan


@pytest.fixture
def content(tiny: Callable[..., Path]) -> Any:
    rule = {"weights": "int4-g32", "match": {"modality": "llm", "role": ["attn", "mlp"]}}
    return written(make_plan(load_recipe({"rules": [rule]}), bound(tiny("qwen2_vl"))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.update(version=0), "plan of version 0 cannot be read"),
        (lambda p: p.pop("version"), "plan of version None cannot be read"),
        (lambda p: p.pop("rows"), "plan.rows is missing"),
        (lambda p: p.update(extra=1), "plan.extra is unknown"),
        (lambda p: p.update(rows={}), "plan.rows cannot be"),
        (lambda p: p["rows"][3]["site"].pop("dtype"), r"plan.rows\[3\].site.dtype is missing"),
        (lambda p: p["rows"][3]["site"].update(dtype="int"), r"plan.rows\[3\].site.dtype cannot"),
        (lambda p: p["rows"][0].update(stored_bytes=1.5), r"rows\[0\].stored_bytes cannot be"),
        (lambda p: p["rows"][0].update(stored_bytes=7), "is not the sum of its rows"),
        (lambda p: p["rows"][0]["config"].update(solver=3), r"rows\[0\].config.solver cannot be"),
        (lambda p: p["rows"][-2]["config"]["weights"].update(bits=77), r"config.weights: .*77"),
        (lambda p: p["rows"][0]["config"].update(on_failure="go"), "on_failure cannot be 'go'"),
        (lambda p: p["calibration"].update(samples=-1), "plan.calibration: "),
        (lambda p: p.update(remarks=[1]), r"plan.remarks\[0\] cannot be '1'"),
        (lambda p: p.update(total_bytes=3), "total_bytes is not the sum of its rows"),
    ],
)
def test_anything_else_is_refused_with_its_place(
    content: Any, change: Callable[[Any], Any], said: str
) -> None:
    change(content)
    with pytest.raises(StorageError, match=said):
        Plan.from_dict(content)


@pytest.mark.parametrize("other", [None, [], "plan", 3])
def test_what_is_no_plan_at_all(other: Any) -> None:
    with pytest.raises(StorageError, match="plan of version None"):
        Plan.from_dict(other)


def test_a_rule_is_the_partial_form_of_a_layers_configuration() -> None:
    own = {"match", "fallback", "skip", "optional"}
    assert set(LayerRule.model_fields) - own == {field.name for field in fields(LayerConfig)}


def test_options_are_values() -> None:
    first, second = Options({"a": 1, "b": "x"}), Options({"b": "x", "a": 1})
    assert first == second == {"a": 1, "b": "x"}
    assert len({first, second, Options(), Options({"a": 2})}) == 3
    assert LayerConfig(options=first) == LayerConfig(options=second)
    assert hash(LayerConfig(options=first)) == hash(LayerConfig(options=second))
