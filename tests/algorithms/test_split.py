"""Columns that stay in floating point: which ones, and that checkpoint and run agree on them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prismquant as pq
from prismquant.algorithms.split import ColumnProblem, Split
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.errors import RecipeError
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.numerics.hadamard import block_hadamard
from prismquant.shards import ShardReader
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from prismquant.data.batches import Batch

# Which columns


@pytest.mark.parametrize(
    ("magnitudes", "options", "expected"),
    [
        ([1.0, 2.0, 9.0, 3.0], {}, [2]),
        ([1.0, 2.0, 6.0, 3.0], {}, [2]),
        ([1.0, 2.0, 5.9, 3.0], {}, []),
        ([9.0, 8.0, 1.0, 1.0], {}, []),
        ([9.0, 1.0, 8.0, 1.0], {"columns": 2}, [0, 2]),
        ([9.0, 1.0, 2.0, 1.0], {"columns": 2}, [0]),
        ([1.0, 2.0, 5.9, 3.0], {"threshold": 1.5}, [2]),
        ([0.0, 0.0, 0.0], {}, []),
        ([0.0, 4.0, 0.0], {}, [1]),
        ([5.0, 5.0], {"threshold": 1.0}, [0]),
        ([5.0], {}, []),
        ([9.0, 3.0, 1.0], {"columns": 64}, [0]),
        ([8.0, 7.0, 6.0, 1.0], {"columns": 64}, [0, 1, 2]),
        ([8.0, 7.0, 6.0, 5.0], {"columns": 64}, []),
    ],
)
def test_the_fewest_columns_that_make_the_range_small_enough(
    magnitudes: list[float], options: dict[str, Any], expected: list[int]
) -> None:
    assert Split(**options).fit(ColumnProblem(torch.tensor(magnitudes))) == expected


@settings(max_examples=100)
@given(
    magnitudes=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=9),
    threshold=st.floats(1, 10),
    columns=st.integers(1, 5),
)
def test_columns_by_trying_all_counts(
    magnitudes: list[float], threshold: float, columns: int
) -> None:
    """No smaller number of columns achieves the reduction; what is returned does."""
    found = Split(threshold, columns).fit(ColumnProblem(torch.tensor(magnitudes)))
    assert found == sorted(set(found))
    ranked = sorted(magnitudes, reverse=True)

    def enough(taken: int) -> bool:
        return ranked[taken - 1] > 0 and ranked[taken - 1] >= threshold * ranked[taken]

    counts = [k for k in range(1, min(columns, len(magnitudes) - 1) + 1) if enough(k)]
    assert len(found) == (counts[0] if counts else 0)
    if found:
        rest = [m for index, m in enumerate(magnitudes) if index not in found]
        assert min(magnitudes[c] for c in found) >= threshold * max(rest)


@pytest.mark.parametrize(
    "options", [{"threshold": 0.9}, {"threshold": 1e7}, {"columns": 0}, {"columns": 65}]
)
def test_values_out_of_bounds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="cannot be"):
        Split(**options)


# In a model

BLOCK = 64
LAYERS = {
    "qwen2_vl": "model.visual.blocks.{}.mlp.fc2",
    "qwen3_vl": "model.visual.blocks.{}.mlp.linear_fc2",
    "video_llama_3": "model.vision_model.encoder.layers.{}.mlp.fc2",
}
SPLIT = {"name": "split", "match": {"modality": "vision", "role": "mlp.down"}}
ONLINE: dict[str, Any] = {
    "name": "rotation",
    "match": {"modality": "vision"},
    "options": {
        "residual": False,
        "values": False,
        "online": True,
        "signs": False,
        "online_block": BLOCK,
    },
}


def recipe(activations: str, **more: Any) -> dict[str, Any]:
    rule = {
        "match": {"modality": "vision", "role": "mlp.down"},
        "weights": "int4-g32",
        "activations": activations,
        "solver": "rtn",
        "weight_range": "minmax",
    }
    return {"rules": [rule], "transforms": [ONLINE, SPLIT]} | more


def planted(folder: Path, target: Path, family: str, column: int) -> Path:
    """A copy in which a block of fc1's rows gives a constant: the rotation piles it up in its
    first column. In that of ``column`` the constant is largest."""
    shutil.copytree(folder, target)
    bound, reader = bind(folder), ShardReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    for block in range(2):
        name = LAYERS[family].format(block)
        bias = bound.names.to_disk(f"{name[:-1]}1.bias")
        start = column // BLOCK * BLOCK
        tensors[bias][start : start + BLOCK] += 6.0
    write_tensors(target / "model.safetensors", tensors)
    return target


def batches_of(folder: Path, data: Path) -> list[Batch]:
    ids = bind(folder).vision_token_ids
    processor = load_processor(folder)
    return list(make_batches(read_samples(data), processor, batch_size=8, vision_token_ids=ids))


@torch.no_grad()
def logits(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    return torch.cat([model(**batch.inputs, use_cache=False).logits[:, -1] for batch in batches])


def simulated(
    folder: Path, family: str, column: int, static: dict[str, Tensor] | None
) -> nn.Module:
    """The quantized model by hand, in the float model's own layers."""
    model = load_float(folder)

    def by_hand(name: str) -> None:
        layer = model.get_submodule(name)
        weight = block_hadamard(layer.weight.double(), BLOCK).float()  # type: ignore[operator]
        rest = weight.clone()
        rest[:, column] = 0
        groups = rest.unflatten(1, (-1, 32))
        scale = groups.abs().amax(2, keepdim=True) / 7.5
        rounded = ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)
        rounded[:, column] = weight[:, column]

        def forward(x: Tensor) -> Tensor:
            x = block_hadamard(x, BLOCK)
            others = x.clone()
            others[..., column] = 0
            step = others.abs().amax(-1, keepdim=True) / 127.5 if static is None else static[name]
            seen = (others / step).round().clamp(-128, 127) * step
            seen[..., column] = x[..., column]
            return torch.nn.functional.linear(seen, rounded, layer.bias)  # type: ignore[arg-type]

        layer.forward = forward  # type: ignore[method-assign]

    for block in range(2):
        by_hand(LAYERS[family].format(block))
    return model


@pytest.mark.parametrize("activations", ["int8-token", "int8-tensor"])
@pytest.mark.parametrize(
    ("family", "column"),
    [("qwen2_vl", 0), ("qwen2_vl", 2 * BLOCK), ("video_llama_3", 3 * BLOCK)],
)
def test_a_column_is_found_wherever_it_is_and_stays_in_floating_point(
    tiny: Callable[..., Path],
    tmp_path: Path,
    family: str,
    column: int,
    activations: str,
) -> None:
    """The loaded checkpoint gives the logits of a simulation by hand."""
    data = tiny_vlm.samples(tmp_path / "data", ("image", "video"), count=2)
    folder = planted(tiny(family), tmp_path / "source", family, column)
    out = tmp_path / "out"
    result = pq.quantize(folder, recipe(activations), out, data)
    layers = [layer for step in result.record.steps for layer in step.layers]
    assert [layer.split_columns for layer in layers] == [(column,)] * 2
    reader, names = ShardReader(out), bind(folder).names
    static = {}
    for block in range(2):
        name = LAYERS[family].format(block)
        disk = names.to_disk(f"{name}.weight").removesuffix(".weight")
        assert reader.read(f"{disk}.split_index").tolist() == [column]
        if activations == "int8-tensor":
            static[name] = reader.read(f"{disk}.input_scale")
    batches = batches_of(folder, data)
    ours = logits(load_model(out), batches)
    by_hand = logits(simulated(folder, family, column, static or None), batches)
    torch.testing.assert_close(ours, by_hand, rtol=1e-3, atol=1e-3)
    assert sum(reader.info(n).nbytes for n in reader.names) == result.plan.total_bytes


def test_splitting_lowers_the_error_where_a_column_stands_out(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    data = tiny_vlm.samples(tmp_path / "data", ("image", "video"), count=2)
    folder = planted(tiny("qwen2_vl"), tmp_path / "source", "qwen2_vl", BLOCK)
    batches = batches_of(folder, data)
    full = logits(load_float(folder), batches)
    errors = {}
    for kind, transforms in {"split": [ONLINE, SPLIT], "whole": [ONLINE]}.items():
        pq.quantize(folder, recipe("int8-tensor", transforms=transforms), tmp_path / kind, data)
        errors[kind] = float((logits(load_model(tmp_path / kind), batches) - full).square().mean())
    assert errors["split"] < 0.7 * errors["whole"]


def test_where_none_stands_out_none_is_split_and_room_is_left_empty(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """The bytes are those of the plan, and loading takes the padding for nothing."""
    data = tiny_vlm.samples(tmp_path / "data", ("image", "text"), count=2)
    folder, out = tiny("qwen3_vl"), tmp_path / "out"
    split = SPLIT | {"options": {"threshold": 50.0, "columns": 3}}
    chosen = recipe("int8-tensor", transforms=[split])
    result = pq.quantize(folder, chosen, out, data)
    assert not [layer for s in result.record.steps for layer in s.layers if layer.split_columns]
    reader = ShardReader(out)
    index = [reader.read(n) for n in reader.names if n.endswith("split_index")]
    assert [entry.tolist() for entry in index] == [[-1] * 3] * 3
    assert sum(reader.info(n).nbytes for n in reader.names) == result.plan.total_bytes
    plain = tmp_path / "plain"
    pq.quantize(folder, recipe("int8-tensor", transforms=[]), plain, data)
    batches = batches_of(folder, data)
    assert torch.equal(logits(load_model(out), batches), logits(load_model(plain), batches))


def test_several_columns_of_a_layer_of_the_language_model(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Behind a gated layer, without a rotation, with a solver that needs second moments."""
    data = tiny_vlm.samples(tmp_path / "data", ("text",), count=4)
    source, folder = tiny("qwen2_vl"), tmp_path / "source"
    shutil.copytree(source, folder)
    reader, names = ShardReader(source), bind(source).names
    tensors = {name: reader.read(name) for name in reader.names}
    for layer in range(2):
        rows = tensors[names.to_disk(f"model.language_model.layers.{layer}.mlp.up_proj.weight")]
        rows[[7, 201]] *= 40
    write_tensors(folder / "model.safetensors", tensors)
    rule = {"match": {"modality": "llm", "role": "mlp"}, "weights": "int4-g32"}
    chosen = {
        "rules": [rule | {"activations": "int8-tensor"}],
        "transforms": [{"name": "split", "options": {"columns": 2, "threshold": 3.0}}],
        "calibration": {"batch_size": 2},
    }
    result = pq.quantize(folder, chosen, tmp_path / "out", data)
    layers = {layer.name: layer for step in result.record.steps for layer in step.layers}
    for number in range(2):
        down = layers[f"model.language_model.layers.{number}.mlp.down_proj"]
        assert down.split_columns == (7, 201)
        assert down.input_range.high < 60
        assert not layers[down.name.replace("down", "up")].split_columns
    model = load_model(tmp_path / "out")
    weight = model.get_parameter("model.language_model.layers.0.mlp.down_proj.weight")
    before = tensors[names.to_disk("model.language_model.layers.0.mlp.down_proj.weight")]
    assert torch.equal(weight[:, [7, 201]], before[:, [7, 201]])
    assert not torch.equal(weight[:, 8], before[:, 8])
