"""Experts to which a block deals rows, times scores: the same function, true losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prismquant as pq
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.engine.placement import Placement
from prismquant.errors import ModelError
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.models.experts import DealtExperts, split_experts
from prismquant.models.forgotten_outputs import supply_outputs
from prismquant.models.processor import load_processor
from prismquant.quantization import prepare

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from prismquant.runtime.mixed import Precision

FAMILY = "llama4"
BLOCK = "language_model.model.layers.1"
EXPERTS = {"match": {"role": "mlp.experts"}, "weights": "int4-g32", "min_tokens": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and pictures of several lengths."""
    return tiny_vlm.samples(tmp_path_factory.mktemp("data"), ("text", "image"), count=6)


def dealt_block(count: int = 4, chosen: int = 1) -> nn.Module:
    """transformers' own block, with random weights."""
    transformers = import_transformers()
    config = transformers.Llama4TextConfig(
        num_local_experts=count,
        num_experts_per_tok=chosen,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
    )
    kind: Any = transformers.models.llama4.modeling_llama4.Llama4TextMoe
    block: nn.Module = kind(config).double().eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_()
    return block


def as_layers(block: nn.Module) -> DealtExperts:
    """The block's experts put apart, with their weights; in place."""
    fused = block.get_submodule("experts")
    gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
    split_experts(block, ["experts"])
    layers = block.get_submodule("experts")
    assert isinstance(layers, DealtExperts)
    layers.double()
    for number, matrix in enumerate(gate_up):
        gate, up = matrix.T.chunk(2)
        for leaf, value in (("gate", gate), ("up", up), ("down", down[number].T)):
            layers.get_submodule(f"{number}.{leaf}_proj").get_parameter("weight").copy_(value)
    return layers


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31))
def test_layers_compute_what_the_block_does_with_its_own(
    count: int, chosen: int, tokens: int, seed: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block, x = (
            dealt_block(count, min(chosen, count)),
            torch.randn(tokens, 16, dtype=torch.float64),
        )
    expected, logits = block(x)
    layers = as_layers(block)
    torch.testing.assert_close(block(x)[0], expected)
    sent = logits.topk(min(chosen, count), dim=1)[1]
    assert [rows.tolist() for rows in layers.tokens] == [
        [t for t in range(tokens) if expert in sent[t]] for expert in range(count)
    ]


def test_experts_that_are_called_otherwise_are_refused() -> None:
    block = dealt_block()
    block.experts.forward = lambda hidden, index: hidden
    with pytest.raises(ModelError, match="a call with 2 arguments"):
        split_experts(block, ["experts"])


def dealt_by_transformers(folder: Path, data: Path, size: int) -> tuple[list[Tensor], Any]:
    """Rows that each expert of the second block is dealt in transformers' own model.

    Padding and rows of zeros are left out.
    """
    arch = bind(folder).arch
    kind: Any = getattr(import_transformers(), arch.hf_class)
    model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    supply_outputs(model, arch)
    experts, seen = model.get_submodule(f"{BLOCK}.feed_forward.experts"), []
    experts.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs: list[list[Tensor]] = [[] for _ in range(4)]
    model.requires_grad_(False)
    ids, samples = bind(folder).vision_token_ids, read_samples(data)
    for batch in make_batches(
        samples, load_processor(folder), batch_size=size, vision_token_ids=ids
    ):
        model(**batch.inputs, use_cache=False)
        counted = batch.inputs["attention_mask"].flatten().bool()
        for expert, rows in enumerate(seen.pop().chunk(4)):
            inputs[expert].append(rows[counted & (rows != 0).any(dim=1)].double())
    return [torch.cat(rows) for rows in inputs], experts


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_losses_are_those_over_the_rows_that_transformers_deals(
    size: int, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """In float64, from the fused model; with padding, whose rows are dealt, too."""
    folder, out = tiny(FAMILY), tmp_path / "out"
    result = pq.quantize(folder, {"rules": [EXPERTS]}, out, data, batch_size=size)
    found = {layer.name: layer for step in result.record.steps for layer in step.layers}
    inputs, experts = dealt_by_transformers(folder, data, size)
    model = load_model(out)
    assert sum(map(len, inputs)) > 50
    for number, x in enumerate(inputs):
        gate, up = experts.gate_up_proj[number].double().chunk(2, dim=1)
        path = f"{BLOCK}.feed_forward.experts.{number}"
        weights = {
            leaf: model.get_submodule(f"{path}.{leaf}_proj").weight.double().T
            for leaf in ("gate", "up", "down")
        }
        between = experts.act_fn(x @ weights["gate"]) * (x @ weights["up"])
        down = experts.down_proj[number].double()
        for leaf, own, rows in (("gate", gate, x), ("up", up, x), ("down", down, between)):
            record = found[f"{path}.{leaf}_proj"]
            assert record.routed.total == len(rows)
            if len(rows):
                loss = (rows @ (own - weights[leaf])).square().sum() / len(rows)
                assert record.loss == pytest.approx(float(loss), rel=2e-3)


def test_experts_that_few_rows_reach_take_all_of_their_block(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """Each row as its own expert is given it."""
    folder, out = tiny(FAMILY), tmp_path / "out"
    rules = [EXPERTS | {"min_tokens": 100_000}]
    result = pq.quantize(folder, {"rules": rules}, out, data, batch_size=6)
    inputs, experts = dealt_by_transformers(folder, data, 6)
    x, model = torch.cat(inputs), load_model(out)
    found = {layer.name: layer for step in result.record.steps for layer in step.layers}
    for number in range(4):
        name = f"{BLOCK}.feed_forward.experts.{number}.gate_proj"
        own = experts.gate_up_proj[number].double().chunk(2, dim=1)[0]
        error = own - model.get_submodule(name).weight.double().T
        assert found[name].tokens["hessian"].total == len(x)
        loss = float((x @ error).square().sum() / len(x))
        assert found[name].loss == pytest.approx(loss, rel=2e-3)


@pytest.mark.slow
def test_halted_and_repeated_passes_write_the_same(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shards(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}

    halted = pq.quantize(tiny(FAMILY), "w4a16", tmp_path / "halted", data, fallback=True)
    assert "halted" in str(halted.record.memory["placement"])

    def repeated(device: torch.device, precision: Precision) -> tuple[Placement, ...]:
        return (Placement(device, precision, paused=False),)

    monkeypatch.setattr(prepare, "placements", repeated)
    pq.quantize(tiny(FAMILY), "w4a16", tmp_path / "repeated", data, fallback=True)
    assert shards("repeated") == shards("halted")
