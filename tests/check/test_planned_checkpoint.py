"""What a reader refuses of a plan is what it refuses of the checkpoint that is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import prismquant as pq
from prismquant.check import Severity, TargetReader, check
from prismquant.check.apply_rules import apply
from prismquant.check.planned_checkpoint import KV_CACHE, planned_checkpoint, refusals
from prismquant.check.rule_table import FILE_RULES, RULES
from prismquant.models.bind import bind
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.schema import parse_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"weights": "int4-g32"},
    "int3-asym": {"weights": "int3-g32-asym"},
    "w4a8": {"weights": "int4-channel", "activations": "int8-token"},
    "w8a8-static": {"weights": "int8-channel", "activations": "int8-tensor"},
    "asymmetric-int8": {"weights": "int8-channel-asym", "activations": "int8-token"},
    "w4a8-fp8": {"weights": "int4-g32", "activations": "fp8-token"},
    "fp8": {"weights": "fp8-channel", "activations": "fp8-token"},
    "fp8-e5m2": {"weights": "fp8-e5m2-channel"},
    "nvfp4": {"weights": "nvfp4", "activations": "nvfp4-dyn"},
    "mxfp4": {"weights": "mxfp4"},
    "mxfp6": {"weights": "mxfp6"},
    "mxfp8": {"weights": "mxfp8", "activations": "mxfp8-ceil-dyn"},
    "int8-int4-inputs": {"weights": "int8-channel", "activations": "int4-token"},
}
READERS = [str(reader) for reader in TargetReader]


def recipe_of(fields: dict[str, Any], **more: Any) -> Any:
    rule = {"solver": "rtn", "fallback": "nearest"} | fields
    rules = [rule, {"match": {"role": "patch_embed"}, "activations": "none"}]
    return parse_recipe({"rules": rules} | more, source="test")


@pytest.mark.parametrize("family", [pytest.param("qwen2_vl", marks=pytest.mark.slow), "qwen3_vl"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_verdict_on_a_plan_is_that_on_the_checkpoint(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    family: str,
    name: str,
) -> None:
    folder, recipe = tiny(family), recipe_of(FORMATS[name])
    pq.quantize(folder, recipe, tmp_path / "out", calibration_file)
    bound = bind(folder)
    plan = make_plan(recipe, bound)
    of_files = {rule.name for rule in FILE_RULES}
    for reader in READERS:
        written = {
            (finding.rule, finding.what, finding.where)
            for finding in check(tmp_path / "out", reader).findings
            if finding.rule not in of_files and finding.severity is Severity.ERROR
        }
        planned = {
            (finding.rule, finding.what, finding.where)
            for finding in apply(RULES, planned_checkpoint(plan, bound, TargetReader(reader)))
            if finding.rule not in of_files and finding.severity is Severity.ERROR
        }
        assert planned == written, reader


def told(folder: Path, reader: str, *rules: dict[str, Any], **more: Any) -> dict[str, str]:
    recipe = parse_recipe({"rules": list(rules)} | more, source="test")
    bound = bind(folder)
    return refusals(make_plan(recipe, bound), bound, reader)


def test_only_the_layers_in_question_are_refused(tiny: Callable[..., Path]) -> None:
    folder = tiny("qwen3_vl")
    down = {"match": {"role": "mlp.down", "modality": "llm"}}
    rules = ({"match": {"modality": "llm"}, "weights": "int4-g32"}, down | {"weights": "mxfp6"})
    found = told(folder, "vllm", *rules)
    assert set(found) == {s.name for s in bind(folder).sites if s.name.endswith("down_proj")}
    assert all("vLLM has no scheme for float6" in why for why in found.values())
    assert told(folder, "prismquant", *rules) == {}


def test_a_format_without_a_layout_is_refused_by_all_but_us(tiny: Callable[..., Path]) -> None:
    rule = {"match": {"modality": "llm"}, "weights": "fp4-g32", "activations": "fp4-g32-dyn"}
    for reader in READERS:
        found = told(tiny("qwen3_vl"), reader, rule)
        assert bool(found) == (reader != "prismquant")
        assert all("no checkpoint format declares" in why for why in found.values())


def test_caches_are_told_apart_from_layers(tiny: Callable[..., Path]) -> None:
    rule = {"match": {"modality": "llm"}, "weights": "int4-g32"}
    assert told(tiny("qwen3_vl"), "vllm", rule, kv_cache="fp8") == {}
    found = told(tiny("qwen3_vl"), "vllm", rule, kv_cache="int8")
    assert set(found) == {KV_CACHE}
    assert "vLLM has no KV cache" in found[KV_CACHE]


def test_what_follows_from_another_view_is_not_told_again(tiny: Callable[..., Path]) -> None:
    rule = {"match": {"modality": "llm"}, "weights": "int8-channel", "activations": "int8-token"}
    assert told(tiny("qwen2_vl"), "vllm", rule) == {
        "lm_head": "vLLM takes layers for floating point that transformers takes for quantized: "
        "it knows them by other names"
    }


def test_a_model_that_vllm_lacks_is_refused_whole(tiny: Callable[..., Path]) -> None:
    rule = {"match": {"modality": "llm"}, "weights": "int4-g32"}
    folder = tiny("video_llama_3")
    found = told(folder, "vllm", rule)
    recipe = parse_recipe({"rules": [rule]}, source="test")
    assert set(found) == {row.site.name for row in make_plan(recipe, bind(folder)).quantized}


def test_there_must_be_such_a_reader(tiny: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="llama"):
        told(tiny("qwen3_vl"), "llama", {"match": {"modality": "llm"}, "weights": "int4-g32"})
