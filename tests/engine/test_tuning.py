"""Tuning a step of the engine: codes move, the block's output comes closer, the rest stays."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch

import prismquant as pq
from prismquant.data import read_samples
from prismquant.data.batches import Batch, make_batches
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from prismquant.diagnostics.step_record import LayerRecord

BLOCK = "model.language_model.layers.{}"
LLM = {"match": {"modality": "llm", "role": ["attn", "mlp"]}, "weights": "int3-g32"}
QUICK = {"iterations": 12, "settle": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts, two pictures and two clips."""
    return tiny_vlm.samples(tmp_path_factory.mktemp("data"))


def recipe_of(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"rules": [LLM, *rules], "calibration": {"batch_size": 2}} | more


def layers_of(result: Any) -> dict[str, LayerRecord]:
    return {layer.name: layer for step in result.record.steps for layer in step.layers}


@functools.cache
def batches_of(folder: Path, data: Path) -> list[Batch]:
    ids = bind(folder).vision_token_ids
    processor = load_processor(folder)
    return list(make_batches(read_samples(data), processor, batch_size=2, vision_token_ids=ids))


@torch.no_grad()
def outputs_of(model: nn.Module, name: str, batches: Sequence[Batch]) -> Tensor:
    """Counted rows that a step puts out, [rows, features]."""
    found = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        values = output if isinstance(output, torch.Tensor) else output[0]
        rows = values.reshape(-1, values.shape[-1])
        counted = mask.reshape(-1).bool()
        found.append(rows[counted] if len(rows) == len(counted) else rows)

    handle = model.get_submodule(name).register_forward_hook(hook)
    for batch in batches:
        mask = batch.inputs["attention_mask"]
        model(**batch.inputs, use_cache=False)
    handle.remove()
    return torch.cat(found)


def weights_on_disk(folder: Path) -> dict[str, Tensor]:
    reader = ShardReader(folder)
    return {name: reader.read(name) for name in sorted(reader.names)}


def test_the_recorded_loss_is_that_of_the_loaded_model(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """Against the float model's output of the same block, for every block in turn."""
    folder = tiny("qwen2_vl")
    rule = {"tuner": "autoround", "tuner_options": QUICK, "activations": "int8-token"}
    layers = layers_of(pq.quantize(folder, recipe_of(rule), tmp_path / "tuned", data))
    pq.quantize(folder, recipe_of(rule | {"tuner": "none"}), tmp_path / "plain", data)
    batches, full = batches_of(folder, data), load_float(folder)
    tuned, plain = load_model(tmp_path / "tuned"), load_model(tmp_path / "plain")
    for number in range(2):
        name = BLOCK.format(number)
        notes = [one.tuning for layer, one in layers.items() if layer.startswith(f"{name}.")]
        assert len(notes) == 7
        (loss,) = {note.loss for note in notes}
        (before,) = {note.loss_before for note in notes}
        assert all(note.method == "autoround" for note in notes)
        assert loss < 0.97 * before
        wanted = outputs_of(full, name, batches)
        error = (outputs_of(tuned, name, batches) - wanted).square().sum(1).mean()
        assert float(error) == pytest.approx(loss, rel=0.01)
        if number == 0:
            error = (outputs_of(plain, name, batches) - wanted).square().sum(1).mean()
            assert float(error) == pytest.approx(before, rel=0.01)


def test_zeroquant_aims_at_the_float_block_on_the_same_inputs(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """The teacher is the float block, fed what the quantized one is fed."""
    folder, name = tiny("qwen2_vl"), BLOCK.format(1)
    rule = {"tuner": "zeroquant", "tuner_options": {"iterations": 10}}
    layers = layers_of(pq.quantize(folder, recipe_of(rule), tmp_path / "out", data))
    notes = layers[f"{name}.mlp.up_proj"].tuning
    assert notes.loss <= notes.loss_before
    batches = batches_of(folder, data)
    model, full = load_model(tmp_path / "out"), load_float(folder)
    seen = outputs_of(model, name, batches)
    # The same prefix, with the float block in place of the quantized one.
    blocks: Any = model.get_submodule("model.language_model.layers")
    blocks[1] = full.get_submodule(name)
    error = (seen - outputs_of(model, name, batches)).square().sum(1).mean()
    assert float(error) == pytest.approx(notes.loss, rel=0.01)


def test_nobody_tunes_where_none_is_asked_for(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """`none` takes a tuner back, for all layers or for some; what is not tuned keeps its codes."""
    folder = tiny("qwen2_vl")
    tuned = {"tuner": "autoround", "tuner_options": QUICK}
    first = {"match": {"name": "*.layers.0.*"}}
    kinds = {
        "never": [],
        "taken back": [tuned, {"tuner": "none"}],
        "second block": [tuned, first | {"tuner": "none"}],
        "up only": [first | {"match": {"name": "*.layers.0.mlp.up_proj"}} | tuned],
    }
    written, layers = {}, {}
    for kind, rules in kinds.items():
        layers[kind] = layers_of(
            pq.quantize(folder, recipe_of(*rules), tmp_path / kind, data)  # type: ignore[arg-type]
        )
        written[kind] = weights_on_disk(tmp_path / kind)
    names = bind(folder).names

    def differing(kind: str) -> set[str]:
        before, after = written["never"], written[kind]
        assert before.keys() == after.keys()
        return {
            names.to_module(f"{n.rpartition('.')[0]}.weight").removesuffix(".weight")
            for n in before
            if not torch.equal(before[n], after[n])
        }

    assert differing("taken back") == set()
    second = differing("second block")
    assert second
    assert all(name.startswith(BLOCK.format(1)) for name in second)
    up = f"{BLOCK.format(0)}.mlp.up_proj"
    later = {name for name in differing("up only") if not name.startswith(BLOCK.format(1))}
    assert later == {up}
    assert layers["up only"][up].tuning is not None
    assert layers["up only"][up.replace("up", "down")].tuning is None
    assert not [x for x in layers["never"].values() if x.tuning]


def test_two_tuners_in_one_block_follow_each_other(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """The second starts from what the first left; each tells of its own layers."""
    folder = tiny("qwen2_5_vl")
    rules = [
        {"match": {"role": "attn"}, "tuner": "autoround", "tuner_options": QUICK},
        {"match": {"role": "mlp"}, "tuner": "autoround", "tuner_options": QUICK | {"seed": 1}},
    ]
    layers = layers_of(pq.quantize(folder, recipe_of(*rules), tmp_path / "out", data))
    for number in range(2):
        attention = layers[f"{BLOCK.format(number)}.self_attn.q_proj"].tuning
        mlp = layers[f"{BLOCK.format(number)}.mlp.up_proj"].tuning
        assert attention.loss < attention.loss_before
        assert mlp.loss < mlp.loss_before
        assert mlp.loss_before == pytest.approx(attention.loss, rel=1e-4)
        wanted = outputs_of(load_float(folder), BLOCK.format(number), batches_of(folder, data))
        seen = outputs_of(
            load_model(tmp_path / "out"), BLOCK.format(number), batches_of(folder, data)
        )
        error = float((seen - wanted).square().sum(1).mean())
        assert error == pytest.approx(mlp.loss, rel=0.01)


def test_the_head_and_the_tower_are_tuned_or_left_as_fits(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """Every step of every modality may be asked for; the head has no block whose output counts."""
    folder = tiny("qwen3_vl")
    quick = {"iterations": 2, "settle": 1}
    everything = {"weights": "int4-g16", "tuner": "autoround", "tuner_options": quick}
    calibration = {"batch_size": 2, "samples": 3}
    recipe = {"rules": [everything | {"solver": "rtn"}], "calibration": calibration}
    layers = layers_of(pq.quantize(folder, recipe, tmp_path / "out", data))
    untuned = [name for name, layer in layers.items() if layer.tuning is None]
    assert untuned == ["lm_head"]
    assert torch.isfinite(
        load_model(tmp_path / "out")(**batches_of(folder, data)[0].inputs).logits
    ).all()


def test_tuning_behind_transforms_and_a_correction(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """Rotated inputs, moved scale and split columns are all within the block that is run."""
    folder, name = tiny("qwen2_vl"), BLOCK.format(1)
    rule = {"tuner": "autoround", "tuner_options": QUICK, "activations": "int8-token"}
    transforms = [
        {"name": "rotation", "match": {"modality": "llm"}, "options": {"online": True}},
        {"name": "smoothquant", "options": {"search": False}},
        {"name": "split", "options": {"threshold": 1.01}},
    ]
    recipe = recipe_of(rule | {"correction": "auto"}, transforms=transforms)
    layers = layers_of(pq.quantize(folder, recipe, tmp_path / "out", data))
    assert [layer for layer in layers.values() if layer.split_columns]
    notes = layers[f"{name}.mlp.down_proj"].tuning
    assert notes.loss < notes.loss_before
    # Each block's output is the residual stream, rotated alike in both models.
    batches = batches_of(folder, data)
    head = "model.language_model.norm"
    seen = outputs_of(load_model(tmp_path / "out"), name, batches)
    wanted = outputs_of(load_float(folder), name, batches)
    assert seen.norm(dim=1) == pytest.approx(wanted.norm(dim=1), rel=0.5)
    from prismquant.algorithms.rotation import RotatedTower
    from prismquant.models.rotated_reader import RotatedReader

    bound = bind(folder)
    embedding = bound.names.to_disk(f"{bound.arch.embeddings}.weight")
    turned = RotatedReader(folder, bound, [RotatedTower(bound.steps[-1].modality)]).read(embedding)
    # What the rotation does to an embedding tells the matrix.
    matrix = torch.linalg.lstsq(ShardReader(folder).read(embedding).double(), turned.double())
    rotated = wanted.double() @ matrix.solution
    error = float((seen.double() - rotated).square().sum(1).mean())
    assert error == pytest.approx(notes.loss, rel=0.02), head
