"""Checkpoints written by llm-compressor read as llm-compressor means them (``tests/golden``).

Weights must come out bit for bit. Logits are compared in float32 arithmetic, with those of
llm-compressor's own model and with those of the installed transformers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cache_readers import check_logits
from safetensors.torch import load_file, save_file
from torch import nn

from prismquant import cli
from prismquant.api import export
from prismquant.check import Severity, TargetReader, check
from prismquant.errors import FormatError
from prismquant.export.compressed_tensors.layer_edits import read_rotations
from prismquant.export.compressed_tensors.stored import open_checkpoint
from prismquant.export.load_quantized import load_model
from prismquant.formats.section import CONFIG_KEY
from prismquant.formats.section_grammar import read_section
from prismquant.models.config import import_transformers
from prismquant.numerics.kinds import Granularity
from prismquant.opening import read_json
from prismquant.runtime.linear import ActivationQuantizer
from prismquant.shards import ShardReader
from prismquant.storage import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
# Sums in other orders, by other releases of torch on other machines, end in other last bits; a
# quantized input may then fall to the other side of a tie.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Asymmetric weights whose zero points lie packed, transformers refuses for their shapes; rotations
# at run time it passes over.
UNREAD_BY_TRANSFORMERS = ("w4a16-asym", "w4a16-rotated")
# Vision towers pass [tokens, features], of which compressed-tensors scales the whole where one
# scale a token is declared (see test_export.py).
DYNAMIC_TOWERS = ("w8a8", "fp8-dynamic")


def expected(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    """Weights by module path, logits, and the inputs that these belong to."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    logits = tensors.pop("quantized_logits")
    inputs = {n: tensors.pop(n) for n in sorted(tensors) if n.startswith("input.")}
    return tensors, logits, {n.removeprefix("input."): t for n, t in inputs.items()}


def logits_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    # transformers' own float() refuses a quantized model.
    with torch.no_grad():
        return nn.Module.float(model)(**inputs, use_cache=False).logits


def test_the_checkpoints_are_what_the_tests_below_are_about() -> None:
    """Layouts, names in ignore that are names on disk, and scales of every kind."""
    configs = {name: read_json(GOLDEN / name / "config.json")[CONFIG_KEY] for name in NAMES}
    layouts = {g["format"] for c in configs.values() for g in c["config_groups"].values()}
    assert layouts == {
        *("pack-quantized", "int-quantized", "float-quantized"),
        *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
    }
    by_disk = [name for name in NAMES if "visual.blocks.0.attn.qkv" in configs[name]["ignore"]]
    assert len(by_disk) > 10
    suffixes = {n.rpartition(".")[2] for name in NAMES for n in ShardReader(GOLDEN / name).names}
    assert suffixes >= {
        *("weight_packed", "weight_shape", "weight_zero_point", "weight_global_scale"),
        *("input_scale", "input_zero_point", "input_global_scale", "k_scale", "v_scale"),
    }
    reader = ShardReader(GOLDEN / "nvfp4")
    scales = [reader.read(name) for name in reader.names if name.endswith("global_scale")]
    assert not all(bool((torch.frexp(scale.float())[0] == 0.5).all()) for scale in scales)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_its_own_decompression(name: str) -> None:
    weights, _, _ = expected(name)
    model = load_model(GOLDEN / name)
    for module, weight in weights.items():
        assert torch.equal(model.get_parameter(module).data, weight), module
    stored = open_checkpoint(GOLDEN / name)
    assert {f"{layer.name}.weight" for layer in stored.quantized} == weights.keys()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_its_own_model(name: str) -> None:
    _, logits, inputs = expected(name)
    model = load_model(GOLDEN / name)
    actual = logits_of(model, inputs)
    quantizers = [one for one in model.modules() if isinstance(one, ActivationQuantizer)]
    if any(one.spec.dynamic and one.spec.kind == "int" for one in quantizers):
        # Another processor sums in another order, and a value between two codes goes to the other.
        assert (actual - logits).norm() < 0.02 * logits.norm()
    else:
        torch.testing.assert_close(actual, logits, **CLOSE)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in UNREAD_BY_TRANSFORMERS])
def test_logits_are_those_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 takes the tower of most for quantized: its names in ignore need mending."""
    _, _, inputs = expected(name)
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    config = read_json(folder / "config.json")
    if any(entry.startswith("visual.") for entry in config[CONFIG_KEY]["ignore"]):
        config[CONFIG_KEY]["ignore"] += ["re:.*visual.*"]
        write_json(folder / "config.json", config)
    if name in DYNAMIC_TOWERS:
        scale_every_token(monkeypatch)
    auto = import_transformers().AutoModelForImageTextToText
    theirs = auto.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        # It decompresses itself at the first forward pass, and in the dtype stored.
        theirs(**inputs | {"pixel_values": inputs["pixel_values"].to(theirs.dtype)})
    ours, expected_logits = load_model(GOLDEN / name), logits_of(theirs, inputs)
    if config[CONFIG_KEY]["kv_cache_scheme"]:
        check_logits(ours, expected_logits, lambda model: logits_of(model, inputs), **CLOSE)
    else:
        torch.testing.assert_close(logits_of(ours, inputs), expected_logits, **CLOSE)


def scale_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressed_tensors.quantization.lifecycle import forward as lifecycle

    original = lifecycle.compute_dynamic_scales_and_zp

    def per_token(value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if value.ndim != 2:
            return original(value, *args, **kwargs)
        scale, zero_point = original(value[None], *args, **kwargs)
        return scale[0], zero_point[0]

    monkeypatch.setattr(lifecycle, "compute_dynamic_scales_and_zp", per_token)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("fp8", "input_scale"),
        ("w8a8-static-asym", "input_zero_point"),
        ("nvfp4", "input_global_scale"),
        ("fp8-kv", "k_scale"),
        ("fp8-kv-head", "v_scale"),
    ],
)
def test_calibrated_scales_take_part(name: str, changed: str, tmp_path: Path) -> None:
    """The logits above would not tell if a reader passed them over in all checkpoints alike."""
    _, logits, inputs = expected(name)
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(f".{changed}")]:
        whole = not tensors[key].is_floating_point()
        tensors[key] = tensors[key] + 40 if whole else tensors[key] * 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert (logits_of(load_model(folder), inputs) - logits).abs().max() > 1e-2


def test_schemes_are_read_as_declared() -> None:
    mixed = {layer.called: layer.scheme for layer in open_checkpoint(GOLDEN / "mixed").quantized}
    found = {path.rpartition(".")[2]: scheme for path, scheme in mixed.items() if scheme}
    assert {role: scheme.layout for role, scheme in found.items()} == {
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "pack-quantized"),
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "float-quantized"),
    }
    assert found["q_proj"].activations is not None
    assert found["up_proj"].activations is None
    (layer, *_) = open_checkpoint(GOLDEN / "fp8-block").quantized
    assert layer.scheme is not None
    assert layer.scheme.weights.granularity is Granularity.BLOCK


def test_quantized_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    """llm-compressor can pack them; the layers alone would read, and the embeddings be missing."""
    folder = Path(shutil.copytree(GOLDEN / "w4a16", tmp_path / "out"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight_packed"] = tensors.pop("model.embed_tokens.weight")
    tensors["model.embed_tokens.weight_scale"] = torch.ones(128, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for read in (load_model, lambda where: open_checkpoint(where).dtype):
        with pytest.raises(FormatError, match="quantized embeddings"):
            read(folder)


@pytest.mark.parametrize("name", NAMES)
def test_check_tells_the_two_readers_apart(name: str) -> None:
    """vLLM renames the names on disk that ignore holds; transformers does not."""

    def errors(target: TargetReader) -> set[str]:
        report = check(GOLDEN / name, target)
        return {f.rule for f in report.findings if f.severity is Severity.ERROR}

    config = read_json(GOLDEN / name / "config.json")[CONFIG_KEY]
    by_class = any(group["targets"] == ["Linear"] for group in config["config_groups"].values())
    by_disk = any(entry.startswith("visual.") for entry in config["ignore"])
    misread = "names.transformers" in errors(TargetReader.TRANSFORMERS)
    assert misread == (by_class and by_disk)
    # Left are shapes and kernels: k_proj is narrower than a block, and so on. To vLLM a head is no
    # "Linear".
    about_names = {r for r in errors(TargetReader.VLLM) if r.startswith(("names.", "tensors."))}
    assert ("names.vllm" in about_names) == bool(about_names) == (name == "w4a16-head")


def test_a_rotation_across_a_width_is_read_where_its_matrix_is_known() -> None:
    """Of a width that is no power of two, compressed-tensors has matrices of its own."""
    config = dict(read_json(GOLDEN / "w4a16-rotated" / "config.json"))
    found = read_rotations(read_section(config), {"a.gate_proj": 64, "a.down_proj": 96})
    assert found == {"a.gate_proj": 64}
    with pytest.raises(FormatError, match=r"transform 'v' .* cannot be read"):
        read_rotations(read_section(config), {"a.gate_proj": 96})
    (group,) = config[CONFIG_KEY]["transform_config"]["config_groups"].values()
    # What was done to weights before they were stored needs nothing of a reader.
    group |= {"type": "random-hadamard", "apply": [a for a in group["apply"] if a["inverse"]]}
    assert read_rotations(read_section(config), {"a.gate_proj": 64}) == {}
    group["apply"][0]["location"] = "input"
    with pytest.raises(FormatError, match="random-hadamard at input"):
        read_rotations(read_section(config), {"a.gate_proj": 64})


@pytest.mark.parametrize("name", ["w4a16-asym", "nvfp4", "fp8-block", "fp8-kv"])
def test_a_dense_export_holds_the_same_weights(name: str, tmp_path: Path) -> None:
    weights, _, _ = expected(name)
    export(GOLDEN / name, "dense", tmp_path / "out")
    model = load_model(tmp_path / "out")
    for module, weight in weights.items():
        assert torch.equal(model.get_parameter(module).data, weight), module


@pytest.mark.parametrize("name", ["w4a16", "fp8-kv"])
def test_eval_measures_it_from_the_command_line(
    name: str,
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokenizer and processor are not among the golden files: those of our own models fit."""
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    for path in tiny("qwen2_vl").iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, folder / path.name)
    dense, result = tmp_path / "dense", tmp_path / "result.json"
    export(folder, "dense", dense)
    options = ("--data", calibration_file, "--reference", dense, "--out", result)
    monkeypatch.setattr("sys.argv", ["prismquant", "eval", *map(str, (folder, *options))])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    divergence = read_json(result)["overall"]["divergence"]
    largest = max(entry["kl"] for entry in divergence.values())
    # The same weights; keys and values are rounded in one of the two.
    assert (largest > 1e-4) == (name == "fp8-kv")
