"""Loading through our own reader equals from_pretrained, whatever the names on disk."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import tiny_vlm
import torch

from prismquant.errors import ModelError, StorageError
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.models.float_model import load_float
from prismquant.models.load import empty_model, materialize, release
from prismquant.models.processor import load_processor
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CASES = [
    *((family, {}) for family in tiny_vlm.FAMILIES),
    *((family, {"tie": True}) for family in tiny_vlm.FAMILIES),
    ("qwen2_vl", {"layout": "native"}),
    ("qwen2_5_vl", {"layout": "native", "tie": True}),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging = import_transformers().utils.logging
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def _reference(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    auto = import_transformers().AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def _logits(model: torch.nn.Module, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    dtype = next(model.parameters()).dtype
    return [
        model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in sample.items()}).logits
        for sample in inputs
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "options"), CASES)
def test_load_float_equals_from_pretrained(
    tiny: Callable[..., Path], calibration_file: Path, family: str, options: dict, dtype
):
    folder = tiny(family, **options)
    ours, theirs = load_float(folder, dtype), _reference(folder, dtype)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for (name, ours_buffer), (_, theirs_buffer) in zip(
        ours.named_buffers(), theirs.named_buffers(), strict=True
    ):
        assert ours_buffer.dtype == theirs_buffer.dtype, name
        assert torch.equal(ours_buffer, theirs_buffer), name
    inputs = tiny_vlm.encode(load_processor(folder), calibration_file)
    for a, b in zip(_logits(ours, inputs), _logits(theirs, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", tiny_vlm.FAMILIES)
def test_save_pretrained_writes_the_first_layout_of_the_data_file(
    tiny: Callable[..., Path], tmp_path: Path, family: str
):
    """What a new checkpoint of transformers looks like binds, and is what we say it is."""
    folder = tiny(family)
    _reference(folder, torch.float32).save_pretrained(tmp_path)
    assert ShardReader(tmp_path).names == ShardReader(folder).names
    bound = bind(tmp_path)
    assert bound.names.layout == bound.arch.layouts[0].name


@pytest.mark.parametrize("tie", [False, True])
def test_the_remote_layout_computes_what_the_native_one_does(
    tiny: Callable[..., Path], calibration_file: Path, tie: bool
):
    native = tiny("video_llama_3", tie=tie)
    remote = tiny("video_llama_3", tie=tie, layout="remote")
    names = ShardReader(remote).names
    assert "model.vision_encoder.embeddings.patch_embedding.weight" in names
    assert "model.mm_projector.readout.2.bias" in names
    assert "model.layers.1.mlp.down_proj.weight" in names
    assert ("lm_head.weight" in names) is not tie
    inputs = tiny_vlm.encode(load_processor(native), calibration_file)
    for a, b in zip(
        _logits(load_float(native), inputs), _logits(load_float(remote), inputs), strict=True
    ):
        assert torch.equal(a, b)


def test_weights_are_shared_only_where_they_are_tied(tiny: Callable[..., Path], family: str):
    tied = load_float(tiny(family, tie=True), torch.float64)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    free = load_float(tiny(family))
    assert free.lm_head.weight is not free.get_input_embeddings().weight


def test_two_stored_ends_stay_two_weights(tiny: Callable[..., Path], tmp_path: Path):
    """As in from_pretrained, the tensors on disk count more than the config."""
    folder = shutil.copytree(tiny("qwen3_vl"), tmp_path / "copy")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    model = load_float(folder)
    reader = ShardReader(folder)
    assert torch.equal(model.lm_head.weight, reader.read("lm_head.weight"))
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("order", [("lm_head", "embed"), ("embed", "lm_head")])
def test_tied_ends_can_come_one_by_one(tiny: Callable[..., Path], order: tuple[str, str]):
    folder = tiny("qwen2_vl", tie=True)
    bound = bind(folder)
    model = empty_model(bound.config, bound.arch)
    paths = {"lm_head": "lm_head", "embed": bound.arch.embeddings}
    reader = ShardReader(folder)
    for name in order:
        materialize(model, paths[name], reader, bound.names, "cpu")
        assert torch.equal(
            model.get_submodule(paths[name]).weight, reader.read("model.embed_tokens.weight")
        )
    assert model.lm_head.weight is model.get_input_embeddings().weight
    release(model, "lm_head")
    assert model.lm_head.weight.is_meta
    assert not model.get_input_embeddings().weight.is_meta


# ----------------------------------------------------------------------------------- piece by piece


def test_only_the_tensors_of_the_path_are_read(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    bound = bind(tiny_folder)
    model = empty_model(bound.config, bound.arch)
    reader = ShardReader(tiny_folder)
    read: list[str] = []
    original = ShardReader.read
    monkeypatch.setattr(
        ShardReader, "read", lambda self, name: (read.append(name), original(self, name))[1]
    )
    step = next(step for step in bound.steps if step.kind == "block")
    materialize(model, step.name, reader, bound.names, "cpu", torch.float64)
    prefix = bound.names.to_disk(step.name) + "."
    assert sorted(read) == sorted(name for name in reader.names if name.startswith(prefix))
    for name, parameter in model.named_parameters():
        inside = name.startswith(step.name + ".")
        assert parameter.is_meta is not inside
        if inside:
            assert parameter.dtype == torch.float64
            assert not parameter.requires_grad


def test_released_modules_have_no_memory_and_can_come_back(tiny_folder: Path):
    bound = bind(tiny_folder)
    model = empty_model(bound.config, bound.arch)
    reader = ShardReader(tiny_folder)
    materialize(model, "", reader, bound.names, "cpu")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for step in bound.steps:
        release(model, step.name)
        assert all(p.is_meta for p in model.get_submodule(step.name).parameters())
        assert not any(b.is_meta for b in model.buffers())
        materialize(model, step.name, reader, bound.names, "cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_none_keeps_the_dtype_on_disk(tiny: Callable[..., Path]):
    model = load_float(tiny("qwen2_vl", dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_a_path_that_does_not_exist_is_named(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_vl"))
    model = empty_model(bound.config, bound.arch)
    reader = ShardReader(bound.folder)
    with pytest.raises(ModelError, match=r"no module 'model.visual.blocks.9'"):
        materialize(model, "model.visual.blocks.9", reader, bound.names, "cpu")
    with pytest.raises(ModelError, match="no module 'nowhere'"):
        release(model, "nowhere")


def test_tensors_of_another_model_are_refused(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_vl"))
    bound.config.text_config.intermediate_size = 384
    model = empty_model(bound.config, bound.arch)
    with pytest.raises(ModelError, match=r"gate_proj.weight: shape \(256, 128\) on disk"):
        materialize(model, "", ShardReader(bound.folder), bound.names, "cpu")
    bound = bind(tiny("qwen3_vl"))
    bound.config.text_config.num_hidden_layers = 3
    model = empty_model(bound.config, bound.arch)
    path = "model.language_model.layers.2"
    with pytest.raises(StorageError, match=r"layers.2.* is missing"):
        materialize(model, path, ShardReader(bound.folder), bound.names, "cpu")
