"""Recipes of every dialect on models of text alone, and told apart from one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny_text

import prismquant as pq
from prismquant.recipe.importers.import_recipe import dialect_names, import_recipe
from prismquant.recipe.importers.known_dialects import DIALECTS

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES: dict[str, Any] = {
    "llm-compressor": {
        "quant_stage": {
            "quant_modifiers": {"QuantizationModifier": {"scheme": "W8A8", "ignore": ["lm_head"]}}
        }
    },
    "mi-optimize": {
        "quant_config": {
            "algo": "rtn",
            "kwargs": {"w_dtype": "int4", "a_dtype": "float16", "w_qtype": "per_channel"},
        }
    },
    "mquant": "--quant --quant_llm --llm_w_rtn --llm_w_bits 4",
    "modelopt": "INT8_WEIGHT_ONLY_CFG",
}


def test_there_is_an_example_of_every_dialect() -> None:
    assert {*EXAMPLES, "prismquant"} == set(dialect_names())


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_is_recognized_by_its_own_dialect_alone(name: str) -> None:
    recognized = [one.name for one in DIALECTS if one.recognizes(EXAMPLES[name])]
    assert recognized == [name]
    assert import_recipe(EXAMPLES[name]) == import_recipe(EXAMPLES[name], name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_file_that_is_not_there_is_said_so(name: str) -> None:
    with pytest.raises(pq.PrismQuantError) as caught:
        import_recipe("nowhere.yaml", name)
    said = {"mquant": "nothing would be quantized", "modelopt": "no configuration is called so"}
    assert said.get(name, "no file is called 'nowhere.yaml'") in str(caught.value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_runs_on_a_model_of_text_alone(name: str, tmp_path: Path) -> None:
    model = tiny_text.build("llama", tmp_path / "llama")
    result = pq.quantize(model, EXAMPLES[name], tmp_path / "out")
    assert len(result.plan.quantized) == 2 * 7
    assert result.record.translation is not None
    assert result.record.translation.dialect == name
    assert not result.record.translation.dropped
    assert not result.record.translation.changed
