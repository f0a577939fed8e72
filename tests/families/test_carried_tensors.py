"""Tensors that no class of transformers has are carried over bit for bit, and everybody is told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

import prismquant as pq
from prismquant.api import export
from prismquant.check import check
from prismquant.models.bind import bind
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DRAFTS = {"mtp.fc.weight", "mtp.norm.weight"}
RULES = [{"match": {"role": "mlp"}, "weights": "int8-g32", "solver": "rtn"}]


def test_a_run_copies_them_and_says_so(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = tiny("qwen3_5"), tmp_path / "out"
    assert bind(folder).carried.keys() == DRAFTS
    result = pq.quantize(folder, {"rules": RULES}, out)
    source, copy = ShardReader(folder), ShardReader(out)
    for name in DRAFTS:
        assert torch.equal(source.read(name), copy.read(name))
    (said,) = [line for line in result.plan.remarks if "mtp." in line]
    assert said.startswith("mtp.fc.weight, mtp.norm.weight are no part of the model")
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "mtp.fc" in written["ignore"]
    told = {finding.rule for finding in check(out, "vllm").findings}
    assert not told & {"tensors.unknown", "names.ignore"}


@pytest.mark.parametrize("format", ["dense", "gptq"])
def test_an_export_has_them_too(tiny: Callable[..., Path], tmp_path: Path, format: str) -> None:
    folder, out = tiny("qwen3_5", dtype=torch.bfloat16), tmp_path / "out"
    rules = [{"match": {"modality": "llm"}, "weights": "int8-g32", "solver": "rtn"}]
    pq.quantize(folder, {"rules": rules}, out)
    export(out, format, tmp_path / "export")
    source, copy = ShardReader(folder), ShardReader(tmp_path / "export")
    assert all(torch.equal(source.read(name), copy.read(name)) for name in DRAFTS)


@pytest.mark.parametrize("residual", [True, False])
def test_a_rotated_stream_no_longer_fits_them(
    tiny: Callable[..., Path], tmp_path: Path, residual: bool
) -> None:
    options = {"residual": residual}
    rotation = {"name": "rotation", "match": {"modality": "llm"}, "options": options}
    plan = pq.inspect(tiny("qwen3_5"), {"rules": RULES, "transforms": [rotation]})
    said = [line for line in plan.remarks if "tokens that they draft" in line]
    assert len(said) == residual
    (gated,) = [line for line in plan.remarks if "a gate multiplies it" in line]
    assert gated.startswith("model.language_model.layers.1.self_attn.o_proj: its input is not")
