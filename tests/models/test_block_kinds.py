"""Blocks that differ: sites that only some of them have, and edges that shrink to what is there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from prismquant.errors import ModelError
from prismquant.models import config as config_module
from prismquant.models.arch import Edge, EdgeKind, Site, SiteKind
from prismquant.models.arch_files import load_arch
from prismquant.models.bind import bind

if TYPE_CHECKING:
    from collections.abc import Callable

_NAME = "qwen3_vl_moe"
_CONFIG: dict[str, Any] = {
    "model_type": _NAME,
    "text_config": {
        "model_type": "qwen3_vl_moe_text",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
        },
    },
    "vision_config": {"depth": 1, "hidden_size": 64, "num_heads": 4, "out_hidden_size": 64},
}
_LEFT = {"model.visual*": "vision", "*.experts": "experts", "*.mlp.gate": "a router"}


def _dense(leaf: str, stage: int, where: str = "mlp.gate_proj") -> Site:
    role = f"mlp.{leaf.removesuffix('_proj')}"
    inputs = "mlp_in" if stage == 2 else "mlp_mid"
    return Site(
        role, f"mlp.{leaf}", SiteKind.LINEAR, stage, inputs, elementwise=True, in_blocks_with=where
    )


_SITES = (_dense("gate_proj", 2), _dense("up_proj", 2), _dense("down_proj", 3))
_EDGES = (
    Edge(EdgeKind.NORM, "post_attention_layernorm", None, ("mlp.gate_proj", "mlp.up_proj")),
    Edge(EdgeKind.LINEAR, None, "mlp.up_proj", ("mlp.down_proj",)),
)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``model(sites, dense)``: three blocks, some of them dense, with these sites."""

    def prepare(sites: tuple[Site, ...], dense: list[int], edges: tuple[Edge, ...] = ()) -> Path:
        arch = load_arch(Path(__file__).parent / "archs" / f"{_NAME}.toml")
        tower = arch.towers[0]
        tower = dataclasses.replace(
            tower, sites=(*tower.sites, *sites), edges=(*tower.edges, *edges)
        )
        arch = dataclasses.replace(arch, towers=(tower,), left_alone=_LEFT)
        monkeypatch.setattr(config_module, "known_archs", lambda: {_NAME: arch})
        text = _CONFIG["text_config"] | {"mlp_only_layers": dense}
        (tmp_path / "config.json").write_text(json.dumps(_CONFIG | {"text_config": text}))
        return tmp_path

    return prepare


def test_only_blocks_that_have_a_module_have_its_sites(model: Callable[..., Path]) -> None:
    bound = bind(model(_SITES, [0, 2], _EDGES), headers_required=False)
    blocks = {
        step.name.rpartition(".")[2]: [site.role for site in step.sites]
        for step in bound.steps
        if step.kind == "block"
    }
    attention = ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.out"]
    both = [*attention, "mlp.gate", "mlp.up", "mlp.down"]
    assert blocks == {"0": both, "1": attention, "2": both}
    sources = [edge.source.partition(".layers.")[2] for edge in bound.edges]
    norms = ["input_layernorm", "post_attention_layernorm", "mlp.up_proj"]
    assert sources == [*(f"0.{n}" for n in norms), f"1.{norms[0]}", *(f"2.{n}" for n in norms)]
    assert bound.notes == (
        "model.language_model.layers.*: has mlp.gate_proj, as not every block of the llm tower "
        "has (2 layers: 0, 2)",
    )


def test_an_edge_shrinks_to_the_consumers_that_a_block_has(model: Callable[..., Path]) -> None:
    """As where two kinds of attention read one norm."""
    tower = load_arch(Path(__file__).parent / "archs" / f"{_NAME}.toml").towers[0]
    (norm,) = tower.edges
    joined = dataclasses.replace(norm, consumers=(*norm.consumers, "mlp.gate_proj"))
    bound = bind(model(_SITES, [1], (joined,)), headers_required=False)
    assert [len(edge.consumers) for edge in bound.edges[1::2]] == [3, 4, 3]


def test_a_model_all_of_whose_blocks_are_of_one_kind_is_told_so(model: Callable[..., Path]) -> None:
    bound = bind(model(_SITES, [], _EDGES), headers_required=False)
    assert [edge.source.rpartition(".")[2] for edge in bound.edges] == ["input_layernorm"] * 3
    assert bound.notes == (
        "no block of the llm tower has mlp.gate_proj: qwen3_vl_moe.toml describes mlp.gate, "
        "mlp.up, mlp.down there",
    )


@pytest.mark.parametrize(
    ("wrong", "finding"),
    [
        (_dense("upp_proj", 2), "layers.*.mlp.upp_proj: expected a linear (mlp.upp), found"),
        (_dense("up_proj", 2, "mlp.gateproj"), "layers.*.mlp.up_proj: Linear that no site of"),
        (_dense("up_proj", 2, "mlp"), "layers.1.mlp.up_proj: expected a linear (mlp.up), found"),
    ],
    ids=["path", "module", "too wide"],
)
def test_a_wrong_path_stays_an_error(model: Callable[..., Path], wrong: Site, finding: str) -> None:
    sites = (_SITES[0], wrong, _SITES[2])
    with pytest.raises(ModelError) as caught:
        bind(model(sites, [0, 2]), headers_required=False)
    assert finding in caught.value.what


def test_a_tower_without_blocks_cannot_have_some_of_them(tmp_path: Path) -> None:
    file = tmp_path / "odd.toml"
    text = (Path(__file__).parents[2] / "prismquant/models/archs/qwen3_vl.toml").read_text()
    added = 'sites = [{ path = "linear_fc1", in_blocks_with = "norm" }]'
    assert 'like = "merger"' in text
    file.write_text(text.replace('like = "merger"', f'like = "merger"\n{added}'))
    with pytest.raises(ModelError, match="a tower of modules has no blocks"):
        load_arch(file)
