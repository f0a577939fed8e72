"""What we write, other programs read: transformers with compressed-tensors, and our own loader."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import compressed_tensors_library as library
import pytest
import torch
from known_failures import decompressed_by_transformers, inputs_scaled_per_token

import prismquant as pq
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.errors import FormatError
from prismquant.export.compressed_tensors.reader import read_schemes
from prismquant.export.load_quantized import load_model
from prismquant.formats.section_grammar import read_section
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.opening import read_json
from prismquant.recipe.presets import PRESETS
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

DTYPES = (torch.float32, torch.bfloat16)
# One preset for each number format and layout; every one of them on every family.
HELD = ("w8a8-static-all", "w4a16-all", "w4a8", "w8a8", "w4a8-static-all", "w3a16-all")


def quantized(folder: Path, out: Path, data: Path, preset: str, *rules: dict[str, Any]) -> Path:
    """RTN is enough here: how the codes were chosen does not matter to a reader."""
    recipe = pq.load_recipe(preset).with_rules({"solver": "rtn", "tuner": "none"}, *rules)
    pq.quantize(folder, recipe, out, data)
    return out


def logits(model: nn.Module, folder: Path, data: Path) -> torch.Tensor:
    """Logits of all counted tokens of a mixed batch."""
    samples = read_samples(data)
    ids = bind(folder).vision_token_ids
    batch = next(
        iter(make_batches(samples, load_processor(folder), batch_size=6, vision_token_ids=ids))
    )
    with torch.no_grad():
        result = model(**batch.inputs, use_cache=False).logits
    return result[batch.inputs["attention_mask"].bool()].float()


def from_transformers(folder: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    auto = import_transformers().AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


@pytest.mark.parametrize(
    "preset", [*HELD[:3], *(pytest.param(one, marks=pytest.mark.slow) for one in HELD[3:])]
)
def test_transformers_gives_the_logits_of_our_simulation(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path, preset: str
) -> None:
    out = quantized(tiny_folder, tmp_path / "out", calibration_file, preset)
    ours, theirs = load_model(out), from_transformers(out)
    expected = logits(theirs, tiny_folder, calibration_file)
    actual = logits(ours, tiny_folder, calibration_file)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    full = logits(load_float(tiny_folder), tiny_folder, calibration_file)
    assert (actual - full).abs().max() > 1e-3, "nothing was quantized"


@pytest.mark.parametrize("preset", [pytest.param("w8a8-static", marks=pytest.mark.slow), "w4a16"])
def test_bfloat16_checkpoints_agree_to_their_tolerance(
    family: str, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, preset: str
) -> None:
    """Scales are stored in bfloat16. In float32 arithmetic both readers agree.

    In bfloat16 arithmetic they differ by no more than bfloat16 differs from float32 in one reader:
    the library divides activations by their scale in 16 bits, we in 32.
    """
    folder = tiny(family, dtype=torch.bfloat16)
    out = quantized(folder, tmp_path / "out", calibration_file, preset)
    scales = [n for n in ShardReader(out).names if n.endswith("weight_scale")]
    assert {ShardReader(out).info(name).dtype for name in scales} == {torch.bfloat16}
    with decompressed_by_transformers():
        ours, theirs = (
            {dtype: logits(load(out, dtype=dtype), folder, calibration_file) for dtype in DTYPES}
            for load in (load_model, from_transformers)
        )
    torch.testing.assert_close(ours[torch.float32], theirs[torch.float32], rtol=1e-4, atol=1e-4)
    noise = (theirs[torch.bfloat16] - theirs[torch.float32]).pow(2).mean().sqrt()
    apart = (ours[torch.bfloat16] - theirs[torch.bfloat16]).pow(2).mean().sqrt()
    assert apart < 2 * noise


def test_dynamic_inputs_of_two_dimensions_are_scaled_per_token(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """Vision towers pass [tokens, features]; a scale a token is what the configuration says."""
    out = quantized(tiny_folder, tmp_path / "out", calibration_file, "w8a8-all")
    ours, theirs = load_model(out), from_transformers(out)
    as_is = logits(theirs, tiny_folder, calibration_file)
    with inputs_scaled_per_token():
        mended = logits(theirs, tiny_folder, calibration_file)
    actual = logits(ours, tiny_folder, calibration_file)
    torch.testing.assert_close(actual, mended, rtol=1e-4, atol=1e-4)
    assert (as_is - actual).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2_vl", "old"),
        ("qwen2_vl", "native"),
        ("qwen2_5_vl", "old"),
        ("qwen2_5_vl", "native"),
    ],
)
def test_names_on_disk_are_the_sources(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, family: str, layout: str
) -> None:
    """Whatever the source's names, ours are the same, and transformers finds every tensor."""
    folder = tiny(family, layout=layout)
    out = quantized(folder, tmp_path / "out", calibration_file, "w4a16-all")
    before, after = ShardReader(folder).names, ShardReader(out).names
    stems = {name.removesuffix(".weight") for name in before}
    stored = {name.rpartition(".weight_")[0] or name.removesuffix(".weight") for name in after}
    assert stored <= stems
    expected = logits(from_transformers(out), folder, calibration_file)
    actual = logits(load_model(out), folder, calibration_file)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_tied_embeddings_stay_tied(
    family: str, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder = tiny(family, tie=True)
    out = quantized(folder, tmp_path / "out", calibration_file, "w4a16")
    assert not [name for name in ShardReader(out).names if name.startswith("lm_head")]
    expected = logits(from_transformers(out), folder, calibration_file)
    actual = logits(load_model(out), folder, calibration_file)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_original_videollama3_layout_keeps_its_names(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Tensors and configuration speak the remote code's names; our loader reads them back."""
    folder = tiny("video_llama_3", layout="remote")
    out = quantized(folder, tmp_path / "out", calibration_file, "w4a8-static-all")
    config = read_json(out / "config.json")
    targets = {
        t for g in config["quantization_config"]["config_groups"].values() for t in g["targets"]
    }
    assert "model.layers.0.self_attn.q_proj" in targets
    assert "model.vision_encoder.encoder.layers.0.self_attn.q_proj" in targets
    assert "model.mm_projector.readout.0" in targets
    native = quantized(
        tiny("video_llama_3"), tmp_path / "native", calibration_file, "w4a8-static-all"
    )
    expected = logits(load_model(native), tiny("video_llama_3"), calibration_file)
    actual = logits(load_model(out), folder, calibration_file)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_asymmetric_weights_and_inputs_survive(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """The library decompresses our tensors to our weights.

    transformers 5.24 cannot load them whole: the skeleton that compressed-tensors 0.20 builds for
    it expects zero points that are not packed, unlike those that the library itself writes.
    """
    folder = tiny("qwen2_vl")
    rule = {
        "match": {"modality": "llm", "role": ["attn", "mlp"]},
        "weights": "int4-g128-asym",
        "activations": "int8-tensor-asym",
    }
    out = quantized(folder, tmp_path / "out", calibration_file, "w4a16", rule)
    names = ShardReader(out).names
    assert any(name.endswith("input_zero_point") for name in names)
    model, reader = load_model(out), ShardReader(out)
    packed = [name.removesuffix("_packed") for name in names if name.endswith("weight_packed")]
    assert len(packed) == 14
    scheme = library.QuantizationScheme(
        targets=["Linear"],
        weights=library.QuantizationArgs(
            num_bits=4, symmetric=False, strategy="group", group_size=128
        ),
    )
    parts = ("packed", "scale", "shape", "zero_point")
    for name in packed:
        stored = {f"weight_{part}": reader.read(f"{name}_{part}") for part in parts}
        expected = library.PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        assert torch.equal(model.get_parameter(bind(folder).names.to_module(name)), expected), name


def test_the_configuration_obeys_the_readers_rules(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    out = quantized(tiny_folder, tmp_path / "out", calibration_file, "vision-w8a8-llm-w4a8")
    config = read_json(out / "config.json")
    section = config["quantization_config"]
    groups = section["config_groups"].values()
    assert section["format"] == "mixed-precision"
    assert {group["format"] for group in groups} == {"int-quantized", "pack-quantized"}
    targets = [name for group in groups for name in group["targets"]]
    assert len(targets) == len(set(targets))
    assert not set(targets) & set(section["ignore"])
    assert not [t for t in targets if t.startswith("re:") or "*" in t]
    model = load_float(tiny_folder)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linears <= set(targets) | set(section["ignore"])
    source = read_json(tiny_folder / "config.json")
    assert {k: v for k, v in config.items() if k != "quantization_config"} == source


def test_no_zero_point_is_written_for_symmetric_weights(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """vLLM stops at a tensor that it did not expect."""
    out = quantized(tiny("qwen2_vl"), tmp_path / "out", calibration_file, "w4a8-static-all")
    assert not [name for name in ShardReader(out).names if "zero_point" in name]


def test_other_files_are_copied_byte_for_byte(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    out = quantized(tiny_folder, tmp_path / "out", calibration_file, "w4a16")
    others = [p for p in tiny_folder.iterdir() if p.suffix != ".safetensors"]
    names = {p.name for p in others if p.name not in ("config.json", "README.md")}
    assert {"tokenizer.json", "chat_template.jinja"} <= names
    for name in names:
        assert (out / name).read_bytes() == (tiny_folder / name).read_bytes(), name


def test_the_index_names_every_tensor_and_its_size(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    out = quantized(tiny_folder, tmp_path / "out", calibration_file, "w8a8-all")
    index = read_json(out / "model.safetensors.index.json")
    reader = ShardReader(out)
    assert set(index["weight_map"]) == reader.names
    assert index["metadata"]["total_size"] == sum(reader.info(n).nbytes for n in reader.names)
    assert {p.name for p in out.glob("*.safetensors")} == set(index["weight_map"].values())


@pytest.mark.slow
def test_every_preset_loads_back(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder = tiny("qwen3_vl")
    for preset in PRESETS:
        quick = {"weight_range": "minmax"}
        out = quantized(folder, tmp_path / preset, calibration_file, preset, quick)
        model, processor = pq.load(out)
        assert torch.isfinite(logits(model, folder, calibration_file)).all(), preset
        assert processor.tokenizer is not None


def test_checkpoints_of_other_writers_are_understood() -> None:
    """Class names, regular expressions, inherited formats and inferred strategies."""
    config = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head", "re:.*visual.*"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128},
                    "input_activations": None,
                }
            },
        }
    }
    names = ["model.layers.0.mlp.up_proj", "model.visual.blocks.0.attn.qkv", "lm_head"]
    schemes = read_schemes(read_section(config), names)
    assert list(schemes) == names[:1]
    assert schemes[names[0]].weights.name == "int4-g128"
    assert schemes[names[0]].layout == "pack-quantized"


def weights_only(bits: int, targets: list[str], **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    return {"targets": targets, "weights": weights, "format": "pack-quantized"} | more


def test_the_most_exact_target_decides() -> None:
    """As in compressed-tensors: a name before a pattern before a class, whatever the order."""
    groups = {
        "group_0": weights_only(4, ["Linear"]),
        "group_1": weights_only(8, ["re:.*down_proj"]),
        "group_2": weights_only(3, ["model.layers.1.mlp.down_proj"]),
    }
    section = {"quant_method": "compressed-tensors", "config_groups": groups}
    names = [f"model.layers.{i}.mlp.{role}_proj" for i in (0, 1) for role in ("up", "down")]
    schemes = read_schemes(read_section({"quantization_config": section}), names)
    assert [schemes[name].weights.bits for name in names] == [4, 8, 4, 3]


def test_layers_are_known_by_their_names_on_disk_too() -> None:
    """llm-compressor ignores ``visual.*``, where transformers 5 has ``model.visual.*``."""
    groups = {"group_0": weights_only(4, ["Linear"]), "group_1": weights_only(8, ["model.a"])}
    section = {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "ignore": ["visual.b", "lm_head"],
    }
    config = {"quantization_config": section}
    names = ["model.language_model.a", "model.visual.b", "lm_head"]
    assert read_schemes(read_section(config), names).keys() == {*names[:2]}
    aliases = {names[0]: ("model.a",), names[1]: ("visual.b",)}
    schemes = read_schemes(read_section(config), names, aliases)
    assert {name: scheme.weights.bits for name, scheme in schemes.items()} == {names[0]: 8}


def test_groups_without_weights_are_about_attention() -> None:
    tokens = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    without = {"targets": ["re:.*self_attn"], "weights": None, "input_activations": tokens}
    section = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": weights_only(4, ["Linear"]), "group_1": without},
    }
    config = {"quantization_config": section}
    assert read_schemes(read_section(config), ["a.mlp.up_proj"]).keys() == {"a.mlp.up_proj"}
    with pytest.raises(FormatError, match="whose weight is not"):
        read_schemes(read_section(config), ["a.self_attn.q_proj"])
    without["input_activations"] = None
    assert read_schemes(read_section(config), ["a.self_attn.q_proj"]) == {}


def test_a_layout_must_be_said() -> None:
    group = weights_only(4, ["Linear"])
    del group["format"]
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    with pytest.raises(FormatError, match="laid out"):
        read_schemes(read_section({"quantization_config": section}), ["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "'gptq' cannot be read"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {"type": "float"}}}}, "float"),
    ],
)
def test_what_cannot_be_read_is_refused(change: dict[str, Any], message: str) -> None:
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized"} | change
    with pytest.raises(FormatError, match=message):
        read_schemes(read_section({"quantization_config": section}), ["a"])


def test_an_unfinished_folder_is_no_model(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """config.json comes last."""
    out = tmp_path / "out"

    class Stop:
        def begin(self, steps: int) -> None: ...

        def stage(self, step: str, what: str) -> None: ...

        def finish(self, record: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pq.quantize(tiny("qwen2_vl"), "w4a16", out, calibration_file, reporter=Stop())
    assert not (out / "config.json").exists()
    assert not [p for p in out.rglob("*") if p.name.endswith("tmp")]
    assert len(json.loads((out / "prismquant" / "record.json").read_text())["steps"]) == 1


# Outputs, rotations at run time


LLM = {"modality": "llm", "role": ["attn", "mlp"]}


def rounded_rows(weight: torch.Tensor) -> torch.Tensor:
    """Eight bits, one scale a row, the nearest."""
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    return (weight / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize(
    "outputs",
    [
        "int8-tensor-asym",
        pytest.param("int8-tensor", marks=pytest.mark.slow),
        pytest.param("int8-token", marks=pytest.mark.slow),
    ],
)
def test_quantized_outputs_are_declared_stored_and_simulated(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path, outputs: str
) -> None:
    """The logits are those of the float model with rounded weights and outputs, done by hand."""
    rule = {"match": LLM, "weights": "int8-channel", "outputs": outputs, "weight_range": "minmax"}
    out = tmp_path / "out"
    recipe = {"rules": [rule | {"solver": "rtn"}]}
    result = pq.quantize(tiny_folder, recipe, out, calibration_file)
    section = read_json(out / "config.json")["quantization_config"]
    (group,) = section["config_groups"].values()
    dynamic = outputs == "int8-token"
    assert group["input_activations"] is None
    assert group["output_activations"]["dynamic"] is dynamic
    assert group["output_activations"]["symmetric"] is (outputs != "int8-tensor-asym")
    assert group["output_activations"]["strategy"] == ("token" if dynamic else "tensor")
    reader, model = ShardReader(out), load_float(tiny_folder)

    def by_hand(prefix: str, layer: Any) -> None:
        layer.weight.data = rounded_rows(layer.weight.data)

        def hook(_: Any, __: Any, y: torch.Tensor) -> torch.Tensor:
            zero: torch.Tensor | float = 0.0
            if dynamic:
                scale = y.abs().amax(-1, keepdim=True) / 127.5
            else:
                scale = reader.read(f"{prefix}.output_scale")
                if outputs == "int8-tensor-asym":
                    zero = reader.read(f"{prefix}.output_zero_point").float()
            return ((y / scale + zero).round().clamp(-128, 127) - zero) * scale

        layer.register_forward_hook(hook)

    for row in result.plan.quantized:
        by_hand(row.site.disk_name, model.get_submodule(row.site.name))
    expected = logits(model, tiny_folder, calibration_file)
    actual = logits(load_model(out), tiny_folder, calibration_file)
    # A value on the edge between two codes may fall either way.
    assert ((actual - expected).abs() < 2e-3).float().mean() > 0.99
    assert (actual - expected).abs().max() < 0.1
    plain = logits(load_float(tiny_folder), tiny_folder, calibration_file)
    assert (actual - plain).abs().max() > 5 * (actual - expected).abs().max()


def test_transformers_quantizes_outputs_as_we_do(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    rule = {"match": LLM, "weights": "int8-channel", "activations": "int8-tensor"}
    rules = [rule | {"outputs": "int8-tensor", "solver": "rtn"}]
    out = tmp_path / "out"
    pq.quantize(tiny_folder, {"rules": rules}, out, calibration_file)
    expected = logits(from_transformers(out), tiny_folder, calibration_file)
    actual = logits(load_model(out), tiny_folder, calibration_file)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", ["int8-g16", "fp4-g16"])
@pytest.mark.parametrize("layout", [None, "remote"])
def test_rotations_at_run_time_are_declared_whatever_is_quantized(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    layout: str | None,
    weights: str,
) -> None:
    """Also where no layer is stored quantized, and where the rotated layers are not."""
    folder, out = tiny("video_llama_3", layout=layout), tmp_path / "out"
    rule = {"match": {"role": "attn.out"}, "weights": weights, "solver": "rtn"}
    rotation = {"name": "rotation", "options": {"online": True, "online_block": 32}}
    pq.quantize(folder, {"rules": [rule], "transforms": [rotation]}, out)
    config = read_json(out / "config.json")["quantization_config"]
    (transform,) = config["transform_config"]["config_groups"].values()
    assert (transform["type"], transform["head_dim"]) == ("hadamard", 32)
    (apply,) = transform["apply"]
    assert (apply["location"], len(apply["targets"])) == ("input", 4)
    assert bool(config["config_groups"]) is (weights == "int8-g16")
    assert len([n for n in ShardReader(out).names if n.endswith("input_signs")]) == 2
    plain = tmp_path / "plain"
    pq.quantize(folder, {"rules": [rule]}, plain)
    full, ours, unrotated = (
        logits(model, tiny("video_llama_3"), calibration_file)
        for model in (load_float(folder), load_model(out), load_model(plain))
    )
    # The layers that are rounded are others than those that are rotated at run time.
    assert (ours - full).norm() < 1.5 * (unrotated - full).norm()


def test_fp8_is_read_by_transformers_as_by_us(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """Per channel with inputs scaled per token, behind transforms that live in the weights."""
    rule = {"match": LLM, "weights": "fp8-channel", "activations": "fp8-token", "solver": "rtn"}
    transforms = [
        {"name": "rotation", "match": {"modality": "llm"}},
        {"name": "smoothquant", "options": {"search": False}},
    ]
    out = tmp_path / "out"
    pq.quantize(tiny_folder, {"rules": [rule], "transforms": transforms}, out, calibration_file)
    assert read_json(out / "config.json")["quantization_config"]["format"] == "float-quantized"
    expected = logits(from_transformers(out), tiny_folder, calibration_file)
    actual = logits(load_model(out), tiny_folder, calibration_file)
    assert ((actual - expected).abs() < 2e-3).float().mean() > 0.97
    assert (actual - expected).norm() < 0.05 * expected.norm()
