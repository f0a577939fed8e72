"""Namespaces of flags mean what the command line means, whatever stands in them beside."""

from __future__ import annotations

import argparse
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies

from prismquant.compat.mquant.families import QWEN2_VL, VIDEOLLAMA3
from prismquant.compat.mquant.namespaces import flags_of, read_namespace
from prismquant.errors import ArgumentError, RecipeError
from prismquant.recipe.importers import mquant

# A parser of the drivers leaves these where nothing is asked for.
PARSED: dict[str, Any] = {
    "model_name": "Qwen2-VL-7B-Instruct",
    "dataset_name": "TextVQA_VAL",
    "seed": 42,
    "visual_w_bits": 4,
    "llm_w_bits": 4,
    "visual_a_bits": 8,
    "llm_a_bits": 8,
    "nsamples": 8,
    "w_groupsize": -1,
    "a_groupsize": -1,
    "a_clip_ratio": 1.0,
    "percdamp": 0.01,
    "calib_num": 32,
    "calib_mode": "v2",
    "rotate_mode": "hadamard",
    "skip_names": [],
    "dump_gptq": None,
    "load_gptq": None,
    "max_new_tokens": None,
    "local_dataset_file": None,
    "eval_num": 32,
    "analysis_num": 32,
    "analysis_mode": "v1",
    "draw_save_path": "output/qwenvl_base",
    **dict.fromkeys(
        (
            *("quant_llm", "quant_visual_clip", "quant_cross_attention", "visual_w_rtn"),
            *("llm_w_rtn", "visual_w_clip", "llm_w_clip", "w_asym", "a_asym", "act_per_tensor"),
            *("visual_static", "llm_static", "act_order", "rotate", "rotate_llm"),
            *("rotate_visual_clip", "rotate_visual_cross_attn", "online_llm_hadamard"),
            *("online_visual_hadamard", "visual_split", "llm_split", "int8_down_proj", "demo"),
            *("not_fuse_layer_norms", "fp32_had", "verbose", "analysis", "aifs", "real"),
        ),
        False,
    ),
}
ON = sorted(name for name, value in PARSED.items() if value is False and name != "demo")
DRAWN = strategies.fixed_dictionaries(
    {"quant_llm": strategies.just(True)},
    optional={
        **{name: strategies.booleans() for name in ON if name != "quant_llm"},
        "llm_w_bits": strategies.sampled_from((2, 3, 4, 8)),
        "visual_a_bits": strategies.sampled_from((4, 8, 16)),
        "w_groupsize": strategies.sampled_from((-1, 32, 128)),
        "nsamples": strategies.integers(1, 64),
        "percdamp": strategies.sampled_from((0.01, 0.1)),
        "skip_names": strategies.sampled_from(([], ["mlp.down_proj"])),
    },
)


@given(DRAWN)
def test_a_whole_namespace_means_what_its_flags_mean(flags: dict[str, Any]) -> None:
    wanted = mquant.read({"quant": True, **flags}, "args").recipe
    whole = argparse.Namespace(**PARSED | flags)
    found = read_namespace(whole, QWEN2_VL, {"quant": True})
    assert found.recipe == wanted
    # What nobody has asked for is not told.
    asked = {name for name, value in flags.items() if value != PARSED[name]}
    told = {one.place for one in (*found.changed, *found.dropped)}
    assert told <= asked | {"quant"}


def test_any_object_with_attributes_is_a_namespace() -> None:
    class Args:
        """Flags of the class, and of the instance."""

        quant_llm = True
        _private = 1

        def parse(self) -> None:
            """No flag."""

    given = Args()
    given.llm_w_bits = 8  # type: ignore[attr-defined]
    fields = [("quant_llm", bool, True), ("llm_w_bits", int, 8)]
    alike = dataclasses.make_dataclass("Alike", fields)()
    for args in (given, alike, SimpleNamespace(quant_llm=True, llm_w_bits=8)):
        assert flags_of(args) == {"quant_llm": True, "llm_w_bits": 8}
    assert flags_of({"quant_llm": True, "llm_w_bits": 4}) == {"quant_llm": True}
    numbers = {"quant_llm": np.bool_(True), "llm_w_bits": np.int64(8), "nsamples": np.int32(8)}
    assert flags_of(numbers) == {"quant_llm": True, "llm_w_bits": 8}
    for wrong in ("--quant_llm", ["--quant_llm"], 4):
        with pytest.raises(ArgumentError, match="is no namespace of flags"):
            flags_of(wrong)


def test_unknown_flags_and_those_of_the_other_family_are_refused() -> None:
    with pytest.raises(RecipeError, match="llm_wbits: unknown key; did you mean 'llm_w_bits'"):
        read_namespace(SimpleNamespace(quant_llm=True, llm_wbits=4), QWEN2_VL, {"quant": True})
    for family, other in ((QWEN2_VL, VIDEOLLAMA3), (VIDEOLLAMA3, QWEN2_VL)):
        with pytest.raises(RecipeError, match=f"is of {other.title}"):
            read_namespace({other.connector: True}, family, {})
        own = read_namespace({family.connector: True}, family, {"quant": True})
        assert [rule.match.modality for rule in own.recipe.rules if rule.match]


def test_flags_without_effect_are_told_where_they_are_set() -> None:
    args = {"quant_llm": True, "aifs": True, "dump_gptq": "model.pth", "eval_num": 32}
    dropped = read_namespace(args, QWEN2_VL, {"quant": True}).dropped
    assert {one.place for one in dropped} == {"aifs", "dump_gptq"}
