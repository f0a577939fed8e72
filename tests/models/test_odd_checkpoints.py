"""Checkpoints as other tools leave them: they are read right, and the result agrees with itself."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from known_failures import decompressed_by_transformers

import prismquant as pq
from prismquant.export.load_quantized import load_model
from prismquant.models.config import import_transformers
from prismquant.shards import ShardReader
from prismquant.storage import write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Tensors = dict[str, torch.Tensor]


def _prefixes_of_two_releases(tensors: Tensors, config: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith("visual.")]:
        tensors[f"model.{name}"] = tensors.pop(name)


def _prefixes_of_any_release(tensors: Tensors, config: dict[str, Any]) -> None:
    for index, name in enumerate(sorted(tensors)):
        prefix, _, rest = name.partition(".")
        if prefix in ("visual", "model"):
            others = {"visual": "model.visual", "model": "model.language_model"}
            new = others[prefix] if index % 3 else prefix
            tensors[f"{new}.{rest}"] = tensors.pop(name)


def _tower_in_float32(tensors: Tensors, config: dict[str, Any]) -> None:
    for name in tensors:
        if not name.startswith("visual."):
            tensors[name] = tensors[name].to(torch.bfloat16)


def _head_of_a_tied_model(tensors: Tensors, config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True


def _section_of_its_training(tensors: Tensors, config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}


CHANGES = [
    _prefixes_of_two_releases,
    _prefixes_of_any_release,
    _tower_in_float32,
    _head_of_a_tied_model,
    _section_of_its_training,
]


@pytest.fixture(params=CHANGES, ids=lambda change: change.__name__.strip("_"))
def odd(request: pytest.FixtureRequest, tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint with one oddity."""
    folder = shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "odd")
    reader = ShardReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    config = json.loads((folder / "config.json").read_text())
    request.param(tensors, config)
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)
    return folder


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_the_result_is_what_readers_make_of_it(
    odd: Path, calibration_file: Path, tmp_path: Path, solver: str
) -> None:
    out = tmp_path / "out"
    recipe = pq.load_recipe("w8a8-all").with_rules({"solver": solver})
    result = pq.quantize(odd, recipe, out, calibration_file if solver == "gptq" else None)
    before, after = ShardReader(odd), ShardReader(out)
    scales = [name for name in after.names if name.endswith(".weight_scale")]
    assert len(scales) == sum(row.layout == "int-quantized" for row in result.plan.quantized) > 20
    for name in scales:
        weight = before.info(name.removesuffix("_scale"))
        assert after.info(name).dtype == weight.dtype, name
    assert before.names <= after.names
    assert result.plan.total_bytes == sum(after.info(name).nbytes for name in after.names)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not config["tie_word_embeddings"]
    assert not config["text_config"]["tie_word_embeddings"]

    auto = import_transformers().AutoModelForImageTextToText
    theirs, info = auto.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(10, 26)[None]
    with torch.no_grad(), decompressed_by_transformers():
        expected = theirs.eval()(input_ids=ids).logits
        actual = load_model(out, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_what_was_passed_over_is_told_and_the_rest_is_read(odd: Path) -> None:
    """Where the folder contradicts itself; other names and dtypes contradict nothing."""
    remarks = pq.inspect(odd, "w8a8").remarks
    assert isinstance(pq.load(odd)[0], torch.nn.Module)
    told = [word for word in ("quantization_config", "ties the head") if word in " ".join(remarks)]
    config = json.loads((odd / "config.json").read_text())
    assert ("quantization_config" in told) == ("quantization_config" in config)
    assert ("ties the head" in told) == config["tie_word_embeddings"]
