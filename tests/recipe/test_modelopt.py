"""Configurations of ModelOpt: those it knows by name, against what it makes of them itself."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings, strategies

import prismquant as pq
from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import LayerProblem
from prismquant.errors import RecipeError
from prismquant.formats.spec import NumberSpec, spec
from prismquant.models.bind import bind
from prismquant.numerics.rules import RangeRule
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.importers import modelopt
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.modelopt_presets import PRESETS
from prismquant.recipe.importers.quantizer_names import KINDS, layer_globs
from prismquant.recipe.layer_config import LayerConfig
from prismquant.recipe.resolve import resolve
from prismquant.search.format_grammar import formats_on_offer

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = json.loads(
    (Path(__file__).parent.parent / "golden" / "modelopt-quantizers.json").read_text()
)
Q = "model.language_model.layers.0.self_attn.q_proj"
HEAD = "lm_head"
VISION = "model.visual.blocks.0.mlp.linear_fc1"
# What has no counterpart, and why.
REFUSED = {
    "NVFP4_SVDQUANT_DEFAULT_CFG": "nothing here keeps a part of low rank",
    "NVFP4_MLP_WEIGHT_ONLY_CFG": "such scales are of 16 columns",
    "W4A8_NVFP4_FP8_CFG": "such scales are of 16 columns",
    "NVFP4_KV_CFG": "a cache is fp8, int8 or int4",
}
OFF = [{"quantizer_name": "*", "enable": False}]


def of(content: Any) -> Imported:
    """A recipe of the dialect, told by its content."""
    imported = import_recipe(content)
    assert imported.dialect == "modelopt"
    return imported


def config(imported: Imported, name: str = Q) -> LayerConfig:
    modality = "llm" if "visual" not in name else "projector" if "merger" in name else "vision"
    role = {"lm_head": "lm_head", VISION: "mlp.up"}.get(name, "mlp.down")
    return resolve(imported.recipe, modality=modality, role=role, name=name).config


def with_entries(*entries: Any, algorithm: Any = "max") -> dict[str, Any]:
    return {"quant_cfg": [*OFF, *entries], "algorithm": algorithm}


def weights(**cfg: Any) -> dict[str, Any]:
    return {"quantizer_name": "*weight_quantizer", "cfg": cfg}


def inputs(**cfg: Any) -> dict[str, Any]:
    return {"quantizer_name": "*input_quantizer", "cfg": cfg}


def refused(content: Any, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        import_recipe(content, "modelopt")
    assert words in str(caught.value)


# Against ModelOpt itself


def named(told: Any, *, is_input: bool) -> str | None:
    """Name of our format for what ModelOpt tells of a quantizer, by its own rules."""
    if told is None:
        return None
    if len(told) == 2:
        return named(told[0], is_input=is_input)
    bits, axis, _, blocks = told
    floats = {(4, 3): "fp8", (2, 1): "fp4", (3, 2): "fp6-e3m2"}
    number = f"int{bits}" if isinstance(bits, int) else floats[tuple(bits)]
    end = "-narrow" if isinstance(bits, int) else ""
    if not blocks:
        return f"{number}-{'channel' if axis == 0 else 'tensor'}{end}"
    scale = blocks.get("scale_bits")
    if scale is not None:
        small = {(4, 3): "nvfp4", (8, 0): f"mx{number}-ceil"}[tuple(scale)]
        return f"{small}-dyn" if is_input else small
    if blocks["-1"] is None:
        return f"{number}-{'token' if is_input else 'channel'}{end}"
    return f"{number}-{'b' if '-2' in blocks else 'g'}{blocks['-1']}{end}"


@pytest.mark.parametrize("name", [n for n in GOLDEN["quantizers"] if n not in REFUSED])
def test_every_layer_gets_what_modelopt_gives_it(name: str) -> None:
    source = name if name in PRESETS else {"quant_cfg": GOLDEN["own"][name]}
    imported = of(source)
    for layer, (weight, input_) in GOLDEN["quantizers"][name].items():
        found = config(imported, layer)
        wanted = named(weight, is_input=False)
        assert found.weights == (spec(wanted) if wanted else None), layer
        if found.weights is not None:
            wanted = named(input_, is_input=True)
            assert found.activations == (spec(wanted) if wanted else None), layer


def test_every_named_configuration_is_known() -> None:
    theirs = {name for name in GOLDEN["quantizers"] if name.endswith("_CFG")}
    assert theirs <= PRESETS.keys()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_named_configuration_is_read_or_refused_with_why(name: str) -> None:
    if name in REFUSED:
        refused(name, REFUSED[name])
        return
    imported = of(name)
    assert imported.recipe.name == name
    assert of(f"mtq.{name}").recipe.rules == imported.recipe.rules
    if "KV" in name:
        assert imported.recipe.kv_cache_settings[0].name == "fp8"
    else:
        assert of(PRESETS[name]).recipe.rules == imported.recipe.rules


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "MXFP8_DEFAULT_CFG"])
def test_named_configurations_fit_the_families(
    name: str, family: str, tiny: Callable[..., Path]
) -> None:
    plan = make_plan(of(name).recipe, bind(tiny(family)))
    assert {str(row.site.modality) for row in plan.quantized} == {"llm"}
    assert not [remark for remark in plan.remarks if "means no layer" in remark and "re:" in remark]
    # Scale is moved only where it ends in a layer that is quantized.
    ends = {name for edge in plan.edges for name in edge.edge.consumers}
    assert ends <= {row.site.name for row in plan.quantized}
    assert bool(ends) == ("SMOOTHQUANT" in name)


def test_inputs_that_no_checkpoint_declares_are_told(tiny: Callable[..., Path]) -> None:
    cfg = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
    recipe = of(with_entries(weights(num_bits=8, axis=0), inputs(**cfg))).recipe
    [told] = [one for one in make_plan(recipe, bind(tiny("qwen3_vl"))).remarks if "narrow" in one]
    assert told.startswith("no checkpoint format declares narrow inputs with dynamic scales")
    plan = make_plan(of("INT8_DEFAULT_CFG").recipe, bind(tiny("qwen3_vl")))
    assert not [one for one in plan.remarks if "narrow" in one]


def test_one_runs_from_a_python_file(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "cfg.py").write_text(f"CFG = {PRESETS['FP8_PER_CHANNEL_PER_TOKEN_CFG']!r}\n")
    result = pq.quantize(tiny("qwen3_vl"), tmp_path / "cfg.py", tmp_path / "out")
    assert {row.config.weights.name for row in result.plan.quantized} == {"fp8-channel"}
    assert result.record.translation is not None
    assert result.record.translation.dialect == "modelopt"
    assert pq.load(tmp_path / "out")[0] is not None


@pytest.mark.parametrize("cfg", [{"axis": 0}, {"axis": None}, {"block_sizes": {-1: 16}}], ids=str)
@pytest.mark.parametrize("bits", [4, 8, (4, 3)])
def test_largest_values_give_their_weights(cfg: dict[str, Any], bits: Any) -> None:
    """Integers: amax over 2^(b-1) - 1, half to even; E4M3: amax over 448."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    found = config(of(with_entries(weights(num_bits=bits, **cfg))))
    assert found.weights is not None
    problem = LayerProblem(("q",), (weight,), found.weights, found.weight_range, torch.float32)
    solved = build_solver(found.solver, found.options).solve(problem).weights[0]
    size = 16 if "block_sizes" in cfg else 64 if cfg["axis"] == 0 else weight.numel()
    w = weight.reshape(-1, size)
    most = w.abs().amax(1, keepdim=True)
    if isinstance(bits, int):
        scale = most / (2 ** (bits - 1) - 1)
        wanted = (
            torch.clamp(torch.round(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
        )
    else:
        scale = most / 448
        wanted = (w / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale
    torch.testing.assert_close(
        solved.dequantize(torch.float32), wanted.reshape(weight.shape), rtol=1e-6, atol=1e-7
    )


# The documented dictionary

W4A8 = {
    "quant_cfg": {
        "*weight_quantizer": {"num_bits": 4, "axis": 0, "narrow_range": True, "enable": True},
        "*input_quantizer": {
            "num_bits": 8,
            "type": "dynamic",
            "block_sizes": {-1: None},
            "narrow_range": True,
        },
        "default": {"enable": False},
    },
    "algorithm": "max",
}


def test_the_documented_w4a8_dictionary_means_vision_and_head_too_and_says_so() -> None:
    imported = of(W4A8)
    for name in (Q, VISION, HEAD):
        found = config(imported, name)
        assert found.weights == spec("int4-channel-narrow")
        assert found.activations == spec("int8-token-narrow")
    told = "\n".join(imported.lines)
    assert "lm_head and vision towers as well: no entry leaves them out, there neither" in told
    assert "quant_cfg.default" in told


def test_with_its_authors_ignore_list_it_means_the_language_model() -> None:
    ignored = {"*lm_head*": {"enable": False}, "*visual*": {"enable": False}}
    imported = of({"quant_cfg": W4A8["quant_cfg"] | ignored, "algorithm": None})
    assert config(imported).weights == spec("int4-channel-narrow")
    assert config(imported, VISION).weights is None
    assert config(imported, HEAD).weights is None
    assert "as well" not in "\n".join(imported.lines)


def test_the_same_in_yaml_json_and_as_a_list(tmp_path: Path) -> None:
    whole = {"quant_cfg": W4A8["quant_cfg"], "algorithm": "max"}
    keyed = json.loads(json.dumps(whole))
    (tmp_path / "w.json").write_text(json.dumps({"quantize": keyed, "metadata": {"a": 1}}))
    cfg = dict(W4A8["quant_cfg"])  # type: ignore[call-overload]
    listed = [{"default": cfg.pop("default")}, *({key: one} for key, one in cfg.items())]
    rules = of(whole).recipe.rules
    assert of(tmp_path / "w.json").recipe.rules == rules
    assert of({"quant_cfg": listed}).recipe.rules == rules


# Attributes


@pytest.mark.parametrize(
    ("cfg", "name"),
    [
        ({}, None),
        ({"num_bits": 8}, "int8-tensor-narrow"),
        ({"num_bits": 4, "axis": 0, "effective_bits": 4.0}, "int4-channel-narrow"),
        ({"num_bits": 3, "block_sizes": {"-1": 32}}, "int3-g32-narrow"),
        ({"num_bits": 4, "block_sizes": {-1: None}}, "int4-channel-narrow"),
        ({"num_bits": "e4m3", "axis": [0]}, "fp8-channel"),
        ({"num_bits": "E2M1", "block_sizes": {-1: 16, "scale_bits": "e4m3"}}, "nvfp4"),
        ({"num_bits": (2, 3), "block_sizes": {-1: 32, "scale_bits": (8, 0)}}, "mxfp6-ceil"),
        ({"num_bits": (5, 2)}, "fp8-e5m2-tensor"),
        ({"num_bits": 8, "type": "dynamic"}, "int8-tensor-narrow"),
    ],
)
def test_attributes_of_weights(cfg: dict[str, Any], name: str | None) -> None:
    if name is None:
        refused(with_entries(weights(**cfg)), "it is empty")
    else:
        assert config(of(with_entries(weights(**cfg)))).weights == spec(name)


@pytest.mark.parametrize(
    ("cfg", "name"),
    [
        ({"num_bits": 8}, "int8-tensor-narrow"),
        ({"num_bits": 8, "type": "dynamic"}, "int8-token-narrow"),
        ({"num_bits": 8, "type": "dynamic", "block_sizes": {-1: 64}}, "int8-g64-narrow-dyn"),
        ({"num_bits": 8, "block_sizes": {-1: None}, "type": "dynamic"}, "int8-token-narrow"),
        ({"num_bits": (4, 3), "block_sizes": {-1: 32, "scale_bits": (8, 0)}}, "mxfp8-ceil-dyn"),
        ({"num_bits": 8, "calibrator": "histogram"}, "int8-tensor-narrow"),
    ],
)
def test_attributes_of_inputs(cfg: dict[str, Any], name: str) -> None:
    found = config(of(with_entries(weights(num_bits=8, axis=0), inputs(**cfg))))
    assert found.activations == spec(name)
    histogram = cfg.get("calibrator") == "histogram"
    assert found.activation_range == RangeRule("percentile" if histogram else "minmax")


def test_outputs_convolutions_and_classes() -> None:
    outputs = {"quantizer_name": "*output_quantizer", "cfg": {"num_bits": 8}}
    assert config(of(with_entries(weights(axis=0), outputs))).outputs == spec("int8-tensor-narrow")
    linear = {
        "quantizer_name": "*weight_quantizer",
        "parent_class": "nn.Linear",
        "cfg": {"axis": 0},
    }
    patch = {"modality": "vision", "role": "patch_embed", "name": "model.visual.patch_embed.proj"}
    assert resolve(of(with_entries(linear)).recipe, **patch).config.weights is None
    every = of(with_entries(weights(axis=0), inputs(num_bits=8)))
    found = resolve(every.recipe, **patch).config
    assert (found.weights, found.activations) == (spec("int8-channel-narrow"), None)
    older = {
        "quant_cfg": {"default": {"enable": False}, "nn.Linear": {"*weight_quantizer": {"axis": 0}}}
    }
    assert config(of(older)).weights == spec("int8-channel-narrow")


# Algorithms


@pytest.mark.parametrize(
    ("algorithm", "solver", "options", "rule", "transforms"),
    [
        ("max", "rtn", {"scale_weighting": "none"}, RangeRule(), []),
        (None, "rtn", {"scale_weighting": "none"}, RangeRule(), []),
        (
            {"method": "smoothquant", "alpha": 0.5},
            "rtn",
            {"scale_weighting": "none"},
            RangeRule(),
            [("smoothquant", {"alpha": 0.5})],
        ),
        (
            "smoothquant",
            "rtn",
            {"scale_weighting": "none"},
            RangeRule(),
            [("smoothquant", {"alpha": 1.0})],
        ),
        (
            {"method": "awq_lite", "alpha_step": 0.05},
            "rtn",
            {"scale_weighting": "none"},
            RangeRule(),
            [("awq", {"grid": 20, "duo": True})],
        ),
        (
            "awq_full",
            "rtn",
            {"scale_weighting": "group"},
            RangeRule("mse", max_shrink=0.5, steps=10, norm=2.0, signed_scale=False),
            [("awq", {"grid": 10, "duo": True})],
        ),
        (
            {"method": "mse", "fp8_scale_sweep": True},
            "rtn",
            {"scale_weighting": "none"},
            RangeRule("sweep", signed_scale=False),
            [],
        ),
        (
            {"method": "mse", "start_multiplier": 0.5, "stop_multiplier": 1.0},
            "rtn",
            {"scale_weighting": "none"},
            RangeRule("mse", max_shrink=0.5, steps=6, norm=2.0, signed_scale=False),
            [],
        ),
        (
            {"method": "local_hessian"},
            "rtn",
            {"scale_weighting": "group"},
            RangeRule("sweep", signed_scale=False),
            [],
        ),
        (
            [{"method": "smoothquant", "alpha": 0.5}, {"method": "gptq", "perc_damp": 0.05}],
            "gptq",
            {
                "block_size": 128,
                "damping": 0.05,
                "damping_basis": "mean",
                "order": "original",
                "scale_weighting": "none",
                "refine_passes": 0,
            },
            RangeRule(),
            [("smoothquant", {"alpha": 0.5})],
        ),
    ],
)
def test_algorithms(
    algorithm: Any, solver: str, options: Any, rule: RangeRule, transforms: list[Any]
) -> None:
    imported = of(with_entries(weights(num_bits=4, axis=0), algorithm=algorithm))
    found = config(imported)
    assert (found.solver, found.options, found.weight_range) == (solver, options, rule)
    assert [(one.name, one.options) for one in imported.recipe.transforms] == transforms
    calibration = imported.recipe.calibration
    assert not calibration.layer_sequential
    assert not calibration.block_sequential
    assert calibration.quantized_inputs == (solver == "gptq")


def test_blocks_may_see_what_precedes_them_quantized() -> None:
    carried = {"enable": True, "get_qdq_activations_from_prev_layer": True}
    imported = of(
        with_entries(
            weights(num_bits=4, axis=0), algorithm={"method": "gptq", "layerwise": carried}
        )
    )
    assert imported.recipe.calibration.block_sequential
    assert imported.recipe.calibration.quantized_inputs
    assert not imported.recipe.calibration.layer_sequential


def test_four_over_six_is_a_range_rule() -> None:
    assert config(of("NVFP4_FOUR_OVER_SIX_CFG")).weight_range == RangeRule("four_over_six")


def test_caches() -> None:
    cache = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8}}
    imported = of(with_entries(weights(axis=0), cache))
    assert imported.recipe.kv_cache_settings[0].name == "int8"
    off = {"quantizer_name": "*[kqv]_bmm_quantizer", "enable": False}
    assert of(with_entries(weights(axis=0), cache, off)).recipe.kv_cache is None


# auto_quantize


@pytest.mark.parametrize("form", ["arguments", "file"])
def test_arguments_of_a_search_are_answered_with_its_commands(form: str) -> None:
    formats = ["NVFP4_DEFAULT_CFG", PRESETS["FP8_DEFAULT_CFG"], None]
    disabled = ["*lm_head*", "*visual*"]
    content: dict[str, Any] = {
        "quantization_formats": formats,
        "constraints": {"effective_bits": 5.4},
        "disabled_layers": disabled,
        "method": "kl_div",
        "num_score_steps": 64,
        "data_loader": "loader",
    }
    if form == "file":
        content = {
            "metadata": {"recipe_type": "auto_quantize"},
            "auto_quantize": {
                "candidate_formats": formats,
                "constraints": {"effective_bits": 5.4},
                "disabled_layers": disabled,
                "auto_quantize_method": "kl_div",
                "score_size": 64,
            },
        }
    with pytest.raises(RecipeError) as caught:
        import_recipe(content)
    first, second, _ = str(caught.value.remedy).split("; then ")
    words = shlex.split(first)
    named = dict(zip(words[3::2], words[4::2], strict=True))
    assert words[:3] == ["prismquant", "analyze", "MODEL"]
    assert named["--formats"] == "nvfp4+nvfp4-dyn,fp8-tensor+fp8-tensor"
    assert (named["--method"], named["--samples"]) == ("kl_div", "64")
    assert [words[i + 1] for i, word in enumerate(words) if word == "--disable"] == disabled
    assert "--bits 5.4" in second
    offered = formats_on_offer(named["--formats"])
    found = [NumberSpec.from_dict(choice.weights) for choice in offered.values()]
    assert found == [spec("nvfp4"), spec("fp8-tensor")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"quantization_formats": []}, "a list of configurations"),
        ({"quantization_formats": ["NVFP5"]}, "quantization_formats[0]"),
        ({"quantization_formats": ["FP8_KV_CFG"]}, "it quantizes no MLP layer"),
        (
            {"quantization_formats": ["FP8_DEFAULT_CFG"], "method": "x"},
            'gradient or kl_div, not the text "x"',
        ),
        (
            {"quantization_formats": ["FP8_DEFAULT_CFG"], "score_size": 1, "num_score_steps": 2},
            "num_score_steps: give either this or score_size",
        ),
        ({"quantization_formats": ["FP8_DEFAULT_CFG"], "metod": 1}, "did you mean 'method'"),
        (
            {"quantization_formats": ["FP8_DEFAULT_CFG"], "constraints": {"effective_bits": 99}},
            "effective_bits: a number from 0.01 to 16",
        ),
    ],
)
def test_wrong_arguments_of_a_search(content: Any, words: str) -> None:
    refused(content, words)


# What cannot be


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("INT8_DEFUALT_CFG", "did you mean 'INT8_DEFAULT_CFG'"),
        (with_entries(weights(num_bit=4)), "num_bit: unknown key; did you mean 'num_bits'"),
        (with_entries(weights(num_bits=9)), "there is no integer format of 9 bits"),
        (with_entries(weights(num_bits=(1, 2))), "there is no number of [1, 2] bits"),
        (with_entries(weights(num_bits="x")), 'a word such as e4m3, not the text "x"'),
        (with_entries(weights(axis=1)), "axis: null, or 0 for weights, not 1"),
        (with_entries(weights(axis=0), inputs(axis=0)), "axis: null, or 0 for weights"),
        (
            with_entries(weights(axis=0), inputs(block_sizes={-1: 32})),
            "blocks of inputs are dynamic",
        ),
        (with_entries(weights(block_sizes={-1: 0})), "a size or null, not 0"),
        (with_entries(weights(block_sizes={-2: 4})), "blocks of columns (-1) are missing"),
        (with_entries(weights(block_sizes={-1: 4, -2: 8})), "blocks are squares"),
        (with_entries(weights(block_sizes={-3: 4})), "unknown key"),
        (with_entries(weights(block_sizes={-1: 16, "scale_bits": (3, 4)})), "scales have"),
        (with_entries(weights(unsigned=True)), "codes have a sign"),
        (with_entries(weights(rotate=True)), "rotations are transforms here"),
        (with_entries(weights(backend="x")), "nothing here is like it"),
        (with_entries({"quantizer_name": "*"}), "it needs cfg or enable"),
        (with_entries({"quantizer_nam": "*", "enable": True}), "a"),
        (with_entries({"quantizer_name": "*weight_quantizer", "enable": True}), "no entry before"),
        (with_entries(weights(axis=0), algorithm="gtpq"), "did you mean 'gptq'"),
        (with_entries(weights(axis=0), algorithm={"method": "gptq", "damp": 1}), "damp: unknown"),
        (with_entries(weights(axis=0), algorithm="svdquant"), "part of low rank"),
        (with_entries(weights(axis=0), algorithm=3), "expected a mapping"),
        (with_entries(), "no weight quantizer is on"),
        ({"quant_cfg": 3}, "a list or a mapping of entries"),
        ({"quant_cfg": [3]}, "it needs quantizer_name"),
        ({"quant_cfg": {3: {"enable": True}}}, "a key is a word"),
        ({"quant_cfg": OFF, "algorithm": "max", "algo": 1}, "algo: unknown key"),
        ({"quantize": {"quant_cfg": OFF}, "imports": {"a": "b"}}, "ModelOpt has no part 'b'"),
        (with_entries({"qantizer_name": "*", "enable": False}), "did you mean 'quantizer_name'?"),
        (with_entries({("a",): "*", "enable": False}), "a key is a word, not"),
        (with_entries({"*weight_quantizr": {"num_bits": 4}}), "did you mean '*weight_quantizer'?"),
        (with_entries({"lm_head": {"enable": False}}), "did you mean '*lm_head*'?"),
        (with_entries({"*q*": {"enable": False, "bit": 4}}), "cfg.bit: unknown key"),
        (
            with_entries(weights(axis=0), {"quantizer_name": "*k_bmm_quantizer", "cfg": {}}),
            "keys and values have one format",
        ),
        (
            with_entries(
                weights(axis=0), {"quantizer_name": "*q_bmm_quantizer", "cfg": {"axis": None}}
            ),
            "nothing here quantizes q_bmm",
        ),
    ],
)
def test_what_cannot_be_is_an_error(content: Any, words: str) -> None:
    refused(content, words)


@pytest.mark.parametrize("content", ["INT8", {}, {"rules": []}, {"quantize": 3}, [], 3])
def test_other_contents_are_not_recognized(content: Any) -> None:
    assert not modelopt.recognizes(content)


# Globs

PARTS = strategies.sampled_from(
    ["*", "?", "a", "b", ".", "weight_quantizer", "_quantizer", "[ab]", "[!a]", "input", "t"]
)
NAMES = strategies.lists(strategies.sampled_from("ab.t"), max_size=6).map("".join)


@settings(max_examples=500)
@drawn(
    pattern=strategies.lists(PARTS, max_size=6).map("".join),
    name=NAMES,
    kind=strategies.sampled_from(KINDS),
)
def test_globs_of_layers_mean_what_globs_of_quantizers_do(
    pattern: str, name: str, kind: str
) -> None:
    wanted = fnmatch.fnmatchcase(f"{name}.{kind}", pattern)
    assert any(fnmatch.fnmatchcase(name, one) for one in layer_globs(pattern, kind)) == wanted


KEYS = sorted({setting.name for table in modelopt.TABLES.values() for setting in table})
LEAVES = (
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-2, 130)
    | strategies.floats()
    | strategies.sampled_from([*KEYS, "max", "gptq", "dynamic", "*weight_quantizer", "e4m3", "["])
    | strategies.tuples(strategies.integers(0, 8), strategies.integers(0, 8))
)
CONTENTS = strategies.recursive(
    LEAVES,
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(
            strategies.sampled_from([*KEYS, "*weight_quantizer", "*", "nn.Linear"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300)
@drawn(entries=CONTENTS, algorithm=CONTENTS, cfg=CONTENTS)
def test_any_content_is_read_or_refused_in_words(entries: Any, algorithm: Any, cfg: Any) -> None:
    entry = {"quantizer_name": "*weight_quantizer", "cfg": cfg}
    for content in (
        {"quant_cfg": entries, "algorithm": algorithm},
        {"quant_cfg": [*OFF, entry], "algorithm": algorithm},
    ):
        with contextlib.suppress(pq.PrismQuantError):
            modelopt.read(content, "x")
