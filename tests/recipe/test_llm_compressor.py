"""Recipes of llm-compressor: the documented ones retyped, against the library that defines them."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import compressed_tensors_library as library
import pytest
import torch
import yaml
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.utils.match import match_named_modules
from hypothesis import given as drawn
from hypothesis import settings, strategies

import prismquant as pq
from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import LayerProblem
from prismquant.algorithms.rtn import RTN
from prismquant.errors import RecipeError
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import spec
from prismquant.models.arch_files import known_archs
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.numerics.rules import RangeRule
from prismquant.numerics.scales import ScaleFormat
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.importers import llm_compressor
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.ledger import Ledger
from prismquant.recipe.importers.module_lists import FEW, together
from prismquant.recipe.importers.module_names import excluding, named_modules
from prismquant.recipe.importers.scheme_arguments import ARGUMENTS, numbers
from prismquant.recipe.importers.scheme_presets import SCHEMES
from prismquant.recipe.importers.source_section import SourceSection
from prismquant.recipe.layer_config import LayerConfig
from prismquant.recipe.match import Match
from prismquant.recipe.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILY = "qwen3_vl"
NAMES = {
    "q": ("llm", "attn.qkv.q", "model.language_model.layers.1.self_attn.q_proj"),
    "o": ("llm", "attn.out", "model.language_model.layers.1.self_attn.o_proj"),
    "down": ("llm", "mlp.down", "model.language_model.layers.0.mlp.down_proj"),
    "head": ("llm", "lm_head", "lm_head"),
    "vision": ("vision", "attn.qkv", "model.visual.blocks.0.attn.qkv"),
    "patch": ("vision", "patch_embed", "model.visual.patch_embed.proj"),
}

W4A8 = """
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      ignore: ["lm_head", "vpm", "resampler.*"]
      config_groups:
        group_0:
          targets: ["re:.*(q|k|v|o|gate|up|down)_proj$"]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: channel, dynamic: false}
          input_activations:
            {num_bits: 8, type: int, symmetric: true, strategy: token, dynamic: true}
"""


def of(text: str | dict[str, Any]) -> Imported:
    """A recipe of the dialect, told by its content."""
    imported = import_recipe(yaml.safe_load(text) if isinstance(text, str) else text)
    assert imported.dialect == "llm-compressor"
    return imported


def modifier(name: str, **keys: Any) -> dict[str, Any]:
    return {"quant_stage": {"quant_modifiers": {name: keys}}}


def config(imported: Imported, layer: str) -> LayerConfig:
    modality, role, name = NAMES[layer]
    return resolve(imported.recipe, modality=modality, role=role, name=name).config


def places(noted: Any) -> list[str]:
    return [one.place.rpartition("Modifier.")[2] for one in noted]


def refused(content: Any, *words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        import_recipe(content, "llm-compressor")
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# Telling it apart


@pytest.mark.parametrize(
    "content",
    [
        yaml.safe_load(W4A8),
        {"quant_modifiers": {"GPTQModifier": {"scheme": "W4A16"}}},
        {"GPTQModifier": {"scheme": "W4A16"}},
        {"test_stage": {"modifiers": {"GPTQModifier": {"scheme": "W4A16"}}}},
        {"recipe": [{"IMatrixGatherer": {}}, {"GPTQModifier": {"scheme": "W4A16"}}]},
        [{"GPTQModifier": {"scheme": "W4A16"}}],
    ],
)
def test_stages_modifiers_and_arguments_are_recognized(content: Any) -> None:
    assert llm_compressor.recognizes(content)
    assert llm_compressor.read(content, "x").recipe.rules


@pytest.mark.parametrize(
    "content", [{"rules": []}, {"a_stage": 1}, "GPTQModifier", [], {"quant_cfg": {}}, {1: 2}]
)
def test_other_contents_are_not(content: Any) -> None:
    assert not llm_compressor.recognizes(content)


# The recipe of the documentation of Qwen3-VL


def test_the_w4a8_recipe_means_what_its_author_meant() -> None:
    imported = of(W4A8)
    wanted = LayerConfig(
        weights=spec("int4-channel"),
        activations=spec("int8-token"),
        solver="rtn",
    )
    for layer in ("q", "o", "down"):
        found = config(imported, layer)
        assert (found.weights, found.activations) == (wanted.weights, wanted.activations)
        assert (found.solver, found.tuner, found.correction) == ("rtn", None, None)
        assert found.weight_range == RangeRule("minmax")
    for layer in ("head", "vision", "patch"):
        assert config(imported, layer).weights is None
    assert places(imported.changed) == ["ignore[1]", "ignore[2]"]
    assert not imported.dropped


@pytest.mark.parametrize("suffix", ["yaml", "json", "py"])
def test_the_w4a8_recipe_runs_as_it_stands(
    suffix: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    content = yaml.safe_load(W4A8)
    text = {"yaml": W4A8, "json": json.dumps(content), "py": f"RECIPE = {content!r}"}[suffix]
    (tmp_path / f"w4a8.{suffix}").write_text(text)
    result = pq.quantize(tiny(FAMILY), tmp_path / f"w4a8.{suffix}", tmp_path / "out")
    assert {row.config.weights.name for row in result.plan.quantized} == {"int4-channel"}
    assert len(result.plan.quantized) == 2 * 7
    assert result.record.translation is not None
    assert result.record.translation.dialect == "llm-compressor"
    remarks = "\n".join(result.plan.remarks)
    assert "vpm" in remarks
    assert "resampler" in remarks
    assert "lm_head" not in remarks
    model, _ = pq.load(tmp_path / "out")
    assert model is not None


def test_gptq_with_static_inputs_runs_on_all_towers(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    inputs = {"num_bits": 8, "symmetric": False, "strategy": "tensor", "observer": "static_minmax"}
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "strategy": "channel"},
            "input_activations": inputs,
        }
    }
    content = {
        "quant_stage": {
            "quant_modifiers": {
                "SmoothQuantModifier": {"smoothing_strength": 0.8},
                "GPTQModifier": {"ignore": ["lm_head"], "config_groups": groups},
            }
        }
    }
    result = pq.quantize(tiny(FAMILY), content, tmp_path / "out", calibration_file)
    towers = {str(row.site.modality) for row in result.plan.quantized}
    assert towers == {"vision", "projector", "llm"}
    assert all(row.config.solver == "gptq" for row in result.plan.quantized)
    # Two edges a block: the inputs of attention and of the MLP.
    assert len(result.plan.edges) == 2 * 2


# Formats: the library's own presets, and its own codes


def words(given: Any) -> dict[str, Any]:
    """The arguments as the library keeps them, but for observers and what follows from others."""
    aside = ("observer", "observer_kwargs", "zp_dtype", "actorder", "scale_dtype")
    return {key: value for key, value in given.model_dump().items() if key not in aside}


def test_the_named_schemes_are_those_of_the_library() -> None:
    assert SCHEMES.keys() == PRESET_SCHEMES.keys()
    for name, sides in PRESET_SCHEMES.items():
        assert sides.keys() == SCHEMES[name].keys(), name
        for side, wanted in sides.items():
            ours = library.QuantizationArgs(**SCHEMES[name][side])
            assert words(ours) == words(wanted), (name, side)
            # NVFP4 is told by its strategy, MX by the dtype of its scales.
            if ours.strategy != "tensor_group":
                assert ours.scale_dtype == wanted.scale_dtype, (name, side)
            static = side == "input_activations" and not wanted.dynamic
            assert ours.observer == (wanted.observer if static else ours.observer), (name, side)


FORMATS = {
    "W4A16": ("int4-g128", None),
    "W2A8": ("int2-g128", "int8-token"),
    "W4A4": ("int4-g128", "int4-token"),
    "W4A16_ASYM": ("int4-g128-asym", None),
    "W8A16": ("int8-g128", None),
    "W8A8": ("int8-channel", "int8-token"),
    "INT8": ("int8-channel", "int8-token"),
    "W4A8": ("int4-g128", "int8-token"),
    "W4AFP8": ("int4-g128", "fp8-token"),
    "FP8": ("fp8-tensor", "fp8-tensor"),
    "FP8_DYNAMIC": ("fp8-channel", "fp8-token"),
    "FP8_BLOCK": ("fp8-b128", "fp8-g128-dyn"),
    "NVFP4": ("nvfp4", "nvfp4-dyn"),
    "NVFP4A16": ("nvfp4", None),
    "MXFP4": ("mxfp4", "mxfp4-dyn"),
    "MXFP4A16": ("mxfp4", None),
    "MXFP4XFP8": ("mxfp4", "fp8-g128-dyn"),
    "MXFP6A16": ("mxfp6", None),
    "MXFP6A8": ("mxfp6", "mxfp8-ceil-dyn"),
    "MXFP8": ("mxfp8", "mxfp8-ceil-dyn"),
    "MXFP8A16": ("mxfp8", None),
}


@pytest.mark.parametrize("name", [*FORMATS, "fp8_dynamic"])
def test_a_named_scheme_comes_to_our_formats(name: str) -> None:
    found = config(of(modifier("QuantizationModifier", scheme=name, ignore=["lm_head"])), "q")
    weights, inputs = FORMATS[name.upper()]
    assert found.weights == spec(weights)
    assert found.activations == (spec(inputs) if inputs else None)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_every_named_scheme_is_read(name: str) -> None:
    content = modifier("QuantizationModifier", scheme=name)
    if name == "UNQUANTIZED":
        refused(content, "nothing is quantized")
    else:
        assert of(content).recipe.rules


INTEGERS = [
    {"num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": size}
    for bits in (2, 4, 8)
    for symmetric in (True, False)
    for strategy, size in (("tensor", None), ("channel", None), ("group", 32))
]
FLOATS = [
    {"num_bits": 8, "type": "float", "strategy": "tensor"},
    {"num_bits": 8, "type": "float", "strategy": "channel"},
    {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
]


@pytest.mark.parametrize("given", [*INTEGERS, *FLOATS], ids=str)
def test_rounding_to_nearest_gives_the_codes_of_the_library(given: dict[str, Any]) -> None:
    """To the last one, for scales in float32."""
    args = library.QuantizationArgs(**given)
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(3))
    grouped = weight.reshape(48, -1, 32) if args.strategy == "group" else weight
    dims = None if args.strategy == "tensor" else -1
    low = grouped.amin() if dims is None else grouped.amin(dims)
    high = grouped.amax() if dims is None else grouped.amax(dims)
    shape = {"tensor": (1,), "channel": (48, 1), "group": (48, 3)}[str(args.strategy)]
    scale, zero = library.calculate_qparams(low.reshape(shape), high.reshape(shape), args)
    theirs = library.quantize(weight, scale, zero, args, dtype=torch.float32)
    imported = of(
        modifier(
            "QuantizationModifier",
            config_groups={"group_0": {"targets": ["Linear"], "weights": given}},
        )
    )
    found = config(imported, "q")
    assert found.weights is not None
    solved = RTN().solve_weight(
        weight, found.weights, found.weight_range, ScaleFormat(torch.float32)
    )
    ours: QuantizedTensor = solved.weight
    assert torch.equal(ours.scale.reshape(shape), scale.reshape(shape))
    points = found.weights.grid.read(ours.codes)
    assert torch.equal(points.to(torch.float32), theirs)


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({}, "int8-tensor"),
        ({"num_bits": 4, "group_size": 64}, "int4-g64"),
        ({"num_bits": 4, "group_size": -1}, "int4-channel"),
        (
            {"num_bits": 3, "strategy": "GROUP", "group_size": 128, "symmetric": False},
            "int3-g128-asym",
        ),
        (
            {"num_bits": 8, "type": "FLOAT", "strategy": "block", "block_structure": "128x128"},
            "fp8-b128",
        ),
        ({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, "fp4-g32"),
        (
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "scale_dtype": "torch.uint8",
            },
            "mxfp4",
        ),
        (
            {"num_bits": 8, "strategy": "tensor", "dynamic": None, "zp_dtype": "torch.int8"},
            "int8-tensor",
        ),
    ],
)
def test_arguments_of_weights(given: dict[str, Any], weights: str) -> None:
    ledger = Ledger("x", "x")
    assert numbers(SourceSection(ledger, "w", given, ARGUMENTS), "weights").spec == spec(weights)
    library.QuantizationArgs(**{k: v for k, v in given.items() if v is not None})


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ({"dynamic": True, "strategy": "tensor"}, "int8-token"),
        ({"dynamic": True, "strategy": "token", "symmetric": False}, "int8-token-asym"),
        ({"strategy": "tensor", "symmetric": False}, "int8-tensor-asym"),
        (
            {"type": "float", "dynamic": True, "strategy": "group", "group_size": 128},
            "fp8-g128-dyn",
        ),
    ],
)
def test_arguments_of_inputs(given: dict[str, Any], inputs: str) -> None:
    group = {"targets": "Linear", "weights": {"strategy": "channel"}, "input_activations": given}
    imported = of(modifier("QuantizationModifier", config_groups={"a": group}))
    assert config(imported, "q").activations == spec(inputs)
    dynamic = [one for one in imported.changed if one.place.endswith("input_activations.dynamic")]
    assert bool(dynamic) == (given == {"dynamic": True, "strategy": "tensor"})


# Observers


@pytest.mark.parametrize(
    ("given", "rule", "weighting"),
    [
        ({}, RangeRule(), "none"),
        ({"observer": "minmax"}, RangeRule(), "none"),
        ({"observer": "memoryless_minmax"}, RangeRule(), "none"),
        (
            {"observer": "mse"},
            RangeRule("mse", max_shrink=0.2, steps=20, norm=2.4, signed_scale=False),
            "none",
        ),
        (
            {
                "observer": "memoryless_mse",
                "observer_kwargs": {"maxshrink": 0.5, "grid": 40, "norm": 2, "patience": 9},
            },
            RangeRule("mse", max_shrink=0.5, steps=20, norm=2.0, signed_scale=False),
            "none",
        ),
        (
            {"observer": "imatrix_mse"},
            RangeRule("mse", max_shrink=0.95, steps=19, norm=3.0, signed_scale=False),
            "diagonal",
        ),
        ({"observer": "nvfp4_expanded_mse"}, RangeRule("sweep", signed_scale=False), "none"),
    ],
)
@pytest.mark.parametrize("name", ["GPTQModifier", "QuantizationModifier"])
def test_observers_of_weights(
    name: str, given: dict[str, Any], rule: RangeRule, weighting: str
) -> None:
    weights = {"num_bits": 4, "group_size": 32} | given
    group = {"targets": ["Linear"], "weights": weights}
    imported = of(modifier(name, config_groups={"a": group}))
    found = config(imported, "q")
    assert found.weight_range == rule
    assert found.options["scale_weighting"] == weighting
    dropped = places(imported.dropped)
    assert dropped == (
        ["config_groups.a.weights.observer_kwargs.patience"] if "observer_kwargs" in given else []
    )


@pytest.mark.parametrize(
    ("observer", "rule"),
    [
        (None, RangeRule("ema", momentum=0.01)),
        ("minmax", RangeRule("ema", momentum=0.01)),
        ("static_minmax", RangeRule()),
        ("mse", RangeRule("mse", max_shrink=0.2, steps=20, norm=2.4)),
    ],
)
def test_observers_of_static_inputs(observer: str | None, rule: RangeRule) -> None:
    inputs = {"strategy": "tensor"} | ({"observer": observer} if observer else {})
    group = {"targets": ["Linear"], "weights": {"strategy": "channel"}, "input_activations": inputs}
    imported = of(modifier("QuantizationModifier", config_groups={"a": group}))
    assert config(imported, "q").activation_range == rule
    assert not imported.recipe.calibration.block_sequential


def test_an_observer_of_the_modifier_counts_more() -> None:
    keys = {"scheme": "W4A16", "weight_observer": "mse"}
    other = {"scheme": "W4A16", "observer": {"weights": "mse"}}
    for given in (keys, other):
        imported = of(modifier("QuantizationModifier", **given))
        assert config(imported, "q").weight_range.kind == "mse"
        assert len(imported.changed) == 1
    weights = {"num_bits": 4, "group_size": 32, "observer": "minmax"}
    groups = {"a": {"targets": ["Linear"], "weights": weights}}
    imported = of(modifier("QuantizationModifier", config_groups=groups, weight_observer="mse"))
    assert config(imported, "q").weight_range.kind == "mse"
    assert places(imported.dropped) == ["config_groups.a.weights.observer"]


# GPTQ


def test_gptq_is_theirs_down_to_its_defaults() -> None:
    found = config(of(modifier("GPTQModifier", scheme="W4A16")), "q")
    assert found.solver == "gptq"
    assert found.options == {
        "block_size": 128,
        "damping": 0.01,
        "damping_basis": "mean",
        "order": "activation",
        "refine_passes": 0,
        "scale_weighting": "none",
    }
    calibration = of(modifier("GPTQModifier", scheme="W4A16")).recipe.calibration
    assert (calibration.block_sequential, calibration.layer_sequential) == (True, False)
    assert calibration.quantized_inputs is False


def textbook(
    weight: torch.Tensor, moments: torch.Tensor, group: int, damping: float
) -> torch.Tensor:
    """Codes of GPTQ as the tool has it: by descending diagonal, groups of the original order."""
    w, h = weight.double().clone(), moments.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    scale = weight.reshape(len(w), -1, group).abs().amax(-1) / 7.5
    order = torch.argsort(moments.diagonal(), descending=True)
    inverse = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    codes = torch.empty_like(w)
    for step, column in enumerate(order.tolist()):
        own = scale[:, column // group].double()
        codes[:, column] = (w[:, column] / own).clamp(-8, 7).round()
        error = (w[:, column] - codes[:, column] * own) / inverse[step, step]
        later = order[step + 1 :]
        w[:, later] -= error[:, None] * inverse[step, step + 1 :][None, :]
    return codes


def test_gptq_chooses_the_codes_of_the_textbook() -> None:
    """With the options that are imported; where rounding to nearest is no better."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 64, generator=generator)
    mixing = torch.randn(64, 64, generator=generator) * torch.rand(64, generator=generator)
    inputs = torch.randn(512, 64, generator=generator) @ mixing
    moments = inputs.T @ inputs / len(inputs)
    keys = {"num_bits": 4, "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": keys}}
    found = config(of(modifier("GPTQModifier", config_groups=groups, dampening_frac=0.05)), "q")
    assert found.weights is not None
    problem = LayerProblem(
        ("q",), (weight,), found.weights, found.weight_range, torch.float32, hessian=moments
    )
    result = build_solver(found.solver, found.options).solve(problem)
    wanted = textbook(weight, moments, 32, 0.05)
    assert torch.equal(result.weights[0].codes.double(), wanted)


@pytest.mark.parametrize(
    ("given", "own", "order"),
    [
        ({}, {}, "activation"),
        ({"actorder": None}, {}, "original"),
        ({"actorder": "weight"}, {}, "activation"),
        ({"actorder": "group"}, {}, "activation"),
        ({}, {"actorder": False}, "original"),
        ({}, {"actorder": "static"}, "activation"),
        ({"actorder": None}, {"actorder": None}, "original"),
        ({"dampening_frac": 0.05, "block_size": 64}, {}, "activation"),
    ],
)
def test_order_damping_and_blocks(given: Any, own: Any, order: str) -> None:
    weights = {"num_bits": 4, "group_size": 32} | own
    groups = {"a": {"targets": ["Linear"], "weights": weights}}
    imported = of(modifier("GPTQModifier", config_groups=groups, **given))
    options = config(imported, "q").options
    assert options["order"] == order
    assert options["damping"] == given.get("dampening_frac", 0.01)
    assert options["block_size"] == given.get("block_size", 128)
    assert ("actorder" in places(imported.changed)) == (given.get("actorder") == "group")


def test_no_damping_at_all_is_taken() -> None:
    options = config(of(modifier("GPTQModifier", scheme="W4A16", dampening_frac=0)), "q").options
    assert options["damping"] == 0
    assert "damping_basis" not in options


# Which layers: the library's own matching, on the model's own modules

MATCHES: list[tuple[list[str], list[str]]] = [
    (["Linear"], ["lm_head"]),
    (["Linear"], ["re:.*lm_head", "re:.*visual.*"]),
    (["Linear"], ["lm_head", "re:model.visual.*"]),
    (["Linear"], ["re:.*self_attn", "lm_head", "model.visual.merger.linear_fc1"]),
    (["re:.*(q|k|v|o|gate|up|down)_proj$"], ["lm_head"]),
    (["re:.*self_attn\\.(k|q|o|v)_proj$"], []),
    (["model.language_model.layers.0.mlp.down_proj", "re:.*o_proj"], ["re:.*layers.1.*"]),
    (["re:(?i).*DOWN_PROJ"], []),
]


@pytest.fixture(scope="module")
def modules(tiny: Callable[..., Path]) -> torch.nn.Module:
    hf_class = known_archs()[FAMILY].hf_class
    model: torch.nn.Module = getattr(import_transformers(), hf_class).from_pretrained(tiny(FAMILY))
    return model


@pytest.mark.parametrize(("targets", "ignore"), MATCHES)
def test_targets_and_ignore_mean_the_modules_that_the_library_finds(
    targets: list[str], ignore: list[str], tiny: Callable[..., Path], modules: torch.nn.Module
) -> None:
    groups = {"a": {"targets": targets, "weights": {"strategy": "channel"}}}
    imported = of(modifier("QuantizationModifier", config_groups=groups, ignore=ignore))
    plan = make_plan(imported.recipe, bind(tiny(FAMILY)))
    theirs = {
        name
        for name, module in match_named_modules(modules, targets, ignore)
        if isinstance(module, torch.nn.Linear)
    }
    assert {row.site.name for row in plan.quantized} == theirs


def test_a_name_counts_more_than_an_expression_and_that_more_than_a_class() -> None:
    """And of two expressions the first in the alphabet."""
    bits = {"num_bits": 2, "strategy": "channel"}, {"num_bits": 3, "strategy": "channel"}
    groups = {
        "a": {"targets": [NAMES["down"][2]], "weights": {"num_bits": 8, "strategy": "channel"}},
        "b": {"targets": ["re:.*o_proj"], "weights": bits[0]},
        "c": {"targets": ["re:.*(o|down)_proj", "re:.*q_proj"], "weights": bits[1]},
        "d": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}},
    }
    for order in (list(groups), list(reversed(groups))):
        given = {name: groups[name] for name in order}
        imported = of(modifier("QuantizationModifier", config_groups=given))
        found = {layer: config(imported, layer).weights for layer in NAMES}
        assert found["down"] == spec("int8-channel")
        assert found["o"] == spec("int3-channel")
        assert found["q"] == spec("int3-channel")
        assert found["vision"] == found["head"] == spec("int4-channel")
        assert found["patch"] is None


def test_a_later_modifier_counts_more_but_for_what_it_ignores() -> None:
    content = {
        "quant_stage": {
            "quant_modifiers": {
                "QuantizationModifier": {"scheme": "W4A16", "ignore": ["lm_head"]},
                "GPTQModifier": {"scheme": "W8A8", "ignore": ["lm_head", "re:.*self_attn.*"]},
            }
        }
    }
    imported = of(content)
    assert config(imported, "q").weights == spec("int4-g128")
    assert config(imported, "q").solver == "rtn"
    assert config(imported, "q").activations is None
    assert config(imported, "down").weights == spec("int8-channel")
    assert config(imported, "down").solver == "gptq"
    assert config(imported, "head").weights is None
    assert imported.recipe.calibration.block_sequential


def test_the_documented_mixture_of_awq_and_gptq() -> None:
    imported = of(
        """
quant_stage:
  quant_modifiers:
    AWQModifier:
      duo_scaling: true
      mappings:
        - smooth_layer: "re:.*input_layernorm$"
          balance_layers: ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]
    QuantizationModifier:
      ignore: ["lm_head"]
      scheme: "W4A16"
      targets:
        - "re:.*self_attn\\\\.(k|q|o|v)_proj$"
    GPTQModifier:
      ignore: ["lm_head"]
      scheme: "W8A8"
      targets:
        - "re:.*mlp\\\\.(down|gate|up)_proj$"
      block_size: 128
      dampening_frac: 0.001
      actorder: null
"""
    )
    [awq] = imported.recipe.transforms
    assert awq.name == "awq"
    assert awq.options == {"grid": 20, "duo": True}
    meant = {
        layer
        for layer, at in NAMES.items()
        if awq.match.matches(modality=at[0], role=at[1], name=at[2])
    }
    assert meant == {"q"}
    q, down = config(imported, "q"), config(imported, "down")
    assert (q.weights, q.activations, q.solver) == (spec("int4-g128"), None, "rtn")
    assert (down.weights, down.activations) == (spec("int8-channel"), spec("int8-token"))
    assert (down.solver, down.options["damping"], down.options["order"]) == (
        "gptq",
        0.001,
        "original",
    )
    assert config(imported, "head").weights is None


def test_the_documented_static_w8a8_with_smoothquant() -> None:
    imported = of(
        """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 0.8
    GPTQModifier:
      ignore: [lm_head]
      actorder: null
      config_groups:
        group_0:
          weights: {num_bits: 8, type: int, symmetric: true, strategy: channel}
          input_activations: {num_bits: 8, symmetric: false, dynamic: false, strategy: tensor,
            type: int, observer: static_minmax}
          targets: [Linear]
"""
    )
    [smooth] = imported.recipe.transforms
    assert (smooth.name, smooth.options) == ("smoothquant", {"alpha": 0.8})
    assert smooth.match == Match(modality="llm", role=("attn.qkv", "mlp.gate", "mlp.up"))
    found = config(imported, "q")
    assert (found.weights, found.activations) == (spec("int8-channel"), spec("int8-tensor-asym"))
    assert found.activation_range == RangeRule()


@pytest.mark.parametrize(
    "transform", ["SmoothQuantModifier", "SpinQuantModifier", "AWQModifier", "IMatrixGatherer"]
)
@pytest.mark.parametrize("quantizer", ["GPTQModifier", "QuantizationModifier", "AutoRoundModifier"])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_transform_after_what_quantizes_is_told(
    transform: str, quantizer: str, stages: int
) -> None:
    """And one that stands before it is not."""
    asked = {quantizer: {"scheme": "W8A8"}}
    orders = ([{transform: None}, asked], [asked, {transform: None}])
    if stages == 1:
        right, wrong = ({"quant_modifiers": one | two} for one, two in orders)
    else:
        right, wrong = ({"a_stage": {"modifiers": one}, "b_stage": two} for one, two in orders)
    if transform == "AWQModifier":
        # It must be followed by one that quantizes.
        wrong |= {"last_stage": {"QuantizationModifier": {"scheme": "W8A8"}}}
    late = "its turn comes after"
    assert not any(late in line for line in of(right).lines)
    [told] = [line for line in of(wrong).lines if late in line]
    assert transform in told
    assert f"{late} {quantizer}" in told


def test_the_documented_cache_with_gptq() -> None:
    imported = of(
        """
quant_stage:
  quant_modifiers:
    GPTQModifier:
      ignore: ["lm_head"]
      actorder: null
      config_groups:
        group_0:
          weights: {num_bits: 4, type: "int", symmetric: true, strategy: "channel", actorder: False}
          targets: ["Linear"]
      kv_cache_scheme:
        {num_bits: 8, type: float, symmetric: true, strategy: tensor}
"""
    )
    kv, rule = imported.recipe.kv_cache_settings
    assert kv.name == "fp8"
    assert rule == RangeRule("ema", momentum=0.01)
    assert config(imported, "q").options["order"] == "original"


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ({"num_bits": 8, "type": "float", "strategy": "attn_head"}, "fp8-head"),
        ({"num_bits": 8}, "int8"),
        ({"num_bits": 4, "dynamic": False, "observer": "static_minmax"}, "int4"),
    ],
)
def test_caches_alone(scheme: dict[str, Any], name: str) -> None:
    imported = of(modifier("QuantizationModifier", kv_cache_scheme=scheme))
    assert imported.recipe.kv_cache_settings[0].name == name
    assert not imported.recipe.rules


# The other modifiers


def test_imatrix_weighs_errors_with_the_diagonal() -> None:
    weights = {"num_bits": 4, "group_size": 128, "observer": "imatrix_mse"}
    group = {"targets": ["Linear"], "weights": weights}
    content = {
        "recipe": [
            {"IMatrixGatherer": {"ignore": ["lm_head"]}},
            {"QuantizationModifier": {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}},
        ],
        "num_calibration_samples": 64,
        "batch_size": 2,
        "max_seq_length": 2048,
        "output_dir": "out",
    }
    imported = of(content)
    assert config(imported, "q").options == {"scale_weighting": "diagonal"}
    assert (imported.recipe.calibration.samples, imported.recipe.calibration.batch_size) == (64, 2)
    nearest = {one.place: one.nearest for one in imported.dropped}
    assert nearest["max_seq_length"] == "--max-length"
    assert nearest["output_dir"] == "--out"
    assert "recipe[0].IMatrixGatherer.ignore" in nearest


def test_autoround_tunes_what_is_rounded() -> None:
    imported = of(modifier("AutoRoundModifier", scheme="W4A16", iters=50, batch_size=2, lr=0.01))
    found = config(imported, "q")
    assert (found.solver, found.tuner) == ("rtn", "autoround")
    assert found.tuner_options == {"iterations": 50, "batch": 2, "learning_rate": 0.01}


def test_awq_of_older_releases_rounds_by_itself() -> None:
    imported = of(
        modifier("AWQModifier", scheme="W4A16_ASYM", targets=["Linear"], ignore=["lm_head"])
    )
    assert config(imported, "q").weights == spec("int4-g128-asym")
    assert config(imported, "q").solver == "rtn"
    assert imported.recipe.transforms[0].match == Match(modality="llm", role=("attn", "mlp"))


def test_smoothquant_with_mappings_ignore_and_logarithms() -> None:
    keys = {
        "mappings": [
            [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
            ["re:.*up_proj", "re:.*post_attention_layernorm"],
        ],
        "ignore": ["re:.*layers.1.*"],
        "algorithm": "log_equalization",
    }
    content = {
        "s_stage": {
            "s_modifiers": {"SmoothQuantModifier": keys, "QuantizationModifier": {"scheme": "W8A8"}}
        }
    }
    [smooth] = of(content).recipe.transforms
    assert smooth.options == {"search": True}
    first = "model.language_model.layers.0.self_attn.q_proj"
    assert smooth.match.matches(modality="llm", role="attn.qkv.q", name=first)
    assert not smooth.match.matches(modality="llm", role="attn.qkv.q", name=NAMES["q"][2])
    assert not smooth.match.matches(modality="llm", role="mlp.down", name=NAMES["down"][2])


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        (
            {},
            {"residual": True, "values": True, "online": False, "kind": "hadamard", "signs": False},
        ),
        (
            {
                "rotations": ["R1", "r2", "R4"],
                "transform_type": "random-hadamard",
                "transform_block_size": 64,
            },
            {
                "residual": True,
                "values": True,
                "online": True,
                "kind": "hadamard",
                "signs": True,
                "online_block": 64,
            },
        ),
        (
            {"rotations": ["R4"]},
            {"residual": False, "values": False, "online": True, "signs": False},
        ),
        (
            {"rotations": "R1", "transform_type": "random-matrix"},
            {"residual": True, "values": False, "online": False, "kind": "random"},
        ),
    ],
)
def test_spinquant_is_a_rotation(keys: dict[str, Any], options: dict[str, Any]) -> None:
    content = {
        "s_stage": {
            "s_modifiers": {"SpinQuantModifier": keys, "QuantizationModifier": {"scheme": "W4A8"}}
        }
    }
    [rotation] = of(content).recipe.transforms
    assert rotation.options == options
    assert rotation.match == Match(modality="llm")


def test_r3_turns_the_keys_of_an_integer_cache_alone() -> None:
    for number, rotated in (("int", True), ("float", False)):
        scheme = {"scheme": "W8A8", "kv_cache_scheme": {"num_bits": 8, "type": number}}
        content = {"SpinQuantModifier": {"rotations": ["R3"]}, "QuantizationModifier": scheme}
        imported = of(content)
        assert imported.recipe.kv_cache_settings[0].rotated is rotated
        assert not imported.recipe.transforms
        assert "SpinQuantModifier.rotations" in [one.place for one in imported.changed]


def test_settings_without_effect_are_dropped_with_the_nearest_thing() -> None:
    imported = of(
        modifier(
            "GPTQModifier",
            scheme="W4A16",
            offload_hessians=True,
            sequential_targets=["Qwen3VLTextDecoderLayer"],
            start=0.0,
            ignore=["lm_head", "LlamaRMSNorm", "SiLU"],
            bypass_divisibility_checks=True,
        )
    )
    assert {one.place.rpartition(".")[2] for one in imported.dropped} == {
        "offload_hessians",
        "sequential_targets",
        "start",
        "ignore[1]",
        "ignore[2]",
    }
    resolved = resolve(imported.recipe, modality="vision", role="attn.qkv", name="x")
    assert resolved.fallback == "nearest"


# What cannot be


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            modifier("GPTQModifier", scheme="W4A61"),
            ["unknown scheme 'W4A61'", "did you mean 'W4A16'"],
        ),
        (modifier("GPTQModifer", scheme="W4A16"), ["unknown key; did you mean 'GPTQModifier'"]),
        (
            modifier("GPTQModifier", scheme="W4A16", dampening=1),
            ["dampening: unknown key; did you mean 'dampening_frac'"],
        ),
        (
            modifier("GPTQModifier", scheme="W4A16", dampening_frac="a"),
            ["dampening_frac: a number from 0 to 10"],
        ),
        (
            modifier("GPTQModifier", scheme="W4A16", dampening_frac=None),
            ["dampening_frac: a number, not null"],
        ),
        (
            modifier("GPTQModifier", scheme="W4A16", actorder="up"),
            ["actorder: static, weight, group"],
        ),
        (
            modifier("GPTQModifier", ignore=["lm_head"]),
            ["it names neither a scheme nor config_groups"],
        ),
        (
            modifier("GPTQModifier", scheme="W4A16", config_groups={}),
            ["give either this or config_groups"],
        ),
        (
            modifier("GPTQModifier", scheme="W4A16", ignore=["Linear"]),
            ["would leave nothing to quantize"],
        ),
        (modifier("GPTQModifier", scheme="W4A16", ignore=["re:("]), ["ignore[0]"]),
        (modifier("GPTQModifier", scheme="W4A16", ignore=[""]), ["an empty name means nothing"]),
        (modifier("GPTQModifier", scheme="W4A16", ignore=3), ["a text or a list of texts"]),
        (modifier("QuIPModifier"), ["QuIPModifier", "SpinQuantModifier"]),
        (modifier("SparseGPTModifier"), ["nothing here prunes"]),
        (modifier("AWQModifier"), ["no modifier after it quantizes"]),
        (modifier("SmoothQuantModifier"), ["nothing is quantized"]),
        (modifier("SpinQuantModifier", rotations=["R9"], learnable=True), ["not R9", "learnable"]),
        ({"quant_stage": {"quant_modifiers": 3}}, ["expected a mapping"]),
        ({"x_stage": {}, "oops": 1}, ["oops: unknown key"]),
    ],
)
def test_what_cannot_be_is_an_error_with_its_place(content: Any, words: list[str]) -> None:
    refused(content, *words)


@pytest.mark.parametrize(
    ("side", "given", "words"),
    [
        ("weights", {"num_bits": 9}, "num_bits: a whole number from 2 to 8"),
        ("weights", {"bits": 4}, "bits: unknown key; did you mean 'num_bits'"),
        ("weights", {"num_bits": 5, "type": "float"}, "float numbers have 8, 6, 4 bits"),
        ("weights", {"dynamic": True}, "never dynamic"),
        ("weights", {"strategy": "token"}, "always dynamic"),
        ("weights", {"strategy": "group"}, "needs a positive group size"),
        ("weights", {"strategy": "channel", "group_size": 64}, "needs strategy group"),
        ("weights", {"strategy": "block", "block_structure": [128, 64]}, "squares"),
        (
            "weights",
            {"strategy": "tensor_group", "group_size": 32, "num_bits": 4, "type": "float"},
            "groups of 16",
        ),
        ("weights", {"observer": "mean"}, "'mean' is not a choice"),
        ("weights", {"observer_kwargs": {"shrink": 1}, "observer": "mse"}, "unknown key"),
        ("input_activations", {"strategy": "token"}, "always dynamic"),
        ("input_activations", {"strategy": "channel"}, "no scales by channel"),
        ("input_activations", {"strategy": "group", "group_size": 32}, "need dynamic: true"),
        ("input_activations", {"strategy": "attn_head"}, "only a key-value cache"),
        ("input_activations", {"dynamic": "local"}, "local is for the strategy tensor_group"),
        ("input_activations", {"actorder": "static"}, "only weights have columns"),
        ("input_activations", {"observer": "imatrix_mse"}, "is for weights"),
    ],
)
def test_impossible_arguments(side: str, given: dict[str, Any], words: str) -> None:
    group = {"targets": ["Linear"], "weights": {"strategy": "channel"}} | {side: given}
    refused(modifier("QuantizationModifier", config_groups={"a": group}), words, f"a.{side}")


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ({"num_bits": 3}, "fp8, int8 or int4"),
        ({"symmetric": False}, "symmetric about zero"),
        ({"dynamic": True}, "static"),
        ({"strategy": "token"}, "'token' is not a choice"),
    ],
)
def test_impossible_caches(scheme: dict[str, Any], words: str) -> None:
    refused(modifier("QuantizationModifier", kv_cache_scheme=scheme), words)


# Names of modules


@pytest.mark.parametrize(
    ("entry", "means", "not_means"),
    [
        ("lm_head", ["lm_head"], ["model.lm_heads"]),
        ("visual", ["model.visual.blocks.0.attn.qkv", "visual.x"], ["model.visuals.x"]),
        ("q_proj", ["a.b.q_proj"], ["a.b.xq_proj", "a.q_proj_x"]),
        ("resampler.*", ["resampler.kv_proj", "x.resampler.a.b"], ["resampler"]),
        ("re:visual.*", ["visual.a", "model.visual.a"], ["x.visual.a"]),
        ("re:.*visual", ["model.visual.a"], ["model.vision"]),
        ("re:^lm_head$", ["lm_head"], ["lm_head.x"]),
        ("re:(?i)LM_HEAD", ["lm_head"], []),
        (
            "model.layers.3.mlp.down_proj",
            ["model.language_model.layers.3.mlp.down_proj"],
            ["model.language_model.layers.13.mlp.down_proj"],
        ),
        ("re:model\\.layers\\.3\\.", ["model.language_model.layers.3.a", "model.layers.3.a"], []),
    ],
)
def test_names_mean_whole_paths(entry: str, means: list[str], not_means: list[str]) -> None:
    match = Match(name=(named_modules(entry).pattern,))
    other = Match(name=(excluding("re:.*", [named_modules(entry).pattern]),))
    for name in means:
        assert match.matches(modality="llm", role="attn", name=name)
        assert not other.matches(modality="llm", role="attn", name=name)
    for name in not_means:
        assert not match.matches(modality="llm", role="attn", name=name)
        assert other.matches(modality="llm", role="attn", name=name)


# Whatever a stranger writes

KEYS = sorted(
    {setting.name for table in llm_compressor.TABLES.values() for setting in table}
    | {*llm_compressor.MODIFIERS, *SCHEMES, "a_stage", "a_modifiers", "group_0"}
)
WORDS = [*KEYS, "Linear", "re:.*", "re:(", "int", "float", "token", "group", "mse", "", "x" * 300]
LEAVES = (
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-3, 130)
    | strategies.floats()
    | strategies.sampled_from(WORDS)
)
CONTENTS = strategies.recursive(
    LEAVES,
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(strategies.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=300)
@drawn(name=strategies.sampled_from(sorted(llm_compressor.MODIFIERS)), content=CONTENTS)
def test_any_content_is_read_or_refused_in_words(name: str, content: Any) -> None:
    for one in (modifier(name, **content) if isinstance(content, dict) else content, content):
        with contextlib.suppress(pq.PrismQuantError):
            llm_compressor.read(one, "x")


def test_what_is_nested_too_deeply_is_refused() -> None:
    content: Any = {"GPTQModifier": {"scheme": "W4A16"}}
    for _ in range(3000):
        content = {"a_stage": content}
    refused(content, "nested too deeply")
    deep: Any = []
    for _ in range(3000):
        deep = [deep]
    assert not llm_compressor.recognizes(deep)


# Values in quotes, errors that follow from others, long lists


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dampening_frac": "0.1"}, 'from 0 to 10, not the text "0.1": write it without quotes'),
        ({"block_size": "64"}, 'from 1 to 65536, not the text "64": write it without quotes'),
        ({"bypass_divisibility_checks": "True"}, 'not the text "True": write it without quotes'),
        ({"dampening_frac": "few"}, 'from 0 to 10, not the text "few"'),
    ],
)
def test_a_text_is_told_from_a_number(keys: dict[str, Any], words: str) -> None:
    said = refused(modifier("GPTQModifier", scheme="W4A16", **keys), words)
    assert ("without quotes" in said) == ("without quotes" in words)


@pytest.mark.parametrize("scheme", ["W99A16", {"W99A16": ["Linear"]}])
def test_nothing_else_is_said_of_an_unknown_scheme(scheme: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        import_recipe(modifier("GPTQModifier", scheme=scheme))
    assert len(caught.value.findings) == 1


def test_of_two_caches_the_earlier_is_dropped() -> None:
    def cache(kind: str) -> dict[str, Any]:
        return {"QuantizationModifier": {"kv_cache_scheme": {"num_bits": 8, "type": kind}}}

    stages = {"a_stage": {"quant_modifiers": cache("int")}}
    imported = of(stages | {"b_stage": {"quant_modifiers": cache("float")}})
    assert imported.recipe.kv_cache is not None
    assert imported.recipe.kv_cache["format"] == "fp8"
    assert {one.why for one in imported.dropped} == {"that of a later modifier counts"}
    assert all(one.place.startswith("a_stage") for one in imported.dropped)


def test_one_setting_with_two_values_is_an_error() -> None:
    inner = {"recipe": modifier("QuantizationModifier", scheme="W8A8"), "batch_size": 2}
    refused({"recipe": inner, "batch_size": 3}, "batch_size: it is given twice")
    assert of({"recipe": inner, "batch_size": 2}).recipe.calibration.batch_size == 2


NAMED = strategies.sampled_from(
    ["a", "a.b", "model.layers.1.q_proj", "model.layers.10", "a.b.c", "lm_head", "b.*", "c?"]
)
PATHS = strategies.sampled_from(
    ["a", "x.a.b", "a.bc", "model.layers.1.q_proj", "model.language_model.layers.10.k", "b.d", "cc"]
)


@drawn(strategies.lists(NAMED, max_size=8, unique=True), PATHS)
def test_names_of_a_long_list_mean_what_they_mean_alone(entries: list[str], path: str) -> None:
    alone = [named_modules(entry).pattern for entry in entries]
    others = [named_modules(f"model.layers.{number}.fc1").pattern for number in range(2, FEW + 10)]
    joined = together([*alone, *others])
    assert len(joined) < 10
    meant = Match(name=tuple(alone)).matches(modality="llm", role="mlp", name=path) if alone else 0
    assert Match(name=tuple(joined)).matches(modality="llm", role="mlp", name=path) == bool(meant)


def test_a_long_list_of_names_is_few_expressions_and_one_note() -> None:
    names = [f"model.layers.{number}.mlp.experts.7.up_proj" for number in range(3000)]
    imported = of(modifier("QuantizationModifier", scheme="W8A8", ignore=names))
    skipping = imported.recipe.rules[1]
    assert skipping.skip
    assert len(skipping.match.name) < 100
    [one] = imported.changed
    assert one.ours == "skip: true"
    assert one.why.startswith("3000 entries")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["a.b"] * 20_001, "ignore: 20001 names, more than 20000: use expressions"),
        (["re:a"] * 1001, "ignore: 1001 expressions (re:), more than 1000: join them with |"),
    ],
)
def test_a_list_that_is_too_long_is_refused_in_its_own_words(
    entries: list[str], words: str
) -> None:
    refused(modifier("QuantizationModifier", scheme="W8A8", ignore=entries), words)
    refused(modifier("SmoothQuantModifier", ignore=entries), words)


def test_what_one_modifier_alone_ignores_has_a_bound() -> None:
    names = [f"model.layers.{number}.mlp" for number in range(100)]
    first = {"GPTQModifier": {"scheme": "W4A16", "targets": ["re:.*mlp.*"], "ignore": names}}
    second = {"QuantizationModifier": {"scheme": "W8A8", "targets": ["re:.*attn.*"]}}
    content = {"a_stage": {"quant_modifiers": first}, "b_stage": {"quant_modifiers": second}}
    refused(content, "ignore: 100 entries that this modifier alone ignores are too long together")


def test_a_list_of_modifiers_is_a_recipe() -> None:
    modifiers = [{"SmoothQuantModifier": {}}, {"GPTQModifier": {"scheme": "W8A8"}}]
    assert import_recipe(modifiers).dialect == "llm-compressor"
    assert (
        import_recipe(modifiers).recipe.rules
        == import_recipe(modifiers, llm_compressor.NAME).recipe.rules
    )
    for content in ([], [3], [{"rules": []}]):
        with pytest.raises(RecipeError) as caught:
            import_recipe(content)
        assert "only a list of llm-compressor's modifiers" in str(caught.value)
    for content in (3, None, 1.5):
        with pytest.raises(RecipeError) as caught:
            import_recipe(content, llm_compressor.NAME)  # type: ignore[arg-type]
        assert "a recipe is a file, a text or a dictionary" in str(caught.value)
