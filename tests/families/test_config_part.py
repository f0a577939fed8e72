"""Checkpoints that hold several models, of which one is quantized."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import tiny_families
import torch
from safetensors.torch import load_file, save_file

import prismquant as pq
from prismquant.api import export
from prismquant.check import check
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.storage import write_json

if TYPE_CHECKING:
    from pathlib import Path

_ROUNDED = {"rules": [{"match": {"role": "mlp"}, "weights": "int8-g32", "solver": "rtn"}]}
_PART = "thinker_config"
_OTHERS = {"talker.codec_head.weight": torch.ones(4, 8), "token2wav.scale": torch.arange(3.0)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thinker beside a talker, as they are released."""
    folder = tiny_families.build("qwen2_5_omni", tmp_path_factory.mktemp("models") / "whole")
    own = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {"model_type": "qwen2_5_omni", _PART: own})
    tensors = load_file(folder / "model.safetensors")
    named = {f"thinker.{name}": value for name, value in tensors.items()}
    save_file(named | _OTHERS, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored(folder: Path) -> dict[str, Any]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def test_what_another_model_needs_stays_as_it_is(whole: Path, tmp_path: Path) -> None:
    pq.quantize(whole, _ROUNDED, tmp_path / "out")
    tensors = stored(tmp_path / "out")
    for name, value in _OTHERS.items():
        assert torch.equal(tensors[name], value)
    assert check(tmp_path / "out", "vllm").ok


def test_both_readers_find_their_names(whole: Path, tmp_path: Path) -> None:
    """Servers look layers up as the disk calls them, transformers in the part, by their paths."""
    out = tmp_path / "out"
    pq.quantize(whole, _ROUNDED, out)
    config = json.loads((out / "config.json").read_text())
    sections = (config["quantization_config"], config[_PART]["quantization_config"])
    served, own = ({n for g in s["config_groups"].values() for n in g["targets"]} for s in sections)
    names = bind(whole).names
    assert served == {names.to_disk(f"{name}.weight").removesuffix(".weight") for name in own}
    assert all(name.startswith("thinker.") for name in served)
    kind = import_transformers().Qwen2_5OmniThinkerForConditionalGeneration
    theirs = kind.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        expected = load_model(out)(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_dense_export_says_nothing_of_quantization(whole: Path, tmp_path: Path) -> None:
    pq.quantize(whole, _ROUNDED, tmp_path / "out")
    export(tmp_path / "out", "dense", tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert "quantization_config" not in config
    assert "quantization_config" not in config[_PART]
    assert bind(tmp_path / "dense").has_weights
