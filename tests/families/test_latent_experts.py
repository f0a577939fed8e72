"""DeepSeek-V3: keys and values of a latent vector, dense blocks, experts and a shared one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny_vlm
import torch
from known_failures import inputs_scaled_per_token
from sample_logits import sample_logits

import prismquant as pq
from prismquant.check import check
from prismquant.errors import PlanError
from prismquant.export.load_quantized import load_model
from prismquant.families.check_family import check_family
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILY = "deepseek_v3"
RULE = {"weights": "int8-g32", "solver": "rtn"}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return tiny_vlm.samples(tmp_path / "data", ("text",), count=6)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [64, None])
def test_the_file_is_right(rank: int | None, tiny: Callable[..., Path]) -> None:
    """Queries are made of a latent vector in large models alone."""
    found = check_family(tiny(FAMILY, q_lora_rank=rank))
    assert [claim for claim in found.claims if claim.holds is False] == []
    absent = [claim.said for claim in found.claims if claim.holds is None]
    assert len(absent) == (1 if rank else 2)
    assert all("self_attn.q" in said for said in absent)
    assert found.blocks == {"llm": 2}


@pytest.mark.parametrize("preset", ["w4a16-all", pytest.param("w8a8-all", marks=pytest.mark.slow)])
def test_transformers_gives_the_logits_of_our_simulation(
    preset: str, tiny: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    """Where it reads what was written: of experts, int8 is not."""
    folder, out = tiny(FAMILY), tmp_path / "out"
    result = pq.quantize(folder, preset, out, texts, fallback=True)
    assert [row.site.role for row in result.plan.rows if not row.quantized] == ["lm_head"]
    assert check(out, "vllm").ok
    actual = sample_logits(load_model(out), folder, texts)
    if not check(out, "transformers").ok:
        assert preset == "w8a8-all"
        return
    kind = getattr(import_transformers(), bind(folder).arch.hf_class)
    theirs = kind.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
    with inputs_scaled_per_token():
        torch.testing.assert_close(
            actual, sample_logits(theirs, folder, texts), rtol=1e-3, atol=1e-3
        )


def test_what_servers_join_has_one_format(tiny: Callable[..., Path]) -> None:
    rules = [
        {"match": {"role": "attn.q_a"}, **RULE},
        {"match": {"role": "attn.kv_a"}, **RULE, "weights": "int4-g32"},
    ]
    with pytest.raises(PlanError, match=r"fused by servers.*attn.q_a: int8.*attn.kv_a: int4"):
        pq.inspect(tiny(FAMILY), {"rules": rules})


def test_a_cache_of_latent_vectors_is_not_quantized(tiny: Callable[..., Path]) -> None:
    with pytest.raises(PlanError, match="names no key projections"):
        pq.inspect(tiny(FAMILY), "fp8-kv")


def test_a_router_and_a_block_that_drafts_are_left_alone(tiny: Callable[..., Path]) -> None:
    bound = bind(tiny(FAMILY))
    alone = {item.name: item.reason for item in bound.left_alone}
    assert alone["model.layers.1.mlp.gate"].startswith("router")
    assert bound.arch.ignored_tensors == ("model.layers.61.*",)


def test_all_blocks_may_have_experts(tiny: Callable[..., Path]) -> None:
    """The stream is then written to by what there is."""
    bound = bind(tiny(FAMILY, first_k_dense_replace=0))
    [stream] = bound.streams
    # Four experts in each block, and the shared one.
    assert len([name for name in stream.writers if name.endswith("down_proj")]) == 10
