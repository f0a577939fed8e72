"""Recipes of MI-optimize: the documented ones retyped, against its formulas written out."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import tiny_text
import torch
import yaml
from hypothesis import given as drawn
from hypothesis import settings, strategies

import prismquant as pq
from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import LayerProblem
from prismquant.errors import RecipeError
from prismquant.formats.spec import spec
from prismquant.numerics.rules import RangeRule
from prismquant.recipe.importers import mi_optimize
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.layer_config import LayerConfig
from prismquant.recipe.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Q = ("llm", "attn.qkv.q", "model.language_model.layers.1.self_attn.q_proj")
HEAD = ("llm", "lm_head", "lm_head")
VISION = ("vision", "attn.qkv", "model.visual.blocks.0.attn.qkv")


def of(content: str | dict[str, Any]) -> Imported:
    """A recipe of the dialect, told by its content."""
    imported = import_recipe(yaml.safe_load(content) if isinstance(content, str) else content)
    assert imported.dialect == "mi-optimize"
    return imported


def config(imported: Imported, layer: tuple[str, str, str] = Q) -> LayerConfig:
    modality, role, name = layer
    return resolve(imported.recipe, modality=modality, role=role, name=name).config


def with_keys(algo: str, **keys: Any) -> dict[str, Any]:
    keys = {"w_dtype": "int4", "a_dtype": "float16"} | keys
    return {"quant_config": {"algo": algo, "kwargs": keys}}


def noted(imported: Imported, kind: str) -> set[str]:
    return {one.place.rpartition(".")[2] for one in getattr(imported, kind)}


# The documented files

RTN = """
quant_config:
  algo: rtn
  model_type: "llama"
  kwargs:
    w_dtype: int8
    a_dtype: int8
    device: 'cuda'
    offload: 'cpu'
    w_groupsize: -1
    a_groupsize: -1
    a_qtype: "per_tensor"
    w_qtype: "per_channel"
    w_has_zero: False
    a_has_zero: False
    w_unsign: True
    a_unsign: True
    quantization_type: 'static'
    block_sequential: True
    layer_sequential: True
    skip_layers:
      - lm_head
  calibrate_config:
    name: 'ptb'
    split: train
    nsample: 1
    seqlen: 2048
"""
GPTQ = """
quant_config:
  algo: gptq
  kwargs:
    w_dtype: int4
    a_dtype: float16
    device: 'cuda'
    offload: 'cpu'
    blocksize: 128
    percdamp: .01
    actorder: True
    w_groupsize: -1
    w_qtype: "per_channel"
    block_sequential: True
    layer_sequential: True
    skip_layers:
      - lm_head
  calibrate_config:
    name: 'wikitext2'
    split: train
    nsamples: 64
    seqlen: 2048
    seed: 42
"""
SMOOTHQUANT = """
quant_config:
  algo: smoothquant
  kwargs:
    w_dtype: int4
    a_dtype: int8
    device: 'cuda'
    offload: 'cpu'
    w_groupsize: 128
    w_qtype: "per_channel"
    a_qtype: "per_token"
    block_sequential: False
    layer_sequential: False
    alpha: 0.5
    quant_out: False
    skip_layers:
      - lm_head
"""
ZEROQUANT = """
quant_config:
  algo: zeroquant
  kwargs:
    w_dtype: int8
    a_dtype: int8
    w_groupsize: 128
    a_groupsize: -1
    a_qtype: "per_token"
    w_qtype: "per_group"
    w_has_zero: False
    a_has_zero: False
    w_unsign: True
    a_unsign: True
    quantization_type: 'dynamic'
    block_sequential: True
    layer_sequential: False
    skip_layers:
      - lm_head
"""
W4A8 = """
quant_config:
  algo: rtn
  model_type: "other_model"
  kwargs:
    w_dtype: int4
    a_dtype: int8
    w_groupsize: -1
    a_groupsize: -1
    a_qtype: "per_token"
    w_qtype: "per_channel"
    w_has_zero: True
    a_has_zero: False
    w_unsign: True
    a_unsign: True
    quantization_type: 'dynamic'
    block_sequential: True
    layer_sequential: True
    skip_layers:
      - lm_head
  calibrate_config: {name: 'wikitext2', split: train, nsamples: 1, seqlen: 2048}
"""


@pytest.mark.parametrize(
    ("text", "solver", "weights", "inputs"),
    [
        (RTN, "rtn", "int8-channel-narrow", "int8-tensor-narrow"),
        (GPTQ, "gptq", "int4-channel-asym", None),
        (SMOOTHQUANT, "rtn", "int4-channel-narrow", "int8-token-narrow"),
        (ZEROQUANT, "rtn", "int8-g128-narrow", "int8-token-narrow"),
        (W4A8, "rtn", "int4-channel-asym", "int8-token-narrow"),
    ],
)
def test_the_documented_files_mean_what_their_authors_meant(
    text: str, solver: str, weights: str, inputs: str | None
) -> None:
    imported = of(text)
    found = config(imported)
    assert found.solver == solver
    assert found.weights == spec(weights)
    assert found.activations == (spec(inputs) if inputs else None)
    assert found.outputs is None
    assert found.weight_range == RangeRule()
    assert found.tuner is None
    assert config(imported, HEAD).weights is None
    assert config(imported, VISION).weights is None


def test_calibration_and_what_else_the_documented_files_say() -> None:
    rtn, gptq, smooth = of(RTN), of(GPTQ), of(SMOOTHQUANT)
    assert rtn.recipe.calibration.samples == 1
    assert noted(rtn, "changed") == {"nsample"}
    assert {"device", "offload", "seqlen", "model_type"} <= noted(rtn, "dropped")
    assert {"name", "split"} <= noted(rtn, "honoured")
    assert (rtn.data, gptq.data, smooth.data) == ("ptb:train", "wikitext2:train", "")
    assert (rtn.recipe.calibration.block_sequential, rtn.recipe.calibration.layer_sequential) == (
        True,
        True,
    )
    assert (gptq.recipe.calibration.samples, gptq.recipe.calibration.seed) == (64, 42)
    assert not gptq.changed
    assert not smooth.recipe.calibration.block_sequential
    assert not smooth.recipe.calibration.layer_sequential
    [transform] = smooth.recipe.transforms
    assert (transform.name, transform.options) == ("smoothquant", {"alpha": 0.5})
    assert {"alpha", "algo"} <= noted(smooth, "changed")
    assert "w_groupsize" in noted(smooth, "dropped")


def test_gptq_is_theirs() -> None:
    assert config(of(GPTQ)).options == {
        "block_size": 128,
        "damping": 0.01,
        "damping_basis": "mean",
        "order": "activation",
        "scale_weighting": "none",
        "refine_passes": 0,
    }
    other = config(of(with_keys("gptq", actorder=False, percdamp=0, blocksize=64))).options
    assert (other["order"], other["damping"], other["block_size"]) == ("original", 0, 64)


@pytest.mark.parametrize("form", ["around", "bare", "flat", "named"])
def test_every_form_is_the_same_recipe(form: str, tmp_path: Path) -> None:
    whole = yaml.safe_load(RTN)
    inner = whole["quant_config"]
    content = {
        "around": whole,
        "bare": inner,
        "flat": {"algo": "rtn", "calibrate_config": inner["calibrate_config"], **inner["kwargs"]},
        "named": {"rtn": {k: v for k, v in inner.items() if k != "algo"}},
    }[form]
    assert of(content).recipe == of(whole).recipe


def test_it_runs_on_a_vision_language_model(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "smooth.yaml").write_text(SMOOTHQUANT)
    result = pq.quantize(
        tiny("qwen3_vl"), tmp_path / "smooth.yaml", tmp_path / "out", calibration_file, samples=2
    )
    assert {str(row.site.modality) for row in result.plan.quantized} == {"llm"}
    assert len(result.plan.quantized) == 2 * 7
    assert result.record.translation is not None
    assert result.record.translation.dialect == "mi-optimize"
    assert pq.load(tmp_path / "out")[0] is not None


# Their formulas, written out


def theirs(weight: torch.Tensor, bits: int, zero: bool, groups: int) -> torch.Tensor:
    """Weights as the tool's quantizer with unsigned codes gives them, ``groups`` to a scale."""
    w = weight.reshape(-1, groups)
    low, high, most = w.amin(1, keepdim=True), w.amax(1, keepdim=True), (1 << bits) - 1
    if zero:
        scale = (high - low) / most
        point = -torch.round(low / scale)
    else:
        scale = torch.maximum(high.abs(), low.abs()) / (most // 2)
        point = torch.full_like(scale, most // 2)
    codes = torch.clamp(torch.round(w / scale + point), 0, most)
    return (scale * (codes - point)).reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("kind", ["per_channel", "per_group", "per_tensor"])
def test_rounding_to_nearest_gives_their_weights(bits: int, zero: bool, kind: str) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(bits))
    keys = {"w_dtype": f"int{bits}", "w_qtype": kind, "w_groupsize": 32, "w_has_zero": zero}
    found = config(of(with_keys("rtn", **keys)))
    assert found.weights is not None
    problem = LayerProblem(("q",), (weight,), found.weights, found.weight_range, torch.float32)
    solved = build_solver(found.solver, found.options).solve(problem).weights[0]
    size = {"per_channel": 64, "per_group": 32, "per_tensor": weight.numel()}[kind]
    torch.testing.assert_close(
        solved.dequantize(torch.float32), theirs(weight, bits, zero, size), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_gives_their_weights(ordered: bool) -> None:
    """A scale a row, found before the loop, with a zero point; the inverse's upper factor."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 64, generator=generator)
    mixing = torch.randn(64, 64, generator=generator) * torch.rand(64, generator=generator)
    inputs = torch.randn(512, 64, generator=generator) @ mixing
    moments = inputs.T @ inputs / len(inputs)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    scale = (high - low) / 15
    point = (-torch.round(low / scale)).clamp(0, 15)
    h = moments.double() + 0.01 * moments.double().diagonal().mean() * torch.eye(64)
    order = torch.argsort(moments.diagonal(), descending=True) if ordered else torch.arange(64)
    factor = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w, wanted = weight.double().clone(), torch.empty(24, 64, dtype=torch.float64)
    for step, column in enumerate(order.tolist()):
        codes = torch.clamp(torch.round(w[:, column] / scale) + point, 0, 15)
        wanted[:, column] = (codes - point) * scale
        error = (w[:, column] - wanted[:, column]) / factor[step, step]
        later = order[step + 1 :]
        w[:, later] -= error[:, None] * factor[step, step + 1 :][None, :]
    found = config(of(with_keys("gptq", actorder=ordered)))
    assert found.weights is not None
    problem = LayerProblem(
        ("q",), (weight,), found.weights, found.weight_range, torch.float32, hessian=moments
    )
    solved = build_solver(found.solver, found.options).solve(problem).weights[0]
    torch.testing.assert_close(
        solved.dequantize(torch.float32).double(), wanted, rtol=1e-5, atol=1e-5
    )


# Key by key


@pytest.mark.parametrize(
    ("algo", "keys", "weights", "inputs"),
    [
        ("rtn", {}, "int4-channel-narrow", None),
        ("rtn", {"w_groupsize": 64}, "int4-g64-narrow", None),
        ("rtn", {"groupsize": 64}, "int4-g64-narrow", None),
        ("rtn", {"groupsize": 64, "w_groupsize": 32}, "int4-g32-narrow", None),
        ("rtn", {"w_qtype": "per_channel", "w_groupsize": 64}, "int4-channel-narrow", None),
        ("rtn", {"w_unsign": False}, "int4-channel-narrow", None),
        ("rtn", {"w_dtype": "fp8", "w_qtype": "per_channel"}, "fp8-channel", None),
        ("rtn", {"w_dtype": "fp4", "w_groupsize": 32}, "fp4-g32", None),
        ("rtn", {"a_dtype": "int8"}, "int4-channel-narrow", "int8-tensor-narrow"),
        ("rtn", {"a_dtype": "int8", "a_has_zero": True}, "int4-channel-narrow", "int8-tensor-asym"),
        (
            "rtn",
            {"a_dtype": "int8", "quantization_type": "dynamic"},
            "int4-channel-narrow",
            "int8-token-narrow",
        ),
        (
            "rtn",
            {"a_dtype": "int8", "a_qtype": "per_token", "quantization_type": "static"},
            "int4-channel-narrow",
            "int8-token-narrow",
        ),
        (
            "rtn",
            {"a_dtype": "int8", "a_qtype": "per_group", "a_groupsize": 32},
            "int4-channel-narrow",
            "int8-g32-narrow-dyn",
        ),
        ("rtn", {"a_dtype": "fp8", "a_qtype": "per_token"}, "int4-channel-narrow", "fp8-token"),
        ("gptq", {"w_groupsize": 128}, "int4-g128-asym", None),
        ("gptq", {"w_groupsize": 128, "w_has_zero": False}, "int4-g128-narrow", None),
        (
            "gptq",
            {"a_dtype": "int8", "a_qtype": "per_token"},
            "int4-channel-asym",
            "int8-token-narrow",
        ),
        ("awq", {}, "int4-g128-asym", None),
        ("awq", {"w_has_zero": False, "w_groupsize": 64}, "int4-g64-narrow", None),
        ("awq", {"w_groupsize": -1}, "int4-channel-asym", None),
        ("smoothquant", {"w_qtype": "per_group", "w_dtype": "int8"}, "int8-g128-narrow", None),
        ("smoothquant", {"a_dtype": "int8"}, "int4-channel-narrow", "int8-token-narrow"),
        (
            "smoothquant",
            {"a_dtype": "int8", "quantization_type": "static"},
            "int4-channel-narrow",
            "int8-tensor-narrow",
        ),
        ("zeroquant", {"a_dtype": "int8"}, "int4-g128-narrow", "int8-token-narrow"),
        ("spinquant", {}, "int4-channel-narrow", None),
        ("awq+gptq", {}, "int4-g128-asym", None),
        ("smoothquant+gptq", {"a_dtype": "int8"}, "int4-channel-asym", "int8-token-narrow"),
    ],
)
def test_formats_of_every_algorithm(
    algo: str, keys: dict[str, Any], weights: str, inputs: str | None
) -> None:
    found = config(of(with_keys(algo, **keys)))
    assert found.weights == spec(weights)
    assert found.activations == (spec(inputs) if inputs else None)
    assert found.solver == ("gptq" if algo.endswith("gptq") else "rtn")


@pytest.mark.parametrize(
    ("algo", "keys", "transforms"),
    [
        ("rtn", {}, []),
        ("gptq", {}, []),
        ("awq", {}, [("awq", {"grid": 20, "duo": True})]),
        ("awq", {"auto_scale": False}, []),
        ("awq+gptq", {}, [("awq", {"grid": 20, "duo": True})]),
        ("smoothquant", {"a_dtype": "int8", "alpha": 0.8}, [("smoothquant", {"alpha": 0.8})]),
        ("smoothquant", {"alpha": 0.8}, []),
        ("smoothquant+gptq", {"a_dtype": "int8"}, [("smoothquant", {"alpha": 0.5})]),
        ("spinquant+gptq", {}, [("rotation", {})]),
        ("zeroquant", {"a_dtype": "int8"}, []),
    ],
)
def test_transforms_of_every_algorithm(algo: str, keys: Any, transforms: list[Any]) -> None:
    recipe = of(with_keys(algo, **keys)).recipe
    assert [(one.name, one.options) for one in recipe.transforms] == transforms
    assert all(one.match.modality == ("llm",) for one in recipe.transforms)


def test_awq_searches_clips_unless_told_otherwise() -> None:
    found = config(of(with_keys("awq")))
    assert found.options == {"scale_weighting": "group"}
    assert found.weight_range == RangeRule(
        "mse", max_shrink=0.5, steps=10, norm=2.0, signed_scale=False
    )
    found = config(of(with_keys("awq", auto_clip=False)))
    assert (found.options, found.weight_range) == ({"scale_weighting": "none"}, RangeRule())


def test_outputs_are_quantized_like_inputs() -> None:
    found = config(of(with_keys("smoothquant", a_dtype="int8", quant_out=True)))
    assert found.outputs == found.activations == spec("int8-token-narrow")
    dropped = of(with_keys("rtn", quant_out=True))
    assert noted(dropped, "dropped") == {"quant_out"}


@pytest.mark.parametrize(
    ("algo", "keys", "changed"),
    [
        ("rtn", {"w_unsign": False}, {"w_unsign"}),
        ("rtn", {"w_unsign": False, "w_has_zero": True}, set()),
        ("rtn", {"groupsize": 64}, {"groupsize"}),
        ("rtn", {"num_calibrate": 4}, {"num_calibrate"}),
        (
            "rtn",
            {"a_dtype": "int8", "a_qtype": "per_token", "quantization_type": "static"},
            {"quantization_type"},
        ),
        (
            "rtn",
            {"a_dtype": "int8", "a_qtype": "per_tensor", "quantization_type": "dynamic"},
            {"a_qtype"},
        ),
        ("rtn", {"w_qtype": "per_group", "w_groupsize": -1}, {"w_qtype"}),
        ("gptq", {"w_has_zero": False}, {"w_has_zero"}),
        ("gptq", {"a_dtype": "int8"}, {"a_dtype"}),
        ("gptq", {"w_qtype": "per_channel", "w_groupsize": 64}, {"w_qtype"}),
        ("zeroquant", {"w_has_zero": True}, {"w_has_zero"}),
        ("rtn", {"w_dtype": "fp8"}, {"w_dtype"}),
    ],
)
def test_what_means_something_else_is_told(algo: str, keys: Any, changed: set[str]) -> None:
    assert noted(of(with_keys(algo, **keys)), "changed") == changed


@pytest.mark.parametrize(
    ("algo", "keys"),
    [
        ("rtn", {"blocksize": 64, "percdamp": 0.1, "actorder": True, "alpha": 0.4}),
        ("rtn", {"auto_scale": True, "auto_clip": False, "quant_out": False}),
        ("gptq", {"auto_scale": True, "auto_clip": True, "alpha": 0.5}),
        ("awq+gptq", {"auto_clip": True}),
        ("smoothquant", {"a_groupsize": 8, "a_has_zero": True, "a_unsign": False}),
        ("rtn", {"device": "cuda", "offload": "cpu", "calibrate_seq_length": 2048}),
        (
            "rtn",
            {"w_qscheme": "per_channel_affine", "calibrate_name": "boss", "model_type": "llama"},
        ),
    ],
)
def test_what_has_no_effect_is_told(algo: str, keys: dict[str, Any]) -> None:
    imported = of(with_keys(algo, **keys))
    assert noted(imported, "dropped") == keys.keys()
    assert all(one.why for one in imported.dropped)


def test_layers_are_skipped_by_whole_paths() -> None:
    imported = of(with_keys("rtn", skip_layers=["lm_head", r".*layers\.1\..*"]))
    assert config(imported).weights is None
    first = ("llm", "mlp.up", "model.language_model.layers.0.mlp.up_proj")
    assert config(imported, first).weights is not None
    imported = of(with_keys("rtn", skip_layers=["layers"]))
    assert config(imported).weights is not None
    assert config(imported, HEAD).weights is not None
    assert config(of(with_keys("rtn")), HEAD).weights is None


# What cannot be


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (with_keys("gtpq"), "algo: 'gtpq' is not a choice; did you mean 'gptq'"),
        (with_keys("spqr"), "no outlier is kept in a sparse matrix"),
        (with_keys("quip"), "no codebook"),
        (with_keys("fp8"), "write algo: rtn with w_dtype: fp8"),
        (with_keys("rtn", w_dtype="int9"), "w_dtype: 'int9' is not a choice; did you mean 'int8'"),
        (with_keys("rtn", w_dtype="binary"), "'binary' is not a choice"),
        (with_keys("rtn", w_dtype="float16"), "weights in floating point: nothing to do"),
        (with_keys("rtn", w_groupsiez=3), "unknown key; did you mean 'w_groupsize'"),
        (with_keys("rtn", w_qtype="per_token"), "a weight has no scales per_token"),
        (with_keys("rtn", a_dtype="int8", a_qtype="per_dimension"), "no server multiplies"),
        (with_keys("rtn", a_dtype="int8", a_qtype="per_group"), "per_group needs a size"),
        (with_keys("rtn", w_has_zero="no"), 'w_has_zero: true or false, not the text "no"'),
        (with_keys("rtn", skip_layers=["("]), "skip_layers"),
        (with_keys("rtn", alpha=3, quantization_type="both"), None),
        ({"quant_config": {"kwargs": {"w_dtype": "int4"}}}, "algo: it is missing"),
        ({"quant_config": {"algo": "rtn"}}, "w_dtype: it is missing"),
        ({"quant_config": 3}, "expected a mapping"),
        ({"quant_config": {"algo": "rtn", "kwargs": {}}, "more": 1}, "more: unknown key"),
        ({"rtn": {"kwargs": {"w_dtype": "int4"}}, "awq": {"kwargs": {}}}, "it holds 2 recipes"),
    ],
)
def test_what_cannot_be_is_an_error(content: Any, words: str | None) -> None:
    if words is None:
        assert noted(of(content), "dropped") == {"alpha", "quantization_type"}
        return
    with pytest.raises(RecipeError) as caught:
        import_recipe(content, "mi-optimize")
    assert words in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"rules": []}, {"algo": 1}, [], "rtn", {"rtn": 1}, {3: 4}])
def test_other_contents_are_not_recognized(content: Any) -> None:
    assert not mi_optimize.recognizes(content)


KEYS = sorted({setting.name for table in mi_optimize.TABLES.values() for setting in table})
VALUES = (
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-2, 300)
    | strategies.floats()
    | strategies.sampled_from(
        [*mi_optimize.ALGORITHMS, "int4", "fp8", "float16", "per_token", "per_group", "static", "("]
    )
)
CONTENTS = strategies.dictionaries(
    strategies.sampled_from(KEYS),
    VALUES | strategies.lists(VALUES, max_size=2),
    max_size=8,
)


@settings(max_examples=300)
@drawn(algo=strategies.sampled_from([*mi_optimize.ALGORITHMS, "x"]), kwargs=CONTENTS, more=CONTENTS)
def test_any_content_is_read_or_refused_in_words(algo: str, kwargs: Any, more: Any) -> None:
    whole = {"algo": algo, "kwargs": {"w_dtype": "int4"} | kwargs, "calibrate_config": more}
    for content in (whole, {"quant_config": more | whole}, kwargs, more):
        with contextlib.suppress(pq.PrismQuantError):
            mi_optimize.read(content, "x")


def test_of_two_counts_of_samples_one_counts_and_the_other_is_dropped() -> None:
    content = with_keys("rtn")
    content["quant_config"]["calibrate_config"] = {"nsamples": 16, "nsample": 4}
    imported = of(content)
    assert imported.recipe.calibration.samples == 16
    [one] = [note for note in imported.dropped if note.place.endswith(".nsample")]
    assert one.why == "nsamples: 16 counts"
    assert "nsample" not in noted(imported, "changed")


def test_too_many_layers_are_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="skip_layers: 1001 expressions, more than 1000: join"):
        of(with_keys("rtn", skip_layers=[f"a{number}" for number in range(1001)]))


@pytest.mark.parametrize(
    ("config", "kwargs", "calibrate", "data"),
    [
        ({}, {}, {"name": "wikitext2", "split": "train"}, "wikitext2:train"),
        ({}, {}, {"name": "c4"}, "c4"),
        ({"calibrate_name": "ptb"}, {}, {}, "ptb"),
        ({}, {"calibrate_name": "pileval"}, {"split": "validation"}, "pileval:validation"),
        ({"calibrate_name": "c4"}, {"calibrate_name": "c4"}, {"name": "c4"}, "c4"),
        ({}, {}, {"name": "ceval", "split": "test"}, ""),
        ({}, {}, {}, ""),
    ],
)
def test_the_text_that_is_named_is_calibrated_on(
    config: Any, kwargs: Any, calibrate: Any, data: str
) -> None:
    content = with_keys("gptq", **kwargs)["quant_config"] | config
    imported = of({"quant_config": content | {"calibrate_config": calibrate}})
    assert imported.data == data
    assert imported.to_dict().get("data", "") == data
    kind = "honoured" if data else "dropped"
    assert {*config, *kwargs, *calibrate} <= noted(imported, kind)


def test_a_text_is_named_once() -> None:
    content = with_keys("gptq", calibrate_name="ptb")["quant_config"]
    for calibrate in ({"name": "c4"}, {"name": 3}):
        with pytest.raises(RecipeError) as caught:
            of({"quant_config": content | {"calibrate_config": calibrate}})
        assert "calibrate_config.name: " in str(caught.value)


def test_it_calibrates_on_the_named_text_where_no_data_are_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def load_dataset(*place: str, **options: Any) -> list[dict[str, str]]:
        asked.append((place, options["split"]))
        return [{"text": ""}, {"text": "the square is red"}, {"text": " the circle is blue \n"}]

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
    model = tiny_text.build("llama", tmp_path / "model")
    content = with_keys("gptq")["quant_config"]
    content |= {"calibrate_config": {"name": "wikitext2", "split": "train", "nsamples": 2}}
    result = pq.quantize(model, content, tmp_path / "out")
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), "train")]
    assert result.record.calibration == "wikitext2:train"
