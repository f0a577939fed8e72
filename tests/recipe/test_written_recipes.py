"""Recipes written for other tools give each layer, in the tool itself, what they say here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from prismquant.recipe.exporters.written_scope import ANY_DEPTH, family_scope
from prismquant.recipe.layer_config import LayerConfig
from prismquant.recipe.resolve import resolve
from prismquant.recipe.schema import Recipe, parse_recipe

if TYPE_CHECKING:
    from prismquant.formats.spec import NumberSpec

recipes = pytest.importorskip(
    "bench.dialects.written_recipes", reason="runs in the source tree only"
)

GOLDEN = Path(__file__).parent.parent / "golden"
LAYERS = {layer.name: layer for layer in family_scope(ANY_DEPTH).layers}

# Bits, axis, type and block sizes of ModelOpt's quantizers. Blocks of E4M3 or E8M0 scales are
# dynamic there, whether of weights or of inputs.
_NVFP4 = [[2, 1], None, "static", {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}]
_MXFP8 = [[4, 3], None, "static", {"-1": 32, "type": "dynamic", "scale_bits": [8, 0]}]
QUANTIZERS: dict[str, Any] = {
    "int4-g128-narrow": [4, None, "static", {"-1": 128, "type": "static"}],
    "int8-channel-narrow": [8, 0, "static", None],
    "int8-token-narrow": [8, None, "dynamic", {"-1": None}],
    "fp8-channel": [[4, 3], 0, "static", None],
    "fp8-token": [[4, 3], None, "dynamic", {"-1": None}],
    "fp8-tensor": [[4, 3], None, "static", None],
    "fp8-b128": [[4, 3], None, "static", {"-1": 128, "-2": 128, "type": "static"}],
    "nvfp4": _NVFP4,
    "nvfp4-dyn": _NVFP4,
    "mxfp4-ceil": [[2, 1], *_MXFP8[1:]],
    "mxfp8-ceil": _MXFP8,
    "mxfp8-ceil-dyn": _MXFP8,
}


def golden(dialect: str) -> dict[str, dict[str, list[Any]]]:
    """Formats by recipe and layer, as the tool told them."""
    text = (GOLDEN / f"written-layers-{dialect}.json").read_text(encoding="utf-8")
    layers: dict[str, dict[str, list[Any]]] = json.loads(text)["layers"]
    return layers


def recipe(name: str) -> Recipe:
    rules = [rule | {"optional": True} for rule in recipes.RECIPES[name]]
    return parse_recipe({"rules": rules}, source=name)


def config(of: Recipe, name: str) -> LayerConfig:
    layer = LAYERS[name]
    return resolve(of, modality=layer.modality, role=layer.role, name=name).config


def arguments(spec: NumberSpec | None) -> dict[str, Any] | None:
    """A format in the words of compressed-tensors."""
    if spec is None:
        return None
    nested = spec.scale == "e4m3"
    return {
        "num_bits": spec.bits,
        "type": "int" if spec.kind == "int" else "float",
        "symmetric": spec.symmetric,
        "strategy": "tensor_group" if nested else spec.granularity.value,
        "group_size": spec.group_size if spec.granularity == "group" else None,
        "block_structure": spec.block_structure and list(spec.block_structure),
        "dynamic": "local" if nested and spec.dynamic else spec.dynamic,
        "scale_dtype": "torch.uint8" if spec.scale.startswith("e8m0") else None,
    }


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_layer_gets_its_format_in_llm_compressor(name: str) -> None:
    for layer, told in golden("llm-compressor")[name].items():
        own = config(recipe(name), layer)
        assert told == [arguments(own.weights), arguments(own.activations)], layer


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_layer_gets_its_format_in_modelopt(name: str) -> None:
    for layer, told in golden("modelopt")[name].items():
        own = config(recipe(name), layer)
        wanted = [spec and QUANTIZERS[spec.name] for spec in (own.weights, own.activations)]
        assert told == wanted, layer


def test_every_recipe_was_tried_in_both_tools_on_layers_of_many_families() -> None:
    for dialect in recipes.SUFFIXES:
        found = golden(dialect)
        assert found.keys() == recipes.RECIPES.keys()
        assert all(set(layers) <= set(LAYERS) and len(layers) > 10 for layers in found.values())
