"""Analysis and search of models of text alone, on running text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import prismquant as pq

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORDS = ("red", "green", "blue", "what", "is", "it", "the", "colour", "of", "\n", "?")
FORMATS = "int4-g32,int8-channel"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Some ninety tokens."""
    draw = torch.randint(len(WORDS), (90,), generator=torch.Generator().manual_seed(3))
    file = tmp_path / "book.txt"
    file.write_text(" ".join(WORDS[index] for index in draw))
    return file


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_loss_is_the_divergence_of_the_model_with_that_unit_quantized(
    tiny: Callable[..., Path], family: str, book: Path, tmp_path: Path
) -> None:
    """As `quantize` writes it and `eval` measures it, over the same windows."""
    folder = tiny(family)
    found = pq.analyze(
        folder, FORMATS, tmp_path / "s.json", book, method="kl_div", solver="rtn", seq_length=16
    )
    units = {unit.name: unit for unit in found.units}
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        rule = {
            "match": {"name": name},
            "weights": "int4-g32",
            "solver": "rtn",
            "weight_range": "mse",
        }
        out = tmp_path / name
        pq.quantize(folder, {"rules": [rule]}, out)
        measured = pq.measure(out, book, reference=folder, seq_length=16)
        scores = next(o.scores for o in units[name].options if o.format == "int4-g32")
        assert scores.keys() == {"answer"}
        expected = measured.overall.divergence["answer"].kl
        assert scores["answer"].loss == pytest.approx(expected, rel=1e-3)


def test_bounded_logits_are_told(tiny: Callable[..., Path], book: Path, tmp_path: Path) -> None:
    """Gemma 2 bounds its logits; what is scored is what the head puts out."""
    given = {"method": "output", "solver": "rtn", "seq_length": 16}
    for family, told in (("gemma2", True), ("gemma3_text", False), ("qwen2", False)):
        found = pq.analyze(tiny(family), FORMATS, tmp_path / f"{family}.json", book, **given)
        assert any("bounds what its head puts out" in note for note in found.notes) == told


@pytest.mark.parametrize("method", ["fisher", "gradient", "output", "weight"])
def test_every_method_scores_a_model_of_text_and_a_mix_is_found(
    tiny: Callable[..., Path], method: str, book: Path, tmp_path: Path
) -> None:
    folder, out = tiny("llama"), tmp_path / "s.json"
    found = pq.analyze(folder, FORMATS, out, book, method=method, seq_length=16)
    assert not [note for note in found.notes if "picture" in note or "clip" in note]
    assert len(found.units) == 9
    mix = pq.find_mix(out, out=tmp_path / "mix.yaml", bits=7.5)
    assert mix.text == (tmp_path / "mix.yaml").read_text()
    result = pq.quantize(folder, tmp_path / "mix.yaml", tmp_path / "out", book, seq_length=16)
    assert {row.config.weights.bits for row in result.plan.quantized} == {4, 8}
