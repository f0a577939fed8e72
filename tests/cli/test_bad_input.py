"""Bad input of every kind: errors say what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch

import prismquant as pq
from prismquant import storage
from prismquant.errors import (
    DataError,
    ModelError,
    NumericsError,
    PlanError,
    PrismQuantError,
    RecipeError,
    StorageError,
)
from prismquant.opening import read_json
from prismquant.run.directory import RunDirectory
from prismquant.shards import ShardReader
from prismquant.storage import write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable


def refused(kind: type[PrismQuantError], *words: str, **call: Any) -> str:
    """The message of a quantization that must fail, checked for its words and its remedy."""
    with pytest.raises(kind) as caught:
        pq.quantize(**call)
    assert type(caught.value) is kind
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert caught.value.where or caught.value.remedy
    return message


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen2_vl")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def copied(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint whose tensors were changed in place."""
    shutil.copytree(source, target)
    reader = ShardReader(target)
    tensors = {name: reader.read(name) for name in reader.names}
    change(tensors)
    write_tensors(target / "model.safetensors", tensors)
    return target


# The model


def test_a_model_folder_that_is_not_there(tmp_path: Path, out: Path) -> None:
    refused(
        ModelError,
        f"there is no model folder '{tmp_path / 'nowhere'}'",
        "remedy: give a folder with config.json",
        model=tmp_path / "nowhere",
        recipe="w8a8",
        out=out,
    )
    assert not out.exists()


def test_a_folder_without_a_model(tmp_path: Path, out: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("")
    refused(
        ModelError,
        "has no config.json; it holds README.md",
        str(tmp_path / "model"),
        model=tmp_path / "model",
        recipe="w8a8",
        out=out,
    )


def test_a_model_of_text_that_no_architecture_describes(tmp_path: Path, out: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "gpt2", "hidden_size": 64})
    words = (
        "no architecture describes model_type 'gpt2'",
        "config.json",
        "deepseek_vl, gemma2, gemma3",
    )
    refused(ModelError, *words, model=tmp_path, recipe="w8a8", out=out)


def test_a_vision_language_model_that_no_architecture_describes(tmp_path: Path, out: Path) -> None:
    config = {"model_type": "qwen2_vlx", "vision_config": {"depth": 2}}
    write_json(tmp_path / "config.json", config)
    words = "no architecture describes model_type 'qwen2_vlx'", "did you mean 'qwen2_vl'?"
    refused(ModelError, *words, model=tmp_path, recipe="w8a8", out=out)


def test_a_model_with_a_tensor_of_another_shape(model: Path, tmp_path: Path, out: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
        del tensors["model.norm.weight"]

    folder = copied(model, tmp_path / "model", change)
    refused(
        ModelError,
        "2 findings",
        "model.layers.1.mlp.up_proj.weight: shape (3, 3) on disk, the config says (256, 128)",
        "model.norm.weight: missing on disk",
        model=folder,
        recipe="w8a8",
        out=out,
    )


def test_a_truncated_shard(model: Path, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    words = "model.safetensors is not a whole safetensors file", str(shard), "copy the file again"
    refused(StorageError, *words, model=folder, recipe="w8a8", out=out)


def test_a_model_of_pickles_is_not_read(model: Path, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    words = "pickle files, pytorch_model.bin", str(folder), "are never read"
    refused(ModelError, *words, model=folder, recipe="w8a8", out=out)


def test_a_model_that_is_quantized_in_an_unknown_way(
    model: Path, tmp_path: Path, out: Path
) -> None:
    recipe = pq.load_recipe("w8a8").with_rules({"solver": "rtn"})
    pq.quantize(model, recipe, tmp_path / "once")
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "hqq"
    (tmp_path / "once" / "config.json").write_text(json.dumps(config))
    words = "the checkpoint is quantized already", "use the unquantized checkpoint"
    refused(ModelError, *words, model=tmp_path / "once", recipe=recipe, out=out)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_weight_that_is_not_finite(
    model: Path, calibration_file: Path, tmp_path: Path, out: Path, value: float, solver: str
) -> None:
    """The layer is named, and what was finished before it can be resumed with a whole model."""

    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5:7] = value

    folder = copied(model, tmp_path / "model", change)
    recipe = pq.load_recipe("w8a8").with_rules({"solver": solver}).with_calibration(samples=2)
    refused(
        NumericsError,
        "the weight holds 2 values that are NaN or infinite",
        "where: model.language_model.layers.1.mlp.down_proj",
        "the source checkpoint is damaged",
        model=folder,
        recipe=recipe,
        out=out,
        calibration=calibration_file,
    )
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("preset", ["w8a8-static", "w4a16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite(
    model: Path, calibration_file: Path, tmp_path: Path, out: Path, preset: str, value: float
) -> None:
    """A norm's weight makes it so; the layer that sees it first is named."""

    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"][7] = value

    folder = copied(model, tmp_path / "model", change)
    message = refused(
        NumericsError,
        "where: input of model.language_model.layers.1.mlp.gate_proj",
        model=folder,
        recipe=pq.load_recipe(preset).with_calibration(samples=2),
        out=out,
        calibration=calibration_file,
    )
    assert re.search(r"NaN|infinite|finite", message)
    assert "remedy:" in message
    assert not (out / "config.json").exists()


# The recipe


@pytest.mark.parametrize(
    ("recipe", "kind", "words"),
    [
        ("w4a61", RecipeError, ["no preset and no file is called 'w4a61'", "did you mean 'w4a16'"]),
        (
            {"rules": [{"weigths": "int4-g128"}]},
            RecipeError,
            ["rules[0].weigths: unknown key", "did you mean 'weights'?"],
        ),
        (
            {"rules": [{"match": {"modality": "llm"}, "weights": "int4-g96"}]},
            PlanError,
            [
                "layers.*.mlp.down_proj: group size 96 does not divide its 256 input features",
                "256, 128, 64 would (2 layers: 0-1)",
                "fallback: nearest",
            ],
        ),
        (
            {"rules": [{"match": {"role": "atn"}, "weights": "int4-g128"}]},
            RecipeError,
            ["rules[0].match.role: no layer has the role 'atn'", "did you mean 'attn'?"],
        ),
        (
            {"rules": [{"match": {"name": "*.x"}, "weights": "int4-g128"}]},
            PlanError,
            ["rules[0] matches no layer", "roles: attn.out", "prismquant inspect"],
        ),
        (
            {"rules": [{"weights": "int8-channel", "weight_range": "ema"}]},
            RecipeError,
            ["a weight has no running range", "set by rules[0]"],
        ),
    ],
    ids=["preset", "key", "group", "role", "name", "range"],
)
def test_a_recipe_that_does_not_fit(
    model: Path, out: Path, recipe: Any, kind: type[PrismQuantError], words: list[str]
) -> None:
    refused(kind, *words, model=model, recipe=recipe, out=out)
    assert not out.exists()


# The data


def test_data_that_are_needed_and_not_given(model: Path, out: Path) -> None:
    words = "recipe 'w4a16' needs calibration data", "give --calib FILE"
    refused(DataError, *words, model=model, recipe="w4a16", out=out)
    assert not out.exists()


def test_a_data_file_that_is_not_there(model: Path, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "nowhere.jsonl"
    refused(DataError, str(path), "missing", model=model, recipe="w4a16", out=out, calibration=path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [', ["line 4", "no valid JSON"]),
        ('{"massages": []}', ["line 4"]),
        (
            json.dumps(
                {
                    "id": "gone",
                    "messages": [
                        {"role": "user", "content": [{"type": "image", "image": "gone.png"}]}
                    ],
                }
            ),
            ["line 4", "gone.png"],
        ),
    ],
    ids=["broken line", "wrong key", "missing image"],
)
def test_a_sample_that_cannot_be_used(
    model: Path, tmp_path: Path, out: Path, line: str, words: list[str]
) -> None:
    """File and line are named before anything was started."""
    path = tiny_vlm.samples(tmp_path / "data", count=3)
    path.write_text(path.read_text() + line + "\n")
    message = refused(DataError, *words, model=model, recipe="w4a16", out=out, calibration=path)
    assert path.name in message
    assert "remedy:" in message
    assert not out.exists()


def test_data_without_the_modality_that_the_recipe_needs(
    model: Path, tmp_path: Path, out: Path
) -> None:
    """A recipe for the language model alone is content with text."""
    path = tiny_vlm.samples(tmp_path / "data", kinds=("text",), count=2)
    refused(
        DataError,
        "the recipe needs vision samples, but the data hold none (2 text, 0 image, 0 video)",
        "leave these parts of the model in floating point",
        model=model,
        recipe="w4a16-all",
        out=out,
        calibration=path,
    )
    assert not out.exists()
    recipe = pq.load_recipe("w4a16").with_rules({"weight_range": "minmax"})
    assert pq.quantize(model, recipe, out, path).record.finished


def test_a_processor_that_cannot_be_built_leaves_no_folder(
    model: Path, calibration_file: Path, tmp_path: Path, out: Path
) -> None:
    """What can be checked is checked before the output folder is touched."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(
        DataError,
        str(folder),
        model=folder,
        recipe="w4a16",
        out=out,
        calibration=calibration_file,
    )
    assert not out.exists()


# The output


@pytest.mark.parametrize("inside", [".", "quantized", "a/b"])
def test_an_output_in_the_source(model: Path, inside: str) -> None:
    before = sorted(model.rglob("*"))
    words = "the output folder is the source model's", "choose another --out"
    recipe = pq.load_recipe("w8a8").with_rules({"solver": "rtn"})
    for resume in (False, True):
        refused(StorageError, *words, model=model, recipe=recipe, out=model / inside, resume=resume)
    assert sorted(model.rglob("*")) == before


def test_an_output_folder_that_holds_files(model: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    recipe = pq.load_recipe("w8a8").with_rules({"solver": "rtn"})
    words = "the output folder exists and is not empty", str(out), "choose another --out"
    refused(StorageError, *words, model=model, recipe=recipe, out=out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_disk_that_fills_up_during_the_run(
    model: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says so; the folder is clean; with space again the run ends as if nothing was."""
    recipe = pq.load_recipe("w8a8").with_rules({"solver": "rtn"})
    left = 16
    real = os.fsync

    def fsync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", fsync)
        message = refused(
            StorageError, "the disk is full", str(out), model=model, recipe=recipe, out=out
        )
    assert "free space or choose another output folder, then run again" in message
    assert "with --resume, a run in this folder goes on after the last finished step" in message
    assert not list(out.rglob("*tmp"))
    assert not (out / "config.json").exists()
    assert len(RunDirectory(out).load().steps) > 0
    pq.quantize(model, recipe, out, resume=True)
    pq.quantize(model, recipe, tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        if path.is_file():
            assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("device", ["foo", "cuda:99", ""])
def test_a_device_that_is_not_there(model: Path, out: Path, device: str) -> None:
    recipe = pq.load_recipe("w8a8").with_rules({"solver": "rtn"})
    refused(
        PrismQuantError,
        f"device {device!r} cannot be used",
        "--device cpu",
        model=model,
        recipe=recipe,
        out=out,
        device=device,
    )
    assert not out.exists()


# Loading and measuring


def test_loading_what_is_no_checkpoint(tmp_path: Path, calibration_file: Path, model: Path) -> None:
    with pytest.raises(ModelError, match="there is no model folder"):
        pq.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="there is no model folder"):
        pq.measure(tmp_path / "nowhere", calibration_file)
    with pytest.raises(DataError, match="missing"):
        pq.measure(model, tmp_path / "nowhere.jsonl")


def test_loading_an_unfinished_run(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without config.json nothing takes the folder for a model."""
    from prismquant.export.compressed_tensors.writer import CheckpointWriter

    def stop(_: CheckpointWriter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        pq.quantize(model, pq.load_recipe("w8a8").with_rules({"solver": "rtn"}), out)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        pq.load(out)


def test_loading_a_checkpoint_whose_config_was_emptied(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "config.json").write_text("")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON") as caught:
        pq.load(folder)
    assert str(folder) in str(caught.value)
    config = read_json(model / "config.json")
    del config["model_type"]
    write_json(folder / "config.json", config)
    with pytest.raises(ModelError, match="has no model_type"):
        pq.load(folder)
