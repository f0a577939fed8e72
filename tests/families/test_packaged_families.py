"""Families by their names: the file is right, and a model goes through the whole pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny_families
import tiny_vlm
import torch
from known_failures import inputs_scaled_per_token, packed_towers_loaded
from sample_logits import sample_logits

import prismquant as pq
from prismquant.check import check
from prismquant.export.load_quantized import load_model
from prismquant.families.check_family import check_family
from prismquant.models.arch import Modality
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


FAMILIES = tiny_families.params(*tiny_families.FAMILIES, *tiny_families.SPARSE)


def kinds_of(folder: Path) -> tuple[str, ...]:
    """Kinds of samples that a model takes."""
    sees_clips = getattr(load_processor(folder), "video_processor", None) is not None
    return ("text", "image", *["video"] * sees_clips)


@pytest.fixture
def pictures(family: str, tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """Texts, pictures and, where the family takes them, clips."""
    return tiny_vlm.samples(tmp_path / "data", kinds_of(tiny(family)), count=6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_right(family: str, tiny: Callable[..., Path]) -> None:
    found = check_family(tiny(family))
    lacking = ("further patterns of left_alone", "every layer is in some block")
    others = bind(tiny(family)).arch.in_some_models
    claims = [c for c in found.claims if not (others and c.what.startswith(lacking))]
    assert [claim for claim in claims if claim.holds is not True] == []
    assert found.blocks == tiny_families.blocks_of(family)


@pytest.mark.parametrize("preset", ["w4a16-all", "w8a8-all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_logits_of_our_simulation(
    family: str, preset: str, tiny: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    """Of all towers; no row of the plan is left without a reason, and vLLM refuses nothing.

    A tower that vLLM builds in floating point, and experts that transformers does not read, are
    told.
    """
    folder, out = tiny(family), tmp_path / "out"
    result = pq.quantize(folder, preset, out, pictures, fallback=True)
    towers = {row.site.modality for row in result.plan.quantized}
    assert towers == {site.modality for site in bind(folder).sites}
    assert {Modality.VISION, Modality.LLM} <= towers
    report = check(out, "vllm" if bind(folder).arch.vllm else "transformers")
    assert {finding.rule for finding in report.errors} <= {"vllm.unquantized"}, report.findings
    actual = sample_logits(load_model(out), folder, pictures)
    full = sample_logits(load_float(folder), folder, pictures)
    assert 1e-3 < (actual - full).abs().max() < full.abs().max()
    if "transformers.experts" in {finding.rule for finding in check(out, "transformers").findings}:
        return
    kind = getattr(import_transformers(), bind(folder).arch.hf_class)
    with packed_towers_loaded():
        theirs = kind.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
    with inputs_scaled_per_token():
        torch.testing.assert_close(
            actual, sample_logits(theirs, folder, pictures), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_lost_is_measured(
    family: str, tiny: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pq.quantize(tiny(family), "w8a16", out, pictures)
    found = pq.measure(out, pictures, reference=tiny(family))
    assert found.overall.divergence["answer"].kl < 0.1
    assert set(found.by_kind) == set(kinds_of(tiny(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_keep_the_function(
    family: str, tiny: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    folder, out = tiny(family), tmp_path / "out"
    rules = [{"match": {"role": "mlp.down"}, "weights": "int8-g32", "solver": "rtn"}]
    # A stream into which only normalized outputs are added is not rotated.
    residual = any(stream.modality is Modality.LLM for stream in bind(folder).streams)
    rotation = {"name": "rotation", "match": {"modality": "llm"}, "options": {"residual": residual}}
    rotated = {"rules": rules, "transforms": [rotation]}
    pq.quantize(folder, rotated, out)
    actual, full = (
        sample_logits(m, folder, pictures) for m in (load_model(out), load_float(folder))
    )
    # Of all: a token that was about to take one expert may take another.
    assert (actual - full).norm() < 0.2 * full.norm()
