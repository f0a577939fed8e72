"""Experts as layers of their own: the same function, and names on disk, however they are stored."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import prismquant as pq
from prismquant.errors import ModelError, PlanError
from prismquant.export.load_quantized import load_model
from prismquant.formats.spec import spec
from prismquant.models.arch_files import known_archs
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.models.experts import ExpertLayers, routed_places, split_experts
from prismquant.models.float_model import load_float
from prismquant.models.outliers import add_outliers
from prismquant.plan.fallback import fit_together
from prismquant.shards import ShardReader
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

IDS = torch.arange(3, 40)[None]
RTN = {
    "rules": [
        {"match": {"modality": "llm"}, "weights": "int4-g32", "solver": "rtn"},
        {"match": {"role": "lm_head"}, "skip": True},
    ]
}


def fused_experts(count: int = 4, width: int = 16, inner: int = 8) -> nn.Module:
    transformers = import_transformers()
    config = transformers.Qwen3MoeConfig(
        num_experts=count, hidden_size=width, moe_intermediate_size=inner
    )
    config._experts_implementation = "eager"
    kind: Any = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts
    module: nn.Module = kind(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    call: Any = model
    found: Tensor = call(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    return found


def transformers_model(folder: Path) -> nn.Module:
    kind: Any = getattr(import_transformers(), bind(folder, quantized=True).arch.hf_class)
    model: nn.Module = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 12), st.integers(0, 2**31))
def test_each_expert_is_given_the_tokens_that_chose_it(
    count: int, chosen: int, tokens: int, seed: int
) -> None:
    """Also where a token chooses none, which is a number past the last expert."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.randint(count + 1, (tokens, chosen), generator=draw)
    for expert, (rows, choices) in enumerate(routed_places(index, count)):
        expected = [(t, c) for t in range(tokens) for c in range(chosen) if index[t, c] == expert]
        assert list(zip(rows.tolist(), choices.tolist(), strict=True)) == expected


@torch.no_grad()
def test_layers_compute_what_fused_experts_do() -> None:
    fused = fused_experts()
    holder = torch.nn.ModuleDict({"experts": fused})
    split_experts(holder, ["experts"])
    layers = holder["experts"]
    assert isinstance(layers, ExpertLayers)
    for number in range(4):
        gate, up = fused.get_parameter("gate_up_proj")[number].chunk(2)
        for leaf, value in (("gate", gate), ("up", up), ("down", fused.down_proj[number])):
            layers.get_submodule(f"{number}.{leaf}_proj").get_parameter("weight").copy_(value)
    x, index = torch.randn(9, 16), torch.rand(9, 4).topk(2)[1]
    weights = torch.rand(9, 2)
    torch.testing.assert_close(layers(x, index, weights), fused(x, index, weights))
    assert [rows.tolist() for rows in layers.tokens] == [
        [t for t in range(9) if expert in index[t]] for expert in range(4)
    ]


def test_other_experts_are_refused_with_what_they_are() -> None:
    module = fused_experts()
    module.has_bias = True
    with pytest.raises(ModelError, match="no set of gated experts without bias: has_bias"):
        split_experts(torch.nn.ModuleDict({"experts": module}), ["experts"])


def stored_as(kind: str, tiny: Callable[..., Path], folder: Path) -> Path:
    """A checkpoint whose experts are stored in one of the ways that are in use."""
    source = tiny("qwen3_moe")
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    reader = ShardReader(source)
    tensors = {name: reader.read(name) for name in reader.names}
    for name in [name for name in tensors if ".experts." in name]:
        stack = tensors.pop(name)
        if kind == "fused":
            tensors[name] = stack
        elif kind == "transposed":
            tensors[name] = stack.transpose(1, 2).contiguous()
        else:
            holder = name.rpartition(".")[0]
            leaves = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            for number, matrix in enumerate(stack):
                for leaf, part in zip(leaves, matrix.chunk(len(leaves)), strict=True):
                    tensors[f"{holder}.{number}.{leaf}.weight"] = part.contiguous()
    write_tensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("kind", ["fused", "transposed", "each"])
def test_experts_are_read_however_they_are_stored(
    kind: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    expected = logits(load_float(stored_as("each", tiny, tmp_path)))
    folder = stored_as(kind, tiny, tmp_path)
    for model in (load_float(folder), load_model(folder)):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["fused", "transposed", "each"])
def test_experts_with_outliers_are_stored_as_the_source_stores_them(
    kind: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    source = stored_as(kind, tiny, tmp_path / "in")
    touched = add_outliers(source, tmp_path / "out", factor=8.0, channels=2)
    assert any(".experts." in name for name in touched)
    before, after = (ShardReader(folder) for folder in (source, tmp_path / "out"))
    assert {name: before.info(name).shape for name in before.names} == {
        name: after.info(name).shape for name in after.names
    }
    assert torch.equal(logits(load_float(tmp_path / "out")), logits(load_float(source)))
    if kind == "each":  # transformers reads Qwen3-MoE's experts one by one, as they are released
        found = logits(transformers_model(tmp_path / "out"))
        torch.testing.assert_close(found, logits(load_float(source)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["fused", "transposed", "each"])
def test_each_expert_is_written_by_the_name_that_servers_know(
    kind: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    folder, out = stored_as(kind, tiny, tmp_path / "in"), tmp_path / "out"
    pq.quantize(folder, RTN, out)
    names = ShardReader(out).names
    for number in range(4):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            assert f"model.layers.1.mlp.experts.{number}.{leaf}.weight_packed" in names
    assert not any("gate_up_proj" in name for name in names)
    theirs = logits(transformers_model(out))
    torch.testing.assert_close(logits(load_model(out)), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["fused", "transposed"])
def test_experts_that_are_left_alone_stay_as_they_are_stored(
    kind: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    folder, out = stored_as(kind, tiny, tmp_path / "in"), tmp_path / "out"
    skip = {"match": {"role": "mlp.experts"}, "skip": True}
    pq.quantize(folder, {"rules": [*RTN["rules"], skip]}, out)
    source, result = ShardReader(folder), ShardReader(out)
    stacks = [name for name in source.names if ".experts." in name]
    assert len(stacks) == 4
    for name in stacks:
        assert torch.equal(source.read(name), result.read(name))
    assert not any(".experts.0." in name for name in result.names)


def test_experts_of_a_block_have_one_scheme(tiny: Callable[..., Path]) -> None:
    down = {"match": {"role": "mlp.experts.down"}, "weights": "int8-g32"}
    with pytest.raises(PlanError) as refused:
        pq.inspect(tiny("qwen3_moe"), {"rules": [RTN["rules"][0], down, RTN["rules"][1]]})
    assert "all layers of all experts of a block must share a scheme" in str(refused.value)


def test_formats_of_a_block_fall_back_together(tiny: Callable[..., Path]) -> None:
    """Where the inputs of one layer are too narrow for a group, all have a smaller one."""
    sites = [s for s in bind(tiny("qwen3_moe")).sites if s.expert is not None]
    narrow = [replace(s, in_features=96) if "down" in s.name else s for s in sites]
    asked = spec("int4-g128"), None, "nearest"
    found = fit_together(narrow, dict.fromkeys((s.name for s in narrow), asked))
    assert found.keys() == {s.name for s in narrow if "down" not in s.name}
    assert {fitted.weights for fitted in found.values()} == {spec("int4-g32")}
    assert "as the other experts of its block" in found[narrow[0].name].note


def test_routers_are_left_alone_and_said_to_be(tiny: Callable[..., Path]) -> None:
    alone = {item.name: item for item in bind(tiny("qwen3_moe")).left_alone}
    assert alone["model.layers.0.mlp.gate"].reason.startswith("router")


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe"])
def test_files_say_where_transformers_makes_no_stacks(
    family: str, tiny: Callable[..., Path]
) -> None:
    model = transformers_model(tiny(family))
    table = importlib.import_module("transformers.conversion_mapping")
    conversions = table.get_model_conversion_mapping(model)
    sources = [pattern for one in conversions for pattern in one.source_patterns]
    merges = any("experts.*." in pattern for pattern in sources)
    assert known_archs()[family].experts_stay_stacked is not merges
