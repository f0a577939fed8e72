"""Families whose descriptions miss something are refused; norms are known by what they compute.

``archs/`` beside this file describes two families in part, one of them wrongly.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from prismquant.errors import ModelError
from prismquant.models import config as config_module
from prismquant.models.arch_files import load_arch
from prismquant.models.bind import bind
from prismquant.models.bound import LeftAlone
from prismquant.models.config import import_transformers
from prismquant.models.load import empty_model
from prismquant.models.norm_probe import NormBehaviour, NormProbe
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.schema import load_recipe
from prismquant.storage import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from prismquant.models.arch import ArchSpec

_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_CONFIGS: Mapping[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        "model_type": "qwen3_vl_moe",
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            **_TEXT,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "rope_parameters": _ROTARY,
        },
        "vision_config": {"depth": 1, "hidden_size": 64, "num_heads": 4, "out_hidden_size": 64},
    },
    "gemma3": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **_TEXT},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
    },
}


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``describe(name, **changes)``: a folder whose family a file beside this one describes."""

    def prepare(name: str, **changes: Any) -> Path:
        arch: ArchSpec = load_arch(Path(__file__).parent / "archs" / f"{name}.toml")
        arch = dataclasses.replace(arch, **changes)
        monkeypatch.setattr(config_module, "known_archs", lambda: {name: arch})
        write_json(tmp_path / "config.json", _CONFIGS[name])
        return tmp_path

    return prepare


def _refusal(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        bind(folder, headers_required=False)
    assert caught.value.where == str(folder)
    return caught.value


# ------------------------------------------------------------------------------------------ claims


def test_experts_that_no_site_claims_are_refused(describe: Callable[..., Path]):
    """What, where and what to do: no 46 GB of experts leave silently in 16 bits."""
    error = _refusal(describe("qwen3_vl_moe"))
    assert error.what.splitlines() == [
        "the checkpoint does not fit Qwen3-VL-MoE: 6 findings",
        *(
            f"  - model.language_model.layers.*.mlp.{what} that no site of qwen3_vl_moe.toml "
            "claims (2 layers: 0-1)"
            for what in (
                "experts.gate_up_proj: 4 x 64 x 64 parameter of Qwen3VLMoeTextExperts",
                "experts.down_proj: 4 x 64 x 32 parameter of Qwen3VLMoeTextExperts",
                "gate: Qwen3VLMoeTextTopKRouter",
            )
        ),
    ]
    assert "add a site for each unclaimed parameter" in str(error.remedy)
    assert "left_alone" in str(error.remedy)


def test_the_plan_tells_what_is_left_alone_and_why(describe: Callable[..., Path]):
    reasons = {
        "model.visual*": "full precision",
        "*.experts": "experts keep their precision",
        "*.mlp.gate": "a router of few rows",
    }
    folder = describe("qwen3_vl_moe", left_alone=reasons)
    bound = bind(folder, headers_required=False)
    plan = make_plan(
        load_recipe({"rules": [{"match": {"role": "attn"}, "weights": "int4-g32"}]}), bound
    )
    told = json.loads(json.dumps(plan.to_dict()))["left_alone"]
    experts = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    assert [experts, "experts keep their precision"] in told
    assert ["model.visual.blocks.0.attn.qkv", "full precision"] in told
    assert {name for name, _ in told}.isdisjoint(site.name for site in bound.sites)
    model = empty_model(bound.config, bound.arch)
    assert model.config.text_config._experts_implementation == "eager"


def test_every_matrix_of_a_supported_family_has_a_place(tiny_folder: Path):
    bound = bind(tiny_folder)
    placed = {site.name for site in bound.sites} | {item.name for item in bound.left_alone}
    for name, shape in bound.shapes.items():
        if len(shape) > 1:
            assert name.removesuffix(".weight") in placed


# ------------------------------------------------------------------------------------------- norms


def test_an_edge_at_a_norm_of_gemma_3_knows_that_it_multiplies_by_one_more(
    describe: Callable[..., Path],
):
    bound = bind(describe("gemma3"), headers_required=False)
    assert [edge.from_one for edge in bound.edges] == [True, True]


def test_an_edge_at_a_norm_whose_output_does_not_scale_with_its_weight_is_refused(
    describe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(NormProbe, "behaviour", lambda *_: None)
    error = _refusal(describe("gemma3"))
    (line,) = error.what.splitlines()[1:]
    assert line == (
        "  - model.language_model.layers.*.input_layernorm: an edge starts at this Gemma3RMSNorm, "
        "but its output does not scale with its weight (2 layers: 0-1)"
    )
    assert "leave this edge" in str(error.remedy)
    assert "gemma3.toml" in str(error.remedy)


def test_without_its_edges_gemma_3_binds_and_its_bare_projection_is_told(
    describe: Callable[..., Path],
):
    arch = load_arch(Path(__file__).parent / "archs" / "gemma3.toml")
    towers = tuple(dataclasses.replace(tower, edges=()) for tower in arch.towers)
    bound = bind(describe("gemma3", towers=towers), headers_required=False)
    assert bound.edges == ()
    projection = "model.multi_modal_projector.mm_input_projection_weight"
    reason = "one bare matrix, which no layer holds"
    assert LeftAlone(projection, reason, is_linear=False) in bound.left_alone


class _Renamed(nn.Module):
    """A norm whose class is not called one, with or without an inner float32."""

    def __init__(self, width: int, *, offset: float = 0.0, power: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device="meta"))
        self.offset, self.power = offset, power

    def extra_repr(self) -> str:
        return f"{self.offset}, {self.power}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * x.float().pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        return (normed * (self.offset + self.weight) ** self.power).to(x.dtype)


class FalseRMSNorm(nn.Linear):
    """No norm, whatever its name says."""


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(64, device="meta"), NormBehaviour("weight", centred=True)),
        (nn.LayerNorm(64, bias=False, device="meta"), NormBehaviour("weight", centred=True)),
        (nn.RMSNorm(64, device="meta"), NormBehaviour("weight", centred=False)),
        (_Renamed(64), NormBehaviour("weight", centred=False)),
        (_Renamed(64, offset=1.0), NormBehaviour("1 + weight", centred=False)),
        (_Renamed(64, power=2), None),
        (_Renamed(64, offset=0.5), None),
        (nn.BatchNorm1d(64, device="meta"), None),
        (FalseRMSNorm(64, 64, device="meta"), None),
        (nn.Identity(), None),
        (None, None),
    ],
)
def test_a_norm_is_known_by_what_it_computes(
    module: nn.Module | None, expected: NormBehaviour | None
):
    assert NormProbe().behaviour(module) == expected


def test_norms_of_transformers_are_told_apart():
    """Those that multiply by one plus their weight, and one that is gated."""
    import_transformers()
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, Qwen3_5RMSNormGated

    probe = NormProbe()
    assert probe.behaviour(Qwen2RMSNorm(64)) == NormBehaviour("weight", centred=False)
    assert probe.behaviour(Gemma3RMSNorm(64)) == NormBehaviour("1 + weight", centred=False)
    assert probe.behaviour(Qwen3_5RMSNorm(64)) == NormBehaviour("1 + weight", centred=False)
    assert probe.behaviour(Qwen3_5RMSNormGated(64)) == NormBehaviour("weight", centred=None)
