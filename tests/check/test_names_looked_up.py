"""Layers that vLLM looks up under names of no layer of the model, as in GLM-4.1V's vision tower."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import prismquant as pq
from prismquant.check import check
from prismquant.models.reader_names import VllmNames

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RULES = [{"weights": "int8-g32", "solver": "rtn", "match": {"modality": ["vision", "projector"]}}]


def test_a_name_is_made_for_each_part() -> None:
    names = VllmNames((), parts=((".attn.qkv", ".attn.q"), (".attn.qkv", ".attn.v")))
    assert names.looked_up("visual.0.attn.qkv") == ("visual.0.attn.q", "visual.0.attn.v")
    assert names.looked_up("visual.0.attn.proj") == ()


@pytest.fixture
def rounded(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    pq.quantize(tiny("glm4v"), {"rules": RULES}, tmp_path / "out", fallback=True)
    return tmp_path / "out"


def targets_of(folder: Path) -> set[str]:
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {name for group in groups["config_groups"].values() for name in group["targets"]}


def test_a_configuration_has_them_beside_the_layers(rounded: Path) -> None:
    block = "model.visual.blocks.0"
    found = targets_of(rounded)
    assert {f"{block}.attn.qkv", *(f"{block}.attn.{part}_proj" for part in "qkv")} <= found
    assert {f"{block}.mlp.{part}_proj" for part in ("gate", "up", "gate_up")} <= found
    assert "model.visual.merger.gate_up_proj" in found
    assert not [name for name in found if "language_model" in name]


def test_a_checkpoint_without_them_is_refused_for_vllm(rounded: Path) -> None:
    file = rounded / "config.json"
    config = json.loads(file.read_text())
    before = {finding.rule for finding in check(rounded, "vllm").findings}
    for group in config["quantization_config"]["config_groups"].values():
        looked_up = (".q_proj", ".k_proj", ".v_proj", ".gate_up_proj")
        group["targets"] = [name for name in group["targets"] if not name.endswith(looked_up)]
    file.write_text(json.dumps(config))
    report = check(rounded, "vllm")
    told = [f for f in report.findings if f.rule not in before]
    assert not report.ok
    assert any("attn.qkv" in str(finding.where) for finding in told)
