"""What blocks write for later ones beside their output, such as keys and values, is not lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny_vlm

import prismquant as pq
from prismquant.errors import ModelError
from prismquant.families.check_family import check_family
from prismquant.search.format_grammar import formats_on_offer, rule_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny_vlm.samples(tmp_path / "data", ("text", "image"), count=4)


def test_a_score_without_gradients_is_the_divergence_of_the_quantized_model(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """Of a block that others read keys and values of."""
    folder, out = tiny("gemma4_small"), tmp_path / "out"
    name = "model.language_model.layers.0.self_attn"
    layers = [f"{name}.{leaf}_proj" for leaf in "qkv"]
    asked = {"method": "kl_div", "solver": "rtn"}
    found = pq.analyze(folder, "int4-channel", tmp_path / "s.json", data, **asked)
    unit = next(one for one in found.units if layers[1] in {layer.name for layer in one.layers})
    rule = {"match": {"name": [x.name for x in unit.layers]}, "solver": "rtn"}
    choice = formats_on_offer("int4-channel")["int4-channel"]
    pq.quantize(folder, {"rules": [rule | rule_of(choice)]}, out, data)
    wanted = pq.measure(out, data, reference=folder).overall.divergence["answer"].kl
    option = next(one for one in unit.options if one.format == "int4-channel")
    assert option.scores["answer"].loss == pytest.approx(wanted, rel=2e-3)
    assert wanted > 0


def test_a_score_that_needs_gradients_is_refused(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="hands shared_kv_states on to later blocks"):
        pq.analyze(tiny("gemma4_small"), "int4-channel", tmp_path / "s.json", data, method="fisher")


def test_what_only_other_models_of_a_family_have_is_told_and_not_wrong(
    tiny: Callable[..., Path],
) -> None:
    found = check_family(tiny("gemma4"))
    assert not [claim for claim in found.claims if claim.holds is False]
    (told,) = [c.said for c in found.claims if c.what.startswith("further patterns")]
    assert "model.audio_tower.*" in told
