"""Plans: every row and every byte is known before the work, and so is every misfit."""

from __future__ import annotations

import functools
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch

import prismquant as pq
from prismquant import shards
from prismquant.errors import ModelError, PlanError, PrismQuantError, RecipeError
from prismquant.formats.spec import NumberSpec, spec
from prismquant.models.bind import bind
from prismquant.opening import read_json
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import Plan, PlanRow, problem_groups
from prismquant.recipe.presets import PRESETS
from prismquant.recipe.schema import load_recipe
from prismquant.shards import ShardReader
from prismquant.storage import write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LLM = {"match": {"modality": "llm", "role": ["attn", "mlp"]}}
CHANNEL = LLM | {"weights": "int8-channel", "solver": "rtn"}


bound = functools.cache(bind)


def plan_of(folder: Path, *rules: dict[str, Any], **calibration: Any) -> Plan:
    recipe = load_recipe({"rules": list(rules), "calibration": calibration})
    return make_plan(recipe, bound(folder))


def tensor_bytes(folder: Path) -> dict[str, int]:
    reader = ShardReader(folder)
    return {name: reader.info(name).nbytes for name in reader.names}


def check_bytes(plan: Plan, folder: Path) -> None:
    """Every row's bytes, and the sum, are those that lie on the disk."""
    written = tensor_bytes(folder)
    for row in plan.rows:
        prefix = f"{row.site.disk_name}."
        own = {n.removeprefix(prefix): b for n, b in written.items() if n.startswith(prefix)}
        own.pop("bias", None)
        assert sum(own.values()) == row.stored_bytes, (row.site.name, own)
    assert sum(written.values()) == plan.total_bytes
    index = read_json(folder / shards.INDEX_NAME)
    assert index["metadata"]["total_size"] == plan.total_bytes


# Bytes


# `w4a16-all` does all that `w4a16` does: the shorter ones, and those that differ from them in the
# method alone, are tried on one family only; on the others all presets are slow.
PAIRS = [
    pytest.param(preset, family, marks=[pytest.mark.slow] * (family != "qwen2_5_vl"))
    for preset in PRESETS
    for family in tiny_vlm.FAMILIES
    if preset.endswith("-all") or preset.startswith(("vision", "mquant")) or family == "qwen2_5_vl"
]


@pytest.mark.parametrize(("preset", "family"), PAIRS)
def test_predicted_bytes_are_the_bytes_that_are_written(
    preset: str, family: str, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    tiny_folder = tiny(family)
    plain = {"solver": "rtn", "weight_range": "minmax", "tuner": "none"}
    recipe = load_recipe(preset).with_rules(plain)
    result = pq.quantize(
        tiny_folder, recipe.with_calibration(samples=3), tmp_path, calibration_file
    )
    check_bytes(result.plan, tmp_path)
    assert result.plan.float_bytes == sum(tensor_bytes(tiny_folder).values())
    # What is stored dequantized saves nothing.
    dense = all(row.stored_dense for row in result.plan.quantized)
    assert dense == (result.plan.total_bytes == result.plan.float_bytes)
    assert result.plan.total_bytes <= result.plan.float_bytes
    assert json.loads(json.dumps(result.plan.to_dict())) == read_json(
        tmp_path / "prismquant" / "plan.json"
    )


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("int8-tensor", "int8-tensor-asym"),
        ("int4-g32-asym", "int8-token-asym"),
        ("int5-channel-asym", None),
        ("int2-g64", None),
        ("int8-g64", "int8-token"),
        ("int3-channel-asym", "int8-tensor"),
    ],
)
def test_bytes_of_unusual_formats_in_half_precision(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    weights: str,
    activations: str | None,
) -> None:
    """Zero points, odd widths, scales in bfloat16."""
    rule = CHANNEL | {"weights": weights} | ({"activations": activations} if activations else {})
    folder = tiny("qwen2_vl", dtype=torch.bfloat16)
    recipe = load_recipe({"rules": [rule], "calibration": {"samples": 2}})
    result = pq.quantize(folder, recipe, tmp_path, calibration_file, dtype=torch.float32)
    check_bytes(result.plan, tmp_path)


ROTATED: dict[str, Any] = {"name": "rotation", "options": {"online": True}}
SPLIT: dict[str, Any] = {"name": "split", "options": {"threshold": 1.01, "columns": 3}}
ALL = {"weights": "int8-g16", "solver": "rtn", "weight_range": "minmax"}


@pytest.mark.parametrize(
    ("rule", "transforms"),
    [
        (ALL, [ROTATED]),
        (ALL | {"activations": "int8-token"}, [ROTATED, SPLIT]),
        (ALL | {"outputs": "int8-tensor-asym", "activations": "int8-tensor"}, []),
        (ALL | {"outputs": "int8-token", "weights": "int8-channel"}, [SPLIT]),
        (ALL | {"weights": "fp8-channel", "activations": "fp8-token"}, [ROTATED, SPLIT]),
        (ALL | {"weights": "fp8-tensor", "activations": "fp8-tensor"}, []),
        (ALL | {"weights": "fp4-g16"}, [ROTATED]),
        (ALL | {"weights": "fp8-e5m2-channel"}, [ROTATED]),
    ],
)
@pytest.mark.parametrize("tie", [False, True])
def test_bytes_of_what_lies_beside_the_weights(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    rule: dict[str, Any],
    transforms: list[dict[str, Any]],
    tie: bool,
) -> None:
    """Signs, split columns, scales of outputs, a head that is no longer tied, dense formats."""
    family = "qwen2_5_vl" if tie else "video_llama_3"
    folder = tiny(family, tie=tie, dtype=torch.bfloat16)
    plain = {"match": {"role": "patch_embed"}, "activations": "none", "outputs": "none"}
    rules = [rule, plain]
    if tie and ROTATED not in transforms:
        rules.append({"match": {"role": "lm_head"}, "skip": True})
    recipe = load_recipe(
        {"rules": rules, "transforms": transforms, "calibration": {"samples": 3}},
    )
    result = pq.quantize(folder, recipe, tmp_path, calibration_file)
    check_bytes(result.plan, tmp_path)


def test_bytes_of_a_checkpoint_of_two_types(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Norms and patch embedding in float32, all else in bfloat16: scales follow the majority."""
    folder, out = tmp_path / "mixed", tmp_path / "out"
    shutil.copytree(tiny("qwen2_vl", dtype=torch.bfloat16), folder)
    reader = ShardReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    for name in tensors:
        if "norm" in name or "patch_embed" in name:
            tensors[name] = tensors[name].float()
    write_tensors(folder / "model.safetensors", tensors)
    recipe = load_recipe("w8a8-all").with_rules({"solver": "rtn"})
    check_bytes(pq.quantize(folder, recipe, out).plan, out)


def test_weights_in_float64_are_refused_by_name_and_copied_elsewhere(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = shutil.copytree(tiny("qwen2_vl"), tmp_path / "wide"), tmp_path / "out"
    reader = ShardReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"):
        tensors[name] = tensors[name].double()
    write_tensors(folder / "model.safetensors", tensors)
    words = r"layers\.1\.mlp\.down_proj: its weight is stored as float64"
    with pytest.raises(PlanError, match=words) as caught:
        plan_of(folder, CHANNEL)
    assert "float32, bfloat16 or float16" in str(caught.value.remedy)
    left = {"match": {"name": "*.layers.1.mlp.down_proj"}, "skip": True}
    pq.quantize(folder, {"rules": [CHANNEL, left]}, out)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(ShardReader(out).read(name), tensors[name])


def test_a_cache_of_keys_in_float64_is_refused_by_name(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny("qwen2_vl"), tmp_path / "wide")
    reader = ShardReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    name = "model.layers.1.self_attn.k_proj.weight"
    write_tensors(folder / "model.safetensors", tensors | {name: tensors[name].double()})
    rule = {"match": {"modality": "llm", "role": "mlp"}, "weights": "int8-channel"}
    recipe = {"rules": [rule], "kv_cache": "fp8"}
    with pytest.raises(PlanError, match=r"layers\.1\.self_attn\.k_proj is stored as float64"):
        pq.inspect(folder, recipe)


def test_totals_add_up_and_each_modality_has_its_own(tiny_folder: Path) -> None:
    plan = make_plan(load_recipe("w4a16"), bound(tiny_folder))
    totals = plan.totals()
    assert set(totals) == {"vision", "projector", "llm"}
    assert sum(entry["layers"] for entry in totals.values()) == len(plan.rows)
    assert sum(entry["quantized"] for entry in totals.values()) == len(plan.quantized) == 2 * 7
    stored = sum(entry["stored_bytes"] for entry in totals.values())
    assert stored + plan.other_bytes == plan.total_bytes
    assert totals["vision"]["quantized"] == totals["projector"]["quantized"] == 0
    assert totals["vision"]["float_bytes"] == totals["vision"]["stored_bytes"]
    assert totals["llm"]["stored_bytes"] < totals["llm"]["float_bytes"]


def test_rows_are_in_the_order_of_the_work_and_say_everything(tiny: Callable[..., Path]) -> None:
    plan = plan_of(tiny("qwen2_vl"), CHANNEL | {"activations": "int8-tensor"})
    assert [row.site.step for row in plan.rows] == sorted(row.site.step for row in plan.rows)
    written = json.loads(json.dumps(plan.to_dict()))["rows"]
    said = next(r for r in written if r["site"]["name"].endswith("layers.0.self_attn.q_proj"))
    assert NumberSpec.from_dict(said["config"]["weights"]) == spec("int8-channel")
    assert NumberSpec.from_dict(said["config"]["activations"]) == spec("int8-tensor")
    assert said["layout"] == "int-quantized"
    site = said["site"]
    assert (site["modality"], site["role"], site["weight_shape"]) == (
        *("llm", "attn.qkv.q"),
        [128, 128],
    )
    assert site["disk_name"] == "model.layers.0.self_attn.q_proj"
    left = next(row for row in written if row["site"]["role"] == "patch_embed")
    assert left["config"]["weights"] is None
    assert left["note"] == "no rule gives it a weight format"


@pytest.mark.parametrize(
    ("weights", "activations", "layout"),
    [
        ("int8-channel", "int8-token", "int-quantized"),
        ("int8-tensor", "int8-tensor", "int-quantized"),
        ("int8-channel", None, "pack-quantized"),
        ("int4-channel", "int8-token", "pack-quantized"),
        ("int8-channel-asym", "int8-token", "pack-quantized"),
        ("int8-g128", "int8-token", "pack-quantized"),
        ("int4-g128", None, "pack-quantized"),
    ],
)
def test_layouts_are_those_that_servers_expect(
    tiny: Callable[..., Path], weights: str, activations: str | None, layout: str
) -> None:
    rule = LLM | {"weights": weights} | ({"activations": activations} if activations else {})
    assert {row.layout for row in plan_of(tiny("qwen2_vl"), rule).quantized} == {layout}


def test_layers_that_share_an_input_and_a_scheme_are_solved_together(
    tiny: Callable[..., Path],
) -> None:
    folder = tiny("qwen2_vl")
    rows = [r for r in plan_of(folder, CHANNEL).quantized if ".layers.0." in r.site.name]
    groups = [[row.site.role for row in group] for group in problem_groups(rows)]
    assert groups == [
        ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v"],
        ["attn.out"],
        ["mlp.gate", "mlp.up"],
        ["mlp.down"],
    ]
    other = {"match": {"role": "attn.qkv.k"}, "weight_range": "mse"}
    rows = [r for r in plan_of(folder, CHANNEL, other).quantized if ".layers.0." in r.site.name]
    assert sorted(len(group) for group in problem_groups(rows)) == [1, 1, 1, 2, 2]


# Data and identity


@pytest.mark.parametrize(
    ("rules", "needed"),
    [
        ([CHANNEL], False),
        ([CHANNEL | {"activations": "int8-token"}], False),
        ([CHANNEL | {"activations": "int8-tensor"}], True),
        ([CHANNEL | {"solver": "gptq"}], True),
        ([CHANNEL, {"match": {"role": "mlp.down"}, "solver": "gptq"}], True),
        # The only layers that would need data are left alone.
        ([CHANNEL, {"match": {"role": "mlp.down"}, "solver": "gptq", "skip": True}], False),
        ([CHANNEL, {"match": {"modality": "vision"}, "solver": "gptq"}], False),
    ],
)
def test_whether_data_are_needed_is_known_beforehand(
    tiny: Callable[..., Path], rules: list[dict[str, Any]], needed: bool
) -> None:
    assert plan_of(tiny("qwen2_vl"), *rules).needs_data is needed


def test_whether_data_are_needed_is_looked_up_once(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forecast of the memory asks for each step and each placement."""
    recipe = load_recipe("w8a8").with_rules({"solver": "rtn", "fallback": "nearest"})
    plan = make_plan(recipe, bind(tiny("qwen3_vl")))
    asked, real = [], PlanRow.needs_data.fget  # type: ignore[attr-defined]

    def counted(row: PlanRow) -> bool:
        asked.append(row)
        return bool(real(row))

    monkeypatch.setattr(PlanRow, "needs_data", property(counted))
    assert not any(plan.needs_data for _ in range(5))
    assert len(asked) == len(plan.quantized)
    assert Plan.from_dict(plan.to_dict()) == plan


BASE = LLM | {"weights": "int4-g64", "activations": "int8-tensor", "solver": "gptq"}


@pytest.mark.parametrize(
    "rule",
    [
        {"weights": {"bits": 3}},
        {"weights": {"group_size": 32}},
        {"weights": {"granularity": "channel"}},
        {"weights": {"symmetric": False}},
        {"weights": {"narrow": True}},
        {"activations": "none"},
        {"activations": {"bits": 7}},
        {"activations": {"symmetric": False}},
        {"activations": {"narrow": True}},
        {"activations": "int8-token"},
        {"solver": "rtn"},
        {"options": {"damping": 0.5}},
        {"weight_range": "mse"},
        {"weight_range": {"kind": "mse", "norm": 2.0}},
        {"weight_range": {"kind": "mse", "steps": 20}},
        {"weight_range": {"kind": "mse", "max_shrink": 0.5}},
        {"weight_range": {"kind": "percentile"}},
        {"weight_range": {"kind": "percentile", "percentile": 0.9}},
        {"activation_range": "ema"},
        {"activation_range": {"kind": "ema", "momentum": 0.9}},
        {"match": {"role": "mlp.down"}, "skip": True},
        {"match": {"role": "mlp.down", "modality": "llm"}, "weights": {"bits": 8}},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_every_field_of_a_rule(
    tiny: Callable[..., Path], rule: dict[str, Any]
) -> None:
    folder = tiny("qwen2_vl")
    seen = {plan_of(folder, BASE).fingerprint(), plan_of(folder, BASE, LLM | rule).fingerprint()}
    kind = rule.get("weight_range") or rule.get("activation_range")
    if isinstance(kind, dict):
        name = next(key for key in rule if key.endswith("range"))
        seen.add(plan_of(folder, BASE, LLM | {name: kind["kind"]}).fingerprint())
        assert len(seen) == (2 if len(kind) == 1 else 3)
    else:
        assert len(seen) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 7},
        {"batch_size": 3},
        {"seed": 1},
        {"layer_sequential": False},
        {"block_sequential": False},
        {"quantized_inputs": False},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_the_calibration(
    tiny: Callable[..., Path], change: dict[str, Any]
) -> None:
    folder = tiny("qwen2_vl")
    assert plan_of(folder, BASE).fingerprint() != plan_of(folder, BASE, **change).fingerprint()


def test_the_fingerprint_is_of_what_is_done_not_of_how_it_is_said(
    tiny: Callable[..., Path],
) -> None:
    """Another name, other words, or a rule without effect do not stop a run from being resumed."""
    model, base = bound(tiny("qwen2_vl")), load_recipe({"rules": [BASE]})
    first = make_plan(base, model)
    assert first.fingerprint() == make_plan(base, bind(model.folder)).fingerprint()
    renamed = make_plan(base.with_rules(LLM | {"weights": {"bits": 4}}, name="other"), model)
    assert renamed.recipe != first.recipe
    assert renamed.fingerprint() == first.fingerprint()
    assert make_plan(base, bound(tiny("qwen3_vl"))).fingerprint() != first.fingerprint()


# Misfits


def test_a_group_size_that_does_not_divide_names_layer_width_and_remedies(
    tiny: Callable[..., Path],
) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(tiny("qwen2_vl"), LLM | {"weights": "int4-g96"})
    message = str(caught.value)
    blocks = "model.language_model.layers.*"
    misfit = "group size 96 does not divide its 128 input features; 128, 64, 32 would"
    assert f"- {blocks}.self_attn.q_proj: {misfit} (2 layers: 0-1)\n" in message
    # The wider ones with what fits them.
    assert f"- {blocks}.mlp.down_proj: group size 96 does not divide its 256" in message
    # One finding for each role and width, and the remedy of all of them once.
    assert message.count("group size 96") == 7
    assert message.count("--fallback") == 1
    assert "fallback: nearest (--fallback)" in str(caught.value.remedy)


def test_findings_of_a_deep_model_fit_on_a_screen(tmp_path: Path) -> None:
    """Layers that say the same are one line, however many blocks there are."""
    folder = tiny_vlm.build("qwen2_vl", tmp_path, llm_blocks=24)
    with pytest.raises(PlanError) as caught:
        plan_of(folder, {"match": {"role": ["attn", "mlp"]}, "weights": "int4-g96"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 7 + 4 + 2
    assert sum("(24 layers: 0-23)" in line for line in lines) == 7


def test_a_group_size_may_fall_back_to_one_scale_a_row(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Only where it does not divide, and the plan says so."""
    rule = CHANNEL | {"weights": "int4-g256", "fallback": "channel"}
    result = pq.quantize(tiny("qwen2_vl"), {"rules": [rule]}, tmp_path)
    for row in result.plan.quantized:
        wide = row.site.in_features == 256
        assert row.config.weights == spec("int4-g256" if wide else "int4-channel")
        misfit = "group size 256 does not divide its 128 input features: int4 channel sym instead"
        assert row.note == ("" if wide else misfit)
    check_bytes(result.plan, tmp_path)


@pytest.mark.parametrize("size", [3, 7, 24, 96, 256])
@pytest.mark.parametrize("fallback", ["channel", "nearest"])
@pytest.mark.parametrize("inputs", ["none", "int8-token", "group"])
def test_every_layer_that_falls_back_stands_in_a_remark(
    tiny: Callable[..., Path], size: int, fallback: str, inputs: str
) -> None:
    """And no layer that is as the recipe has it."""
    rule = CHANNEL | {"weights": f"int4-g{size}", "fallback": fallback}
    rule |= {"activations": f"int8-g{size}-dyn" if inputs == "group" else inputs}
    plan = plan_of(tiny("qwen2_vl"), rule, {"match": {"role": "patch_embed"}, "skip": True})
    fallen: dict[str, list[str]] = {}
    for row in plan.quantized:
        if row.config.weights != spec(f"int4-g{size}"):
            assert row.site.in_features % size
            assert row.config.weights is not None
            assert row.config.weights.describe() in row.note
            assert (row.config.activations or spec("int8-token")) == spec("int8-token")
            assert ("inputs in int8 token" in row.note) == (inputs == "group")
            fallen.setdefault(row.note, []).append(row.site.name)
    assert fallen
    told = [line for line in plan.remarks if " instead: " in line]
    assert len(told) == len(fallen)
    for note, names in fallen.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        assert f"{note}: {names[0]}{more}" in told


def test_a_rule_that_matches_nothing_is_an_error(tiny: Callable[..., Path]) -> None:
    idle = {"match": {"role": "attn.qkv.q", "modality": "vision"}, "skip": True}
    with pytest.raises(PlanError, match=r"rules\[1\] matches no layer") as caught:
        plan_of(tiny("qwen2_vl"), CHANNEL, idle)
    message = str(caught.value)
    assert "attn.qkv.q" in message
    assert "roles: attn.out, attn.qkv, attn.qkv.k" in message
    assert "modalities: llm, projector, vision" in message
    assert "inspect" in str(caught.value.remedy)
    assert "search" not in str(caught.value.remedy)
    found = {"file": "of/s.json", "sha256": "0" * 64}
    recipe = load_recipe({"rules": [CHANNEL, idle], "sensitivity": found})
    with pytest.raises(PlanError) as caught:
        make_plan(recipe, bound(tiny("qwen2_vl")))
    remedy = str(caught.value.remedy)
    assert remedy.startswith("a search found the recipe for the model that of/s.json was analyzed")


def test_a_layer_that_is_skipped_says_by_which_rule(tiny: Callable[..., Path]) -> None:
    skip = {"match": {"role": ["attn.out", "mlp.down"]}, "skip": True}
    again = {"match": {"role": "mlp.down", "modality": "llm"}, "weights": "int8-channel"}
    notes = {
        (row.site.modality.value, row.site.role): row.note
        for row in plan_of(tiny("qwen2_vl"), CHANNEL, skip, again).rows
    }
    assert notes["llm", "attn.out"] == "skipped by rules[1]"
    assert notes["llm", "mlp.down"] == notes["llm", "attn.qkv.q"] == ""
    assert notes["vision", "patch_embed"] == "no rule gives it a weight format"


@pytest.mark.parametrize(
    ("torn", "shown"),
    [
        (
            {"match": {"role": "attn.qkv.q"}, "weights": {"bits": 4}},
            "attn.qkv.q: int4 channel sym; attn.qkv.k: int8 channel sym; attn.qkv.v: int8",
        ),
        ({"match": {"role": "attn.qkv.v"}, "skip": True}, "attn.qkv.v: float"),
        (
            {"match": {"role": "mlp.gate"}, "activations": "int8-token"},
            "mlp.gate: int8 channel sym, input int8 token dyn; mlp.up: int8 channel sym",
        ),
        ({"match": {"role": "mlp.up"}, "weights": "int8-g64"}, "mlp.up: int8 g64 sym"),
    ],
)
def test_layers_that_servers_fuse_must_share_a_scheme(
    tiny_folder: Path, torn: dict[str, Any], shown: str
) -> None:
    torn = torn | {"match": torn["match"] | {"modality": "llm", "name": "*.layers.1.*"}}
    with pytest.raises(PlanError, match=re.escape(shown)) as caught:
        plan_of(tiny_folder, CHANNEL, torn)
    assert ".layers.1." in caught.value.what
    assert ".layers.0." not in caught.value.what
    assert "must share a scheme" in caught.value.what


def test_fused_layers_may_differ_in_how_their_codes_are_chosen(tiny_folder: Path) -> None:
    other = {"match": {"role": "attn.qkv.q", "modality": "llm"}, "weight_range": "mse"}
    assert len(plan_of(tiny_folder, CHANNEL, other).quantized) == 14


def test_a_tied_head_is_refused_by_name(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("qwen2_vl", tie=True)
    with pytest.raises(PlanError, match="lm_head: its weight is tied to the input embeddings"):
        plan_of(folder, {"weights": "int8-channel", "match": {"modality": "llm"}})
    plan = plan_of(folder, CHANNEL)
    head = next(row for row in plan.rows if row.site.role == "lm_head")
    assert head.float_bytes == head.stored_bytes == 0
    check_bytes(pq.quantize(folder, {"rules": [CHANNEL]}, tmp_path).plan, tmp_path)


def test_an_untied_head_can_be_quantized(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rule = CHANNEL | {"match": {"modality": "llm"}}
    result = pq.quantize(tiny("qwen2_vl"), {"rules": [rule]}, tmp_path)
    assert result.plan.quantized[-1].site.role == "lm_head"
    check_bytes(result.plan, tmp_path)


def test_a_patch_embedding_cannot_have_its_input_quantized(tiny_folder: Path) -> None:
    rule = {"match": {"modality": "vision"}, "weights": "int8-channel"}
    with pytest.raises(PlanError, match="no checkpoint format declares a quantized input") as info:
        plan_of(tiny_folder, rule | {"activations": "int8-token"})
    assert info.value.remedy == "set activations: none for the role patch_embed"
    plan = plan_of(tiny_folder, rule)
    patch = next(row for row in plan.rows if row.site.role == "patch_embed")
    assert (patch.layout, patch.note) == ("dense", "a convolution is stored dequantized")
    assert patch.stored_bytes == patch.float_bytes


@pytest.mark.parametrize("rules", [[{"solver": "rtn"}], [CHANNEL, {"skip": True}]])
def test_a_recipe_that_quantizes_nothing_is_an_error(
    tiny: Callable[..., Path], rules: list[dict[str, Any]]
) -> None:
    with pytest.raises(PlanError, match="no layer is quantized"):
        plan_of(tiny("qwen2_vl"), *rules)


def test_all_misfits_are_told_together_and_long_lists_are_cut(tiny: Callable[..., Path]) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(
            tiny("qwen2_vl", llm_blocks=4),
            {"match": {"modality": ["llm", "vision"]}, "weights": "int4-g96"},
            *({"match": {"name": f"nothing{i}"}, "skip": True} for i in range(30)),
        )
    assert "rules[1] matches no layer" in caught.value.what
    assert re.search(r"- and \d+ more$", caught.value.what)
    assert any("rules[30]" in finding for finding in caught.value.findings)
    assert len(caught.value.what.splitlines()) == 22


def test_words_of_a_list_that_mean_no_layer_are_told(tiny: Callable[..., Path]) -> None:
    """A model without them is no error: recipes are written for many; but they are said."""
    rule = LLM | {"weights": "int8-channel"}
    names = ["*.q_proj", "*.q_porj", "re:.*k_proj", "re:.*k_porj"]
    plan = plan_of(
        tiny("qwen2_vl"),
        rule | {"match": {"modality": "llm", "role": ["mlp", "patch_embed"]}},
        {"match": {"name": names}, "solver": "rtn"},
    )
    assert plan.remarks == (
        "rules[0].match: role 'patch_embed' means no layer of this model",
        "rules[1].match: name '*.q_porj' means no layer of this model",
        "rules[1].match: name 're:.*k_porj' means no layer of this model",
    )
    assert plan_of(tiny("qwen2_vl"), rule).remarks == ()


def test_a_head_says_that_no_tuner_reaches_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_vlm.build("qwen2_vl", tmp_path, tie=False)
    tuned = {"match": {"modality": "llm"}, "weights": "int8-channel", "tuner": "autoround"}
    head, layer = (plan_of(folder, tuned).rows[i] for i in (-1, -2))
    assert (head.site.role, head.config.tuner) == ("lm_head", None)
    assert head.note == "autoround tunes blocks, not the head"
    assert (layer.config.tuner, layer.note) == ("autoround", "")


def test_a_pattern_that_runs_away_is_stopped(tiny: Callable[..., Path]) -> None:
    names = {"name": "re:([a-z_.0-9]|[a-z_.0-9][a-z_.0-9])+[A-C]"}
    with pytest.raises(PrismQuantError, match="takes too long"):
        plan_of(tiny("qwen2_vl"), {"match": names, "weights": "int8-channel"})


def test_impossible_fields_name_the_layer(tiny: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="needs 'bits'") as caught:
        plan_of(tiny("qwen2_vl"), {"weights": {"granularity": "channel"}})
    assert "model.visual.patch_embed.proj (vision, patch_embed)" in str(caught.value.where)


# Transforms


def transformed(folder: Path, *transforms: dict[str, Any], **rule: Any) -> Plan:
    recipe = load_recipe(
        {"rules": [LLM | {"weights": "int4-g32"} | rule], "transforms": transforms}
    )
    return make_plan(recipe, bound(folder))


@pytest.mark.parametrize(
    ("transforms", "what"),
    [
        (
            [{"name": "rotation"}, {"name": "rotation", "match": {"modality": "llm"}}],
            "rotated twice",
        ),
        ([{"name": "awq", "match": {"modality": "vision"}}], "transforms[0] (awq) matches no edge"),
        ([{"name": "awq", "match": {"role": "lm_head"}}], "transforms[0] (awq) matches no edge"),
        (
            [{"name": "rotation"}, {"name": "split", "match": {"modality": "vision"}}],
            "transforms[1] (split) matches no layer that is stored quantized",
        ),
        (
            [{"name": "rotation", "match": {"modality": ["projector", "llm"]}}],
            "transforms[0]: the projector is not rotated itself",
        ),
        (
            [{"name": "rotation", "options": {"online": True, "online_block": 1024}}],
            "blocks of 1024 do not divide the 256 inputs of",
        ),
        (
            [ROTATED, {"name": "smoothquant", "match": {"role": "mlp.down"}}],
            "transforms[1] (smoothquant) matches no edge",
        ),
    ],
)
def test_transforms_that_do_not_fit_are_refused(
    tiny: Callable[..., Path], transforms: list[dict[str, Any]], what: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(what)):
        transformed(tiny("qwen2_5_vl"), *transforms)


def test_scale_moves_along_edges_with_a_reader_that_is_meant(tiny_folder: Path) -> None:
    """Never past a rotation at run time, which mixes the channels."""
    smooth: dict[str, Any] = {"name": "smoothquant"}
    kinds = [("norm", 2), ("norm", 2), ("value", 2), ("linear", 2)]
    plan = transformed(tiny_folder, smooth)
    assert len(plan.edges) == sum(count for _, count in kinds)
    some = transformed(tiny_folder, smooth | {"match": {"role": "attn.qkv.k"}})
    assert {e.edge.source.rpartition(".")[2] for e in some.edges} == {"input_layernorm"}
    online = transformed(tiny_folder, ROTATED, smooth)
    assert len(online.edges) == 6
    assert not [e for e in online.edges if e.edge.source.endswith("up_proj")]
    twice = transformed(tiny_folder, smooth, {"name": "awq", "match": {"role": "mlp.down"}})
    assert [e.transform for e in twice.edges] == ["smoothquant"] * 8 + ["awq"] * 2


def test_remarks_say_who_cannot_load_the_checkpoint(tiny_folder: Path) -> None:
    """And the plan that is written down has them."""
    assert transformed(tiny_folder).remarks == ()
    offline = transformed(tiny_folder, {"name": "rotation"}, {"name": "awq"})
    assert offline.remarks == ()
    llm = ROTATED | {"match": {"modality": "llm"}}
    (remark,) = transformed(tiny_folder, llm).remarks
    assert "transformers ignores it" in remark
    assert remark.endswith("model.language_model.layers.0.mlp.down_proj and 1 more")
    plan = transformed(tiny_folder, ROTATED, SPLIT)
    assert any("split columns" in remark for remark in plan.remarks)
    assert plan.to_dict()["remarks"] == list(plan.remarks)
    gated = "qwen2_5_vl" in str(tiny_folder)
    assert any("applies signs" in remark for remark in plan.remarks) is not gated


@pytest.mark.parametrize(
    "change",
    [
        {"transforms": [{"name": "rotation"}]},
        {"transforms": [{"name": "rotation", "options": {"seed": 1}}]},
        {"transforms": [{"name": "rotation", "options": {"values": False}}]},
        {"transforms": [ROTATED]},
        {"transforms": [{"name": "awq"}]},
        {"transforms": [{"name": "awq", "options": {"grid": 3}}]},
        {"transforms": [{"name": "smoothquant"}]},
        {"transforms": [{"name": "smoothquant"}, {"name": "awq"}]},
        {"transforms": [{"name": "awq"}, {"name": "smoothquant"}]},
        {"transforms": [{"name": "split"}]},
        {"transforms": [SPLIT]},
        {"rule": {"correction": "auto"}},
        {"rule": {"correction": {"strength": 0.5}}},
        {"rule": {"tuner": "autoround"}},
        {"rule": {"tuner": "autoround", "tuner_options": {"seed": 5}}},
        {"rule": {"vision_weight": 0.5}},
        {"rule": {"outputs": "int8-tensor"}},
        {"rule": {"outputs": "int8-tensor", "activation_range": "ema"}},
    ],
)
def test_the_fingerprint_changes_with_every_method(
    tiny: Callable[..., Path], change: dict[str, Any]
) -> None:
    FINGERPRINTS.setdefault(transformed(tiny("qwen2_vl")).fingerprint(), {})
    plan = transformed(tiny("qwen2_vl"), *change.get("transforms", []), **change.get("rule", {}))
    assert FINGERPRINTS.setdefault(plan.fingerprint(), change) is change


FINGERPRINTS: dict[str, dict[str, Any]] = {}


def test_methods_that_compare_with_the_float_model_need_data(tiny: Callable[..., Path]) -> None:
    folder, rtn = tiny("qwen2_vl"), {"solver": "rtn"}
    assert not transformed(folder, {"name": "rotation"}, **rtn).needs_data
    for plan, beside in (
        (transformed(folder, {"name": "awq"}, **rtn), False),
        (transformed(folder, SPLIT, **rtn), False),
        (transformed(folder, **rtn, outputs="int8-tensor"), False),
        (transformed(folder, **rtn, correction="auto"), True),
        (transformed(folder, **rtn, tuner="autoround"), True),
    ):
        assert plan.needs_data
        assert plan.needs_float_chain is beside


# Inspecting


def test_inspecting_reads_headers_only(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tensor data were opened")

    monkeypatch.setattr(shards.ShardReader, "read", refuse)
    plan = pq.inspect(tiny_folder, "w4a16-all")
    assert plan.float_bytes == sum(tensor_bytes(tiny_folder).values())


def test_inspecting_needs_no_shards_and_gives_the_same_plan(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """The configuration alone implies every shape and every byte."""
    shutil.copy(tiny_folder / "config.json", tmp_path)
    alone, whole = pq.inspect(tmp_path, "w8a8-static"), pq.inspect(tiny_folder, "w8a8-static")
    assert [row.site.name for row in alone.rows] == [row.site.name for row in whole.rows]
    assert alone.totals() == whole.totals()
    assert alone.total_bytes == whole.total_bytes
    with pytest.raises(ModelError, match=r"no readable \*\.safetensors"):
        pq.quantize(tmp_path, "w8a8", tmp_path / "out")


def test_a_72b_model_is_inspected_from_its_configuration(tmp_path: Path) -> None:
    """As released: 73.4 billion parameters, none of which is ever allocated."""
    write_json(
        tmp_path / "config.json",
        {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "image_token_id": 151655,
            "video_token_id": 151656,
            "hidden_act": "silu",
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "max_position_embeddings": 32768,
            "num_attention_heads": 64,
            "num_hidden_layers": 80,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 152064,
            "vision_config": {
                "depth": 32,
                "embed_dim": 1280,
                "hidden_size": 8192,
                "in_chans": 3,
                "mlp_ratio": 4,
                "num_heads": 16,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
    )
    plan = pq.inspect(tmp_path, "w4a16-all")
    assert plan.float_bytes / 2 == pytest.approx(73.4e9, rel=2e-3)
    assert len([row for row in plan.quantized if row.site.modality == "llm"]) == 80 * 7
    # 4 bits and a 16-bit scale for each group of 128; embeddings and head stay.
    llm = plan.totals()["llm"]
    head = 152064 * 8192 * 2
    weights = (llm["float_bytes"] - head) // 2
    shapes = 80 * 7 * 2 * 8
    assert llm["stored_bytes"] == weights // 2 + weights // 128 * 2 + shapes + head
