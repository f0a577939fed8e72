"""Command lines of MQuant: the documented ones retyped, against its formulas written out."""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings, strategies

import prismquant as pq
from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import LayerProblem
from prismquant.errors import RecipeError
from prismquant.formats.spec import spec
from prismquant.models.bind import bind
from prismquant.numerics.rules import RangeRule
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.importers import mquant
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.mquant_flags import FLAGS, VALUES
from prismquant.recipe.layer_config import LayerConfig
from prismquant.recipe.match import Match
from prismquant.recipe.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS = {
    "vision": ("vision", "attn.qkv", "model.visual.blocks.0.attn.qkv"),
    "patch": ("vision", "patch_embed", "model.visual.patch_embed.proj"),
    "projector": ("projector", "projector.fc1", "model.visual.merger.linear_fc1"),
    "llm": ("llm", "attn.qkv.q", "model.language_model.layers.1.self_attn.q_proj"),
    "head": ("llm", "lm_head", "lm_head"),
}
ALL = "--quant --quant_llm --quant_visual_clip --quant_cross_attention"
DOCUMENTED = """python exam/quant_qwen2vl.py --model_name Qwen2-VL-7B-Instruct --quant --rotate \\
  --rotate_visual_clip --rotate_visual_cross_attn --rotate_llm --quant_llm --quant_visual_clip \\
  --quant_cross_attention --visual_w_bits 8 --llm_w_bits 4 --visual_w_clip --llm_w_clip \\
  --visual_static --llm_static --online_visual_hadamard --online_llm_hadamard --act_order \\
  --visual_split --nsamples 128 --calib_num 256 --dataset_name TextVQA_VAL"""
CLIPPED = RangeRule("mse", max_shrink=0.8, steps=80, norm=2.4, signed_scale=False)


def of(content: Any) -> Imported:
    """A recipe of the dialect, told by its content."""
    imported = import_recipe(content)
    assert imported.dialect == "mquant"
    return imported


def config(imported: Imported, layer: str) -> LayerConfig:
    modality, role, name = LAYERS[layer]
    return resolve(imported.recipe, modality=modality, role=role, name=name).config


def noted(imported: Imported, kind: str) -> set[str]:
    return {one.place for one in getattr(imported, kind)}


# The documented command


def test_the_documented_command_means_what_its_authors_meant() -> None:
    imported = of(DOCUMENTED)
    for layer, weights in (("vision", "int8"), ("projector", "int8"), ("llm", "int4")):
        found = config(imported, layer)
        assert found.weights == spec(f"{weights}-channel")
        assert found.activations == spec("int8-tensor")
        assert found.weight_range == CLIPPED
        assert found.solver == "gptq"
        assert found.options["order"] == "activation"
        assert (found.options["damping"], found.options["damping_basis"]) == (0.01, "mean")
    patch = config(imported, "patch")
    assert (patch.weights, patch.activations) == (spec("int8-channel"), None)
    assert config(imported, "head").weights is None
    rotation, split = imported.recipe.transforms
    assert rotation.name == "rotation"
    assert rotation.options == {"kind": "hadamard", "online": True, "signs": False}
    assert rotation.match == Match()
    assert (split.name, split.match) == ("split", Match(modality="vision", role="mlp.down"))
    assert imported.recipe.calibration.samples == 256
    assert imported.recipe.calibration.seed == 42
    assert imported.recipe.calibration.layer_sequential
    assert not imported.recipe.calibration.quantized_inputs
    assert {"model_name", "dataset_name", "rotate_visual_cross_attn"} <= noted(imported, "dropped")
    assert {"visual_static", "llm_static", "visual_split"} <= noted(imported, "changed")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "video_llama_3"])
def test_the_documented_command_fits_every_family(family: str, tiny: Callable[..., Path]) -> None:
    plan = make_plan(of(DOCUMENTED).recipe, bind(tiny(family)))
    towers = {str(row.site.modality) for row in plan.quantized}
    assert towers == {"vision", "projector", "llm"}
    assert any(row.outliers for row in plan.quantized)
    assert any(row.online for row in plan.quantized)


def test_it_runs_and_its_record_keeps_what_became_of_it(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "command.sh").write_text(DOCUMENTED)
    assert of(tmp_path / "command.sh").recipe == of(DOCUMENTED).recipe
    result = pq.quantize(
        tiny("qwen2_vl"), DOCUMENTED, tmp_path / "out", calibration_file, samples=4
    )
    assert result.record.translation is not None
    assert result.record.translation.dialect == "mquant"
    assert pq.load(tmp_path / "out")[0] is not None


@pytest.mark.parametrize("suffix", ["run.sh", "run", "run.txt"])
@pytest.mark.parametrize("before", ["", "set -euo pipefail\nexport HF_HOME=/x\ncd exam\n"])
@pytest.mark.parametrize("launcher", ["python -u ", "torchrun --nproc_per_node=2 ", "X=1 python3 "])
@pytest.mark.parametrize(
    "after",
    ["", " | tee log.txt", " > log 2>&1 &", " 2>&1 | tee -a log", " && echo --done", " # x"],
)
def test_a_script_around_the_command_is_read_past_and_told(
    suffix: str, before: str, launcher: str, after: str, tmp_path: Path
) -> None:
    flags = f"{ALL} \\\n  --llm_w_bits 4 --skip_names mlp 'a b' --seed 2"
    command = f"{launcher}exam/quant_qwen2vl.py {flags}{after}"
    text = f"#!/usr/bin/env bash\n# quantize\n{before}\n{command}\n"
    (tmp_path / suffix).write_text(text)
    found = of(tmp_path / suffix)
    plain = of(flags)
    assert found.recipe == plain.recipe
    told = {one.value for one in found.dropped} - {one.value for one in plain.dropped}
    assert {*before.splitlines()} <= told
    assert ("--nproc_per_node=2" in " ".join(told)) == ("torchrun" in launcher)
    for part in ("tee", "log", "echo"):
        assert any(part in one for one in told) == (part in after)


def test_a_script_of_two_commands_or_none_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text("set -e\npython a.py --quant --quant_llm\npython a.py --quant --quant_llm\n")
    with pytest.raises(RecipeError, match=r"2 commands \(lines 2, 3\): give one"):
        import_recipe(path)
    path.write_text("set -e\n$PYTHON run.pyc --quant --quant_llm\n")
    with pytest.raises(RecipeError) as caught:
        import_recipe(path)
    assert "the line of the command alone" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("script", "bits", "samples"),
    [("quant_qwen2vl.py", 4, 8), ("quant_qwenvl.py", 16, 8), ("quant_minicpmv.py", 16, 128)],
)
def test_defaults_are_those_of_the_driver(script: str, bits: int, samples: int) -> None:
    imported = of(f"python exam/{script} --quant --quant_llm --llm_w_bits 4")
    assert config(imported, "llm").activations == (spec("int8-token-narrow") if bits == 4 else None)
    assert imported.recipe.calibration.samples == samples


def test_a_mapping_of_flags_is_the_same() -> None:
    flags = {"quant": True, "quant_llm": True, "llm_w_bits": 3, "w_groupsize": 64, "rotate": False}
    text = "--quant --quant_llm --llm_w_bits 3 --w_groupsize=64"
    assert of(flags).recipe == of(text).recipe


# Formulas


def test_rounding_to_nearest_gives_their_weights() -> None:
    """s = max |w| / 7; with a zero point (max - min) / 15, both ends holding zero."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    for flag in ("", "--w_asym"):
        if flag:
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            scale = (high - low) / 15
            point = torch.round(-low / scale)
            wanted = (torch.clamp(torch.round(weight / scale) + point, 0, 15) - point) * scale
        else:
            scale = weight.abs().amax(1, keepdim=True) / 7
            wanted = torch.clamp(torch.round(weight / scale), -8, 7) * scale
        found = config(of(f"--quant --quant_llm --llm_w_rtn {flag}"), "llm")
        assert found.weights is not None
        problem = LayerProblem(("q",), (weight,), found.weights, found.weight_range, torch.float32)
        solved = build_solver(found.solver, found.options).solve(problem).weights[0]
        torch.testing.assert_close(solved.dequantize(torch.float32), wanted, rtol=1e-6, atol=1e-6)


def test_the_clip_search_is_never_worse_than_theirs() -> None:
    """By its own measure, over its own eighty scales."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    best = torch.full((16,), torch.inf)
    for step in range(80):
        scale = (1 - step / 100) * weight.abs().amax(1, keepdim=True) / 7
        error = weight - torch.clamp(torch.round(weight / scale), -8, 7) * scale
        best = torch.minimum(best, error.abs().pow(2.4).sum(1))
    found = config(of("--quant --quant_llm --llm_w_rtn --llm_w_clip"), "llm")
    assert found.weights is not None
    problem = LayerProblem(("q",), (weight,), found.weights, found.weight_range, torch.float32)
    solved = build_solver(found.solver, found.options).solve(problem).weights[0]
    ours = (weight - solved.dequantize(torch.float32)).abs().pow(2.4).sum(1)
    # The search looks at every fourth scale first.
    assert (ours.sum() / best.sum()).item() < 1.01


# Flag by flag


@pytest.mark.parametrize(
    ("flags", "layer", "weights", "inputs"),
    [
        ("", "llm", "int4-channel-narrow", "int8-token-narrow"),
        ("--llm_w_bits 8 --visual_w_bits 3", "vision", "int3-channel-narrow", "int8-token-narrow"),
        ("--llm_w_bits 8 --visual_w_bits 3", "llm", "int8-channel-narrow", "int8-token-narrow"),
        ("--w_groupsize 64", "llm", "int4-g64-narrow", "int8-token-narrow"),
        ("--w_groupsize 64 --llm_w_rtn", "llm", "int4-channel-narrow", "int8-token-narrow"),
        ("--w_groupsize 64 --llm_w_rtn", "vision", "int4-g64-narrow", "int8-token-narrow"),
        ("--w_asym", "projector", "int4-channel-asym", "int8-token-narrow"),
        ("--w_asym --llm_w_clip", "llm", "int4-channel-asym", "int8-token-narrow"),
        ("--llm_w_clip", "llm", "int4-channel", "int8-token-narrow"),
        ("--llm_a_bits 16", "llm", "int4-channel-narrow", None),
        ("--llm_a_bits 16 --llm_static", "llm", "int4-channel-narrow", None),
        ("--visual_a_bits 4", "projector", "int4-channel-narrow", "int4-token-narrow"),
        ("--a_asym", "llm", "int4-channel-narrow", "int8-token-asym"),
        ("--a_asym --llm_static", "llm", "int4-channel-narrow", "int8-tensor"),
        ("--a_asym --llm_static", "vision", "int4-channel-narrow", "int8-token-asym"),
        ("--a_groupsize 32", "llm", "int4-channel-narrow", "int8-g32-narrow-dyn"),
        ("--act_per_tensor", "llm", "int4-channel-narrow", "int8-token-narrow"),
        ("--llm_w_bits 16", "llm", None, None),
    ],
)
def test_formats_of_every_flag(
    flags: str, layer: str, weights: str | None, inputs: str | None
) -> None:
    found = config(of(f"{ALL} {flags}"), layer)
    assert found.weights == (spec(weights) if weights else None)
    assert found.activations == (spec(inputs) if inputs else None)


@pytest.mark.parametrize(
    ("flags", "meant"),
    [
        ("--quant --quant_llm", {"llm"}),
        ("--quant --quant_visual_clip", {"vision", "patch"}),
        ("--quant --quant_cross_attention", {"projector"}),
        ("--quant --quant_visual_projector", {"projector"}),
        ("--quant --online_llm_hadamard --rotate --rotate_llm", {"llm"}),
        ("--quant --online_visual_hadamard --rotate_visual_clip", {"vision", "patch"}),
        ("--quant --quant_llm --skip_names self_attn visual", set()),
    ],
)
def test_which_parts_are_quantized(flags: str, meant: set[str]) -> None:
    imported = of(flags)
    assert {layer for layer in LAYERS if config(imported, layer).weights} == meant


@pytest.mark.parametrize(
    ("flags", "transforms"),
    [
        ("", []),
        ("--rotate", []),
        ("--rotate_llm", []),
        ("--rotate --rotate_llm", [("rotation", ("llm",), {"kind": "hadamard", "online": False})]),
        (
            "--rotate --rotate_llm --rotate_mode random",
            [("rotation", ("llm",), {"kind": "random", "online": False})],
        ),
        (
            "--rotate --rotate_llm --rotate_visual_clip",
            [("rotation", (), {"kind": "hadamard", "online": False})],
        ),
        (
            "--rotate --rotate_llm --rotate_visual_clip --online_llm_hadamard --llm_split",
            [
                ("rotation", ("vision",), {"kind": "hadamard", "online": False}),
                ("rotation", ("llm",), {"kind": "hadamard", "online": True, "signs": False}),
                ("split", ("llm",), {}),
            ],
        ),
        (
            "--rotate --rotate_llm --llm_split --visual_split --online_visual_hadamard",
            [("rotation", ("llm",), {"kind": "hadamard", "online": False})],
        ),
    ],
)
def test_rotations_and_splits(flags: str, transforms: list[Any]) -> None:
    found = of(f"{ALL} {flags}").recipe.transforms
    assert [(one.name, one.match.modality, one.options) for one in found] == transforms


@pytest.mark.parametrize(
    ("flags", "dropped"),
    [
        ("--a_asym --llm_static --visual_static", {"a_asym"}),
        ("--a_clip_ratio 0.9", {"a_clip_ratio"}),
        ("--a_clip_ratio 1.0", set()),
        ("--rotate", {"rotate"}),
        ("--rotate_llm", {"rotate_llm"}),
        ("--llm_split", {"llm_split"}),
        ("--online_llm_hadamard", {"online_llm_hadamard"}),
        ("--w_groupsize 64 --llm_w_rtn", {"w_groupsize"}),
        ("--llm_static --llm_a_bits 16", {"llm_static"}),
        ("--aifs --real --demo --eval_num 3", {"aifs", "real", "demo", "eval_num"}),
        ("--dump_gptq a.pth --fp32_had", {"dump_gptq", "fp32_had"}),
        (
            "--observer_type minmax --calibration_mode layer_wise",
            {"observer_type", "calibration_mode"},
        ),
    ],
)
def test_what_has_no_effect_is_told_with_why(flags: str, dropped: set[str]) -> None:
    imported = of(f"{ALL} {flags}")
    assert noted(imported, "dropped") == dropped
    assert all(one.why for one in imported.dropped)


def test_every_flag_is_accepted_and_its_fate_told() -> None:
    """Each by itself, beside those that quantize everything."""
    samples = {int: "8", float: "0.5", str: "minmax"}
    special = {
        "rotate_mode": "random",
        "load_gptq": None,
        "a_clip_ratio": "0.5",
        "skip_names": "x y",
    }
    for name in FLAGS:
        value = special.get(name, samples[VALUES[name]] if name in VALUES else "")
        if name == "load_gptq" or name in ALL:
            continue
        imported = of(f"{ALL} --{name} {value}")
        told = noted(imported, "honoured") | noted(imported, "changed") | noted(imported, "dropped")
        assert name in told, name


# What cannot be


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--quant_llm", "nothing would be quantized: give --quant"),
        ("--quant --rotate", "nothing would be quantized"),
        (f"{ALL} --lm_w_bits 4", "lm_w_bits: unknown key; did you mean 'llm_w_bits'"),
        (f"{ALL} --llm_w_bits", "llm_w_bits: a whole number from 2 to 16, not true"),
        (
            f"{ALL} --llm_w_bits four",
            'llm_w_bits: a whole number from 2 to 16, not the text "four"',
        ),
        (f"{ALL} --llm_w_bits 12", "2 to 8, or 16 for floating point, not 12"),
        (f"{ALL} --percdamp 11", "percdamp: a number from 0 to 10"),
        (f"{ALL} --rotate_mode fast", "rotate_mode: 'fast' is not a choice"),
        (f"{ALL} --llm_static 1", "'1' belongs to no flag"),
        (f"{ALL} --quant", "quant: it is given twice"),
        (f"{ALL} --quant_llm=yes", "it is given twice"),
        (f"{ALL} --w_asym=yes", "w_asym: it takes no value"),
        (f"{ALL} --skip_names {'a ' * 1001}", "skip_names: 1001 parts of names, more than 1000"),
        (f"{ALL} --load_gptq a.pth", "a pickled model is never read"),
        (f"{ALL} 'x", "the quotes do not match"),
        (f"{ALL} --skip_names --act_order", "skip_names: it needs parts of names"),
    ],
)
def test_what_cannot_be_is_an_error(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        import_recipe(text, "mquant")
    assert words in str(caught.value)


@pytest.mark.parametrize("content", ["--", "--x 1", "w4a16", "", {}, {"rotate": True}, {"x": 1}, 3])
def test_other_contents_are_not_recognized(content: Any) -> None:
    assert not mquant.recognizes(content)


WORDS = strategies.lists(
    strategies.sampled_from([*(f"--{name}" for name in FLAGS), "4", "16", "-1", "0.5", "x", "'"]),
    max_size=12,
)


@settings(max_examples=300)
@drawn(words=WORDS)
def test_any_words_are_read_or_refused_in_words(words: list[str]) -> None:
    for text in (" ".join(words), f"{ALL} {shlex.join(words)}"):
        with contextlib.suppress(pq.PrismQuantError):
            mquant.read(text, "x")
