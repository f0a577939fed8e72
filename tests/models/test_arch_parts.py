"""Parts that towers are made of, and what a file says beside them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from prismquant.errors import ModelError
from prismquant.models.arch import ArchSpec
from prismquant.models.arch_files import known_archs, load_arch
from prismquant.models.arch_parts import PARTS

WHOLE = Path(__file__).parent / "archs" / "whole.toml"
ALL = sorted(path.stem for path in PARTS.glob("*.toml"))
_HEAD = """\
title = "My own"
model_types = ["my_own"]
hf_class = "LlamaForCausalLM"
head = "lm_head"
embeddings = "model.embed_tokens"
vision_token_ids = []
input_groups = []
layouts = [{ name = "native", rewrites = {} }]
"""


@pytest.fixture
def read(tmp_path: Path):
    """``read(text)`` is the architecture of a file whose towers are ``text``."""

    def make(text: str, head: str = _HEAD) -> ArchSpec:
        path = tmp_path / "my_own.toml"
        path.write_text(head + text, encoding="utf-8")
        return load_arch(path)

    return make


def test_a_file_of_parts_says_what_a_file_without_says():
    whole = load_arch(WHOLE)
    assert dataclasses.replace(whole, name="qwen2_vl") == known_archs()["qwen2_vl"]


@pytest.mark.parametrize("part", ALL)
def test_every_part_is_a_tower_by_itself(read, part):
    # What is left alone, and some parts move scale into, is named by the file of a family.
    arch = read(
        f'[[towers]]\nlike = "{part}"\nroot = "model.here"\n[gguf]\narchitecture = "X"\n'
        '[left_alone]\n"model.here.layers.*" = "routers and gates"\n'
    )
    (tower,) = arch.towers
    names = [tower.blocks, tower.entry, *tower.modules, *(edge.norm for edge in arch.edges)]
    assert all(name.startswith("model.here") for name in names if name)
    fused = {site.fuse for site in tower.sites if "*" not in site.path} - {None}
    assert fused <= arch.fused.keys()
    assert arch.gguf is not None
    assert all(name.startswith("model.here.") for name in arch.gguf.tensors)


def test_a_root_is_all_that_two_towers_of_a_part_differ_in(read):
    here, there = (
        read(f'[[towers]]\nlike = "llama"\nconfig = ""\nroot = "{root}"\n').towers[0]
        for root in ("model", "other.model")
    )
    moved = dataclasses.replace(here, root="other.model", blocks="other.model.layers")
    assert moved == there


def test_what_is_said_beside_a_part_counts(read):
    arch = read(
        """
[[towers]]
like = "llama"
root = "model"
config = "thinker.text"
kv_heads = "text.heads"
rename = { "self_attn.o_proj" = "self_attn.out", "norm" = "last_norm" }
without = ["self_attn.q_proj", "post_attention_layernorm"]
stream = { writers = ["model.projector"] }
sites = [
    { path = "mlp.router", role = "mlp.router", stage = 2, input = "routed" },
    { path = "mlp.up_proj", parallel = "row" },
]
edges = [{ kind = "norm", norm = "before", consumers = ["mlp.router"] }]

[gguf]
architecture = "X"
tensors = { "model.embed_tokens" = [], "lm_head" = "OUTPUT" }
"""
    )
    (tower,), (stream,) = arch.towers, arch.streams
    paths = [site.path for site in tower.sites]
    assert paths[:4] == ["self_attn.k_proj", "self_attn.v_proj", "self_attn.out", "mlp.gate_proj"]
    assert paths[4:] == ["mlp.router", "mlp.up_proj", "mlp.down_proj"]
    up = tower.sites[5]
    assert (up.role, up.parallel, up.fuse) == ("mlp.up", "row", "gate_up")
    assert [edge.source for edge in tower.edges] == [
        "input_layernorm",
        "self_attn.v_proj",
        "mlp.up_proj",
        "before",
    ]
    assert tower.edges[0].consumers == ("self_attn.k_proj", "self_attn.v_proj")
    assert tower.edges[1].consumers == ("self_attn.out",)
    assert (tower.depth, tower.kv_heads) == ("thinker.text.num_hidden_layers", "text.heads")
    assert [edge.norm for edge in arch.edges] == ["model.last_norm"]
    assert stream.writers == (
        "model.embed_tokens",
        "model.projector",
        "model.layers.*.self_attn.out",
        "model.layers.*.mlp.down_proj",
    )
    assert stream.norms == (
        "model.layers.*.input_layernorm",
        "model.layers.*.before",
        "model.last_norm",
    )
    assert arch.gguf is not None
    assert arch.gguf.tensors["model.last_norm"] == ("OUTPUT_NORM",)
    assert arch.gguf.tensors["model.layers.*.self_attn.out"] == ("ATTN_OUT",)
    gone = {"model.embed_tokens", "model.layers.*.post_attention_layernorm", "model.norm"}
    assert not gone & arch.gguf.tensors.keys()


def test_edges_and_streams_of_a_file_stand_in_place_of_those_of_its_parts(read):
    arch = read('edges = []\nstreams = []\n[[towers]]\nlike = "llama"\nroot = "model"\n')
    assert (arch.edges, arch.streams) == ((), ())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('like = "lama"', "there is no part 'lama'"),
        ('like = "lama"', "did you mean 'llama'"),
        ("like = 3", "there is no part 3"),
        ('like = "llama"\nrename = { "mlp.upp" = "up" }', "the part has no path 'mlp.upp'"),
        ('like = "llama"\nrename = ["mlp.up"]', "rename is a table of paths"),
        ('like = "llama"\nwithout = ["norm3"]', "the part has no path 'norm3'"),
        ('like = "llama"\nwithout = "norm"', "without is a list"),
        ('like = "llama"\nstream = true', "stream has writers and norms"),
        ('like = "llama"\nstream = { norms = 3 }', "stream has writers and norms"),
        ('like = "llama"\ngguf = {}', "'gguf' is said in the file"),
        ('like = "llama"\nsites = [{ closes_stream = true }]', "sites[7].role' is missing"),
        ('like = "llama"\nmodules = 3', "'towers[0].modules' must be a list"),
        ('like = "llama"\nblocks = 3', "'towers[0].blocks' must be a string"),
        ('like = "llama"\nstream = { norm = [] }', "stream has writers and norms"),
        ('like = "llama"\nsites = 3', "'sites' must be a list of tables"),
        ('like = "llama"\nsites = [{ path = "x" }]', "'towers[0].sites[7].role' is missing"),
        ('like = "llama"\nspare = 3', "unknown key 'towers[0].spare'"),
    ],
)
def test_a_mistake_beside_a_part_is_refused(read, said, message):
    with pytest.raises(ModelError, match=re.escape(message)) as error:
        read(f'[[towers]]\nroot = "model"\n{said}\n')
    assert "my_own.toml" in str(error.value)
    assert re.search("like '?(llama|lama|3)", str(error.value))


def test_a_tower_of_a_part_says_where_it_lies(read):
    with pytest.raises(ModelError, match="says its root"):
        read('[[towers]]\nlike = "llama"\n')
