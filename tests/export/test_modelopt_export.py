"""ModelOpt's checkpoint: its own formula gives our values from the tensors that we write."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from export.test_export import logits, quantized

import prismquant as pq
from prismquant.api import export
from prismquant.check import check
from prismquant.errors import FormatError
from prismquant.export.compressed_tensors.stored import open_checkpoint
from prismquant.export.load_quantized import load_model
from prismquant.opening import read_json
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LLM = {"modality": "llm", "role": ["attn", "mlp"]}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
RECIPES: dict[str, Any] = {
    "FP8": {"rules": [{"match": LLM, "weights": "fp8-tensor", "activations": "fp8-tensor"}]},
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4a16",
    "MXFP8": "mxfp8",
    "FP8_PB_WO": {
        "rules": [{"match": {"role": "mlp"}, "weights": "fp8-b128", "activations": "fp8-g128-dyn"}]
    },
}


def with_inputs(weights: str, activations: str) -> dict[str, Any]:
    return {"rules": [{"match": LLM, "weights": weights, "activations": activations}]}


def dequantized(reader: ShardReader, name: str, algorithm: str) -> torch.Tensor:
    """What the modelopt package computes from a layer's tensors, written out."""
    weight = reader.read(f"{name}.weight")
    scale = reader.read(f"{name}.weight_scale")
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        assert weight.dtype == torch.uint8
        codes = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1)
        steps = scale.float() * reader.read(f"{name}.weight_scale_2")
        return E2M1[codes.long()] * steps.repeat_interleave(16, dim=1)
    values = weight.float()
    if algorithm == "MXFP8":
        return values * torch.exp2(scale.float() - 127).repeat_interleave(32, dim=1)
    if algorithm == "FP8_PB_WO":
        rows, _, columns, _ = scale.shape
        wide = scale.reshape(rows, columns).repeat_interleave(128, 0).repeat_interleave(128, 1)
        return values * wide[: len(values)]
    return values * (scale if scale.ndim == 0 else scale[:, None])


@pytest.mark.parametrize("algorithm", RECIPES)
def test_the_formula_gives_our_values(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, algorithm: str
) -> None:
    folder = tiny("qwen2_5_vl")
    source = quantized(folder, tmp_path / "source", calibration_file, RECIPES[algorithm])
    result = export(source, "modelopt", tmp_path / "out")
    reader, ours = ShardReader(tmp_path / "out"), open_checkpoint(source)
    assert result.layers == len(ours.quantized) > 0
    for layer in ours.quantized:
        expected = ours.codes(layer).dequantize()
        assert torch.equal(dequantized(reader, layer.prefix, algorithm), expected), layer.name
        for suffix in ("weight_scale_2", "input_scale"):
            name = f"{layer.prefix}.{suffix}"
            if name in reader.names:
                assert reader.info(name).dtype == torch.float32
                assert reader.info(name).shape == ()
    section = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    own = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert section["quant_algo"] == own["quant_algo"] == algorithm
    assert section["ignore"] == own["exclude_modules"]
    assert set(own) >= {"group_size", "kv_cache_quant_algo", "exclude_modules"}
    assert check(tmp_path / "out", "vllm").ok


def test_layers_that_differ_are_named_one_by_one(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    rules = [
        {"match": {"modality": "llm", "role": "mlp"}, "weights": "nvfp4"},
        {"match": {"modality": "llm", "role": "attn"}, "weights": "fp8-channel"},
        {"match": {"modality": "llm", "role": "mlp"}, "activations": "nvfp4-dyn"},
        {"match": {"modality": "llm", "role": "attn"}, "activations": "fp8-token"},
    ]
    source = quantized(tiny("qwen3_vl"), tmp_path / "a", calibration_file, {"rules": rules})
    export(source, "modelopt", tmp_path / "b")
    section = read_json(tmp_path / "b" / "config.json")["quantization_config"]
    assert section["quant_algo"] == "MIXED_PRECISION"
    listed = section["quantized_layers"]
    assert len(listed) == 14
    for name, entry in listed.items():
        mlp = ".mlp." in name
        wanted = {"quant_algo": "NVFP4", "group_size": 16} if mlp else None
        assert entry == (wanted or {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"})
    assert check(tmp_path / "b", "vllm").ok


def test_scales_of_the_cache_lie_under_the_projections(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    recipe = pq.load_recipe("nvfp4").with_kv_cache("fp8")
    source = quantized(tiny("qwen3_vl"), tmp_path / "a", calibration_file, recipe)
    export(source, "modelopt", tmp_path / "b")
    reader, before = ShardReader(tmp_path / "b"), ShardReader(source)
    scales = sorted(name for name in reader.names if name.endswith((".k_scale", ".v_scale")))
    assert len(scales) == 4
    for name in scales:
        parent, projection, leaf = name.rsplit(".", 2)
        assert projection == f"{leaf[0]}_proj"
        assert reader.read(name) == before.read(f"{parent}.{leaf}").float()
    own = read_json(tmp_path / "b" / "hf_quant_config.json")["quantization"]
    assert own["kv_cache_quant_algo"] == "FP8"


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("w4a16", "no algorithm has int4-g128 weights with float inputs"),
        ("fp8-static", "no algorithm has fp8-channel weights with fp8-tensor inputs"),
        ("mxfp4", "no algorithm has mxfp4 weights"),
        ("rotation-gptq-w4a8", "its input is rotated at run time"),
        # Inputs that only our own section declares, of layers that have a word and that have not.
        (with_inputs("nvfp4", "fp8-e5m2-token"), "nvfp4 weights with fp8-e5m2-token inputs"),
        (with_inputs("fp8-e5m2-channel", "fp8-e5m2-token"), "float weights with fp8-e5m2-token"),
    ],
)
def test_what_modelopt_has_no_word_for_is_refused(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, recipe: Any, why: str
) -> None:
    source = quantized(tiny("qwen2_vl"), tmp_path / "a", calibration_file, recipe)
    with pytest.raises(FormatError, match=why):
        export(source, "modelopt", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_cache_of_other_numbers_is_refused(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    recipe = pq.load_recipe("nvfp4").with_kv_cache("fp8-head")
    source = quantized(tiny("qwen3_vl"), tmp_path / "a", calibration_file, recipe)
    with pytest.raises(FormatError, match="a scale a head"):
        export(source, "modelopt", tmp_path / "b")


def test_the_source_is_left_as_it_was(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder = tiny("qwen2_vl")
    source = quantized(folder, tmp_path / "a", calibration_file, "nvfp4")
    before = logits(load_model(source), folder, calibration_file)
    export(source, "modelopt", tmp_path / "b")
    assert torch.equal(logits(load_model(source), folder, calibration_file), before)
