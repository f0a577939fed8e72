"""What we write, other programs read: transformers with compressed-tensors, and our own loader."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import compressed_tensors_library as library
import pytest
import torch

import prismquant as pq
from prismquant.errors import FormatError
from prismquant.export.compressed_tensors import read_schemes
from prismquant.export.load import load_model
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.models.load import load_float, load_processor
from prismquant.pipeline.batches import make_batches
from prismquant.pipeline.data import read_samples
from prismquant.recipe.presets import PRESETS
from prismquant.storage import ShardReader, read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

DTYPES = (torch.float32, torch.bfloat16)
# One preset for each number format and layout; every one of them on every family.
HELD = ("w8a8", "w8a8-static-all", "w4a16-all", "w4a8", "w4a8-static-all", "w3a16-all")


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


@pytest.mark.parametrize("preset", HELD)
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


@pytest.mark.parametrize("preset", ["w8a8-static", "w4a16"])
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
    ours, theirs = (
        {dtype: logits(load(out, dtype=dtype), folder, calibration_file) for dtype in DTYPES}
        for load in (load_model, from_transformers)
    )
    torch.testing.assert_close(ours[torch.float32], theirs[torch.float32], rtol=1e-4, atol=1e-4)
    noise = (theirs[torch.bfloat16] - theirs[torch.float32]).pow(2).mean().sqrt()
    apart = (ours[torch.bfloat16] - theirs[torch.bfloat16]).pow(2).mean().sqrt()
    assert apart < 2 * noise


def test_dynamic_inputs_of_two_dimensions_are_scaled_per_token(
    tiny_folder: Path,
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Vision towers pass [tokens, features]; a scale a token is what the configuration says.

    The compressed-tensors library keeps the first two axes whatever the rank, and so takes one
    scale for the whole matrix there. Given a leading axis it does what it says, and then agrees
    with us.
    """
    from compressed_tensors.quantization.lifecycle import forward as lifecycle

    out = quantized(tiny_folder, tmp_path / "out", calibration_file, "w8a8-all")
    ours, theirs = load_model(out), from_transformers(out)
    as_is = logits(theirs, tiny_folder, calibration_file)
    original = lifecycle.compute_dynamic_scales_and_zp

    def per_token(value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if value.ndim != 2:
            return original(value, *args, **kwargs)
        scale, zero_point = original(value[None], *args, **kwargs)
        return scale[0], zero_point[0]

    monkeypatch.setattr(lifecycle, "compute_dynamic_scales_and_zp", per_token)
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

    transformers 5.23 cannot load them whole: the skeleton that compressed-tensors 0.20 builds for
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


def test_every_preset_loads_back(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder = tiny("qwen3_vl")
    for preset in PRESETS:
        out = quantized(folder, tmp_path / preset, calibration_file, preset)
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
    schemes = read_schemes(config, names)
    assert list(schemes) == names[:1]
    assert schemes[names[0]].weights.name == "int4-g128"
    assert schemes[names[0]].layout == "pack-quantized"


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
        read_schemes({"quantization_config": section}, ["a"])


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
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp")]
    assert len(json.loads((out / "prismquant" / "record.json").read_text())["steps"]) == 1
