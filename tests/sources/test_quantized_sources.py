"""Checkpoints that are quantized already as sources: their values, and what becomes of them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

import prismquant as pq
from prismquant.api import export
from prismquant.errors import FormatError, ModelError
from prismquant.export.compressed_tensors.stored import open_checkpoint
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.shards import ShardReader
from prismquant.storage import write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import Tensor

FAMILY = "qwen2_5_vl"
QUICK = {"solver": "rtn", "tuner": "none", "weight_range": "minmax"}


def rewritten(
    source: Path, folder: Path, section: dict[str, Any], change: Callable[[str, Tensor], Any]
) -> Path:
    """A copy of a checkpoint: what ``change`` gives for a layer's weight replaces that weight."""
    shutil.copytree(source, folder)
    reader, tensors = ShardReader(folder), {}
    for name in reader.names:
        tensor = reader.read(name)
        is_layer = name.endswith("proj.weight") and "visual" not in name and tensor.dim() == 2
        made = change(name.removesuffix(".weight"), tensor) if is_layer else None
        tensors |= made or {name: tensor}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    write_tensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"quantization_config": section})
    return folder


def float_copy(source: Path, folder: Path) -> Path:
    """The same checkpoint in floating point, by what the source shows."""
    bound = bind(source)
    shutil.copytree(source, folder)
    for pattern in ("*.safetensors*", "hf_quant_config.json", "quantize_config.json"):
        for path in folder.glob(pattern):
            path.unlink()
    reader = bound.shards()
    write_tensors(folder / "model.safetensors", {n: reader.read(n) for n in sorted(reader.names)})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    write_json(folder / "config.json", config)
    return folder


def blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """FP8 numbers and scales of blocks, the last of which may be cut off."""
    grid = [-(-side // size) for side, size in zip(weight.shape, block, strict=True)]
    scale, codes = torch.empty(grid), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(grid[0]):
        for column in range(grid[1]):
            where = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scale[row, column] = weight[where].float().abs().max() / 448
            codes[where] = (weight[where].float() / scale[row, column]).to(torch.float8_e4m3fn)
    return codes, scale


def fine_grained(block: tuple[int, int]) -> Callable[[str, Tensor], dict[str, Tensor]]:
    def change(name: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scale = blocks(weight, block)
        return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}

    return change


@pytest.mark.parametrize("block", [(16, 16), (48, 20), (16, 32)])
def test_fp8_blocks_are_what_transformers_makes_of_them(
    block: tuple[int, int], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    section = {"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3"}
    change = fine_grained(block)
    folder = rewritten(tiny(FAMILY, dtype=torch.bfloat16), tmp_path / "fp8", section, change)
    import_transformers()
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    stored, bound = ShardReader(folder), bind(folder)
    shown, met = bound.shards(), 0
    for name in stored.names:
        if not name.endswith("_scale_inv"):
            continue
        weight, scale = stored.read(name.removesuffix("_scale_inv")), stored.read(name)
        found = shown.read(name.removesuffix("_scale_inv"))
        across = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        wanted = weight.float() * across[: weight.shape[0], : weight.shape[1]]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wanted.bfloat16())
        if not weight.shape[0] % block[0] and not weight.shape[1] % block[1]:
            theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
            assert torch.equal(found, theirs)
        met += 1
    assert met == 14
    words = f"fp8 in blocks of {block[0]} x {block[1]}"
    assert f"14 weights in {words}" in bound.notes[-1]


def one_scale(name: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    side = {f"{name}.activation_scale": torch.tensor(1.0)}
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale.reshape(())} | side


def row_scales(name: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("fp8", one_scale, "fp8 with one scale"),
        ("fbgemm_fp8", row_scales, "fp8 with a scale a row"),
    ],
)
def test_other_fp8_scales(
    method: str,
    change: Callable[[str, Tensor], dict[str, Tensor]],
    words: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
) -> None:
    section = {"quant_method": method, "activation_scheme": "static", "weight_block_size": None}
    source = tiny(FAMILY, dtype=torch.bfloat16)
    bound = bind(rewritten(source, tmp_path / "source", section, change))
    stored, shown = ShardReader(bound.folder), bound.shards()
    assert shown.names == ShardReader(source).names
    for name in shown.names:
        scale = next(
            (f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in stored.names),
            None,
        )
        raw = stored.read(name)
        wanted = raw if scale is None else (raw.float() * stored.read(scale)).bfloat16()
        assert torch.equal(shown.read(name), wanted)
    assert any(words in note for note in bound.notes)


# What each of four groups of layers is stored in; those of one group are fused.
ROLES = ("attn.qkv", "attn.out", ["mlp.gate", "mlp.up"], "mlp.down")
Formats = tuple[dict[str, str], ...]


def in_formats(*formats: dict[str, str]) -> pq.Recipe:
    """A recipe that gives each group of layers of the language model a format, in turn."""
    rules = [
        {"match": {"modality": "llm", "role": role}} | formats[place % len(formats)]
        for place, role in enumerate(ROLES)
    ]
    return pq.load_recipe("w4a16").with_rules(QUICK, *rules)


EXPORTS: list[tuple[str, Formats]] = [
    ("gptq", ({"weights": "int4-g16"}, {"weights": "int8-channel"}, {"weights": "int3-g32"})),
    ("gptq", ({"weights": "int4-g16-asym"}, {"weights": "int8-g32"})),
    ("awq", ({"weights": "int4-g16-asym"}, {"weights": "int4-g16"})),
    (
        "modelopt",
        (
            {"weights": "fp8-tensor", "activations": "fp8-tensor"},
            {"weights": "fp8-channel", "activations": "fp8-token"},
            {"weights": "nvfp4", "activations": "nvfp4-dyn"},
            {"weights": "mxfp8", "activations": "mxfp8-dyn"},
        ),
    ),
]


def exported(source: Path, folder: Path, form: str, formats: Formats, data: Path) -> Path:
    """A checkpoint in another format, and ours that it was made from beside it."""
    pq.quantize(source, in_formats(*formats), folder / "own", data)
    export(folder / "own", form, folder / form)
    return folder / form


@pytest.mark.parametrize(("form", "formats"), EXPORTS)
def test_our_exports_are_sources_again(
    form: str,
    formats: Formats,
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
) -> None:
    dtype = torch.float16 if form in ("gptq", "awq") else torch.bfloat16
    folder = exported(tiny(FAMILY, dtype=dtype), tmp_path, form, formats, calibration_file)
    own, bound = open_checkpoint(tmp_path / "own"), bind(folder)
    shown, codes = bound.shards(), {layer.prefix for layer in own.quantized}
    assert len(shown.names) == len(own.reader.names)
    for layer in own.layers:
        name = bound.names.to_disk(f"{layer.name}.weight")
        wanted = own.reader.read(f"{layer.prefix}.weight").to(dtype)
        assert torch.equal(shown.read(name), wanted), name
    assert bound.source is not None
    assert len(bound.source.weights) == len(codes)


def shards_of(folder: Path) -> Iterable[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))]


def test_a_source_gives_what_its_float_copy_gives(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    section = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    source = tiny(FAMILY, dtype=torch.bfloat16)
    folder = rewritten(source, tmp_path / "fp8", section, fine_grained((16, 16)))
    write_json(folder / "hf_quant_config.json", {"producer": {}})
    plain = float_copy(folder, tmp_path / "float")
    recipe = pq.load_recipe("w4a16").with_rules({"weights": "int4-g16"} | QUICK)
    results = []
    for name, model in (("a", folder), ("b", plain)):
        results.append(pq.quantize(model, recipe, tmp_path / name, calibration_file))
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_text() == (
        tmp_path / "b" / "config.json"
    ).read_text()
    assert not (tmp_path / "a" / "hf_quant_config.json").exists()
    assert any(
        "the source is quantized (fp8: 14 weights" in line for line in results[0].plan.remarks
    )
    assert "fp8: 14 weights" in results[0].record.environment["source"]
    assert "source" not in results[1].record.environment
    planned = pq.inspect(folder, recipe)
    assert planned.total_bytes == results[0].plan.total_bytes
    found = pq.measure(folder, calibration_file, reference=plain)
    assert all(one.kl == 0.0 for one in found.overall.divergence.values())


def test_files_of_a_quantized_source_are_part_of_the_identity(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder = exported(
        tiny(FAMILY, dtype=torch.bfloat16),
        tmp_path,
        "modelopt",
        ({"weights": "nvfp4", "activations": "nvfp4-dyn"},),
        calibration_file,
    )
    result = pq.quantize(
        folder,
        pq.load_recipe("w4a16").with_rules({"weights": "int4-g16"} | QUICK),
        tmp_path / "out",
        calibration_file,
    )
    assert "hf_quant_config.json" in result.record.identity.files
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_what_cannot_be_read_is_refused_with_the_remedy(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny(FAMILY, dtype=torch.bfloat16)

    def four_bits(name: str, weight: Tensor) -> dict[str, Tensor]:
        packed = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
        state = torch.zeros(8, dtype=torch.uint8)
        return {f"{name}.weight": packed, f"{name}.weight.quant_state.bitsandbytes__nf4": state}

    section = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = rewritten(source, tmp_path / "bnb", section, four_bits)
    with pytest.raises(ModelError, match="bitsandbytes") as failed:
        pq.inspect(folder, "w4a16")
    assert "unquantized checkpoint" in str(failed.value)

    section = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}
    folder = rewritten(source, tmp_path / "marlin", section, one_scale)
    with pytest.raises(FormatError, match="marlin"):
        pq.inspect(folder, "w4a16")

    section = {"quant_method": "fp8", "weight_block_size": [16, 16]}

    def lost(name: str, weight: Tensor) -> dict[str, Tensor]:
        return {f"{name}.weight": weight.to(torch.float8_e4m3fn)}

    with pytest.raises(FormatError, match="no scale"):
        pq.inspect(rewritten(source, tmp_path / "lost", section, lost), "w4a16")


def test_folders_of_other_kinds_are_refused_with_the_remedy(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    write_tensors(adapter / "adapter_model.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ModelError, match="adapter") as failed:
        pq.inspect(adapter, "w4a16")
    assert "merge_and_unload" in str(failed.value)

    both = tmp_path / "both"
    shutil.copytree(tiny(FAMILY, dtype=torch.bfloat16), both)
    write_tensors(both / "adapter_model.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ModelError, match="adapter"):
        pq.quantize(both, "w4a16", tmp_path / "out", solver="rtn")

    pickled = tmp_path / "pickled"
    shutil.copytree(tiny(FAMILY, dtype=torch.bfloat16), pickled)
    for path in pickled.glob("*.safetensors*"):
        path.unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickle files, pytorch_model\.bin"):
        pq.quantize(pickled, "w4a16", tmp_path / "out", solver="rtn")

    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF"):
        pq.inspect(gguf, "w4a16")


OWN: list[Formats] = [
    (
        {"weights": "int4-g16"},
        {"weights": "int4-g16-asym", "activations": "int8-token"},
        {"weights": "int3-channel"},
        {"weights": "int8-channel", "activations": "int8-token"},
    ),
    (
        {"weights": "int8-tensor", "activations": "int8-tensor"},
        {"weights": "fp8-channel", "activations": "fp8-token"},
        {"weights": "fp8-b16"},
        {"weights": "nvfp4", "activations": "nvfp4-dyn"},
    ),
    (
        {"weights": "mxfp4"},
        {"weights": "mxfp6", "activations": "mxfp6-dyn"},
        {"weights": "mxfp8", "activations": "mxfp8-dyn"},
    ),
]


@pytest.mark.parametrize("formats", OWN, ids=["integers", "floats", "mx"])
def test_our_checkpoints_are_sources_again(
    formats: Formats, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    recipe = in_formats(*formats)
    source = tiny(FAMILY, dtype=torch.bfloat16)
    pq.quantize(source, recipe, tmp_path / "own", calibration_file)
    own, bound = open_checkpoint(tmp_path / "own"), bind(tmp_path / "own")
    shown = bound.shards()
    assert shown.names == ShardReader(source).names
    for name in shown.names:
        wanted = own.reader.read(name).to(torch.bfloat16)
        assert torch.equal(shown.read(name), wanted), name
    assert bound.source is not None
    assert len(bound.source.weights) == len(own.quantized)


@pytest.mark.parametrize(
    "names",
    [("mxfp4", "mxfp8", "nvfp4", "fp8-channel"), ("int8-channel-narrow", "int4-g16-narrow")],
    ids=["floats", "integers"],
)
def test_rounding_a_source_to_its_own_format_gives_its_codes(
    names: tuple[str, ...], tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Where the largest value of each unit lies on the outermost point, which has its scale."""
    recipe = in_formats(*({"weights": name} for name in names))
    pq.quantize(tiny(FAMILY), recipe, tmp_path / "once", calibration_file)
    pq.quantize(tmp_path / "once", recipe, tmp_path / "twice", calibration_file)
    once, twice = (open_checkpoint(tmp_path / name) for name in ("once", "twice"))
    for layer, again in zip(once.quantized, twice.quantized, strict=True):
        first, second = once.codes(layer), twice.codes(again)
        values = (one.dequantize() for one in (first, second))
        torch.testing.assert_close(*values, rtol=3e-7, atol=0)
        # What is rounded up to the next power of two has a scale twice as large, and half the code.
        assert first.spec.name == "mxfp8" or torch.equal(first.codes, second.codes)
