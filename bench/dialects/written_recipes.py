"""Recipes of ours, written for llm-compressor and ModelOpt.

    python -m bench.dialects.written_recipes FOLDER

`bench.dialects.written_layers` lets each tool apply them; `tests/recipe/test_written_recipes.py`
compares what every layer got with what our recipe says of it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prismquant.recipe.exporters.export_recipe import export_recipe

_LLM = {"modality": "llm", "role": ["attn", "mlp"]}
_TOWER = {"modality": ["vision", "projector"]}
_RTN = {"solver": "rtn", "weight_range": "minmax"}

RECIPES: dict[str, list[dict[str, Any]]] = {
    "two parts, one block left alone": [
        {"match": _LLM, "weights": "int4-g128-narrow", **_RTN},
        {"match": _TOWER, "weights": "int8-channel-narrow", "activations": "int8-token-narrow"},
        {"match": {"role": "patch_embed"}, "activations": "none"},
        {"match": {"name": "*.layers.0.*", "modality": "llm"}, "skip": True},
    ],
    "by role": [
        {"match": _LLM, "weights": "fp8-channel", "activations": "fp8-token", **_RTN},
        {"match": {"role": "mlp.down"}, "weights": "nvfp4", "activations": "nvfp4-dyn"},
        {"match": {"role": "attn.out", "modality": "llm"}, "skip": True},
    ],
    "the head too": [
        {"match": {"modality": "llm"}, "weights": "fp8-tensor", "activations": "fp8-tensor"},
        {"match": {"name": "*.layers.1.mlp.*", "modality": "llm"}, "weights": "fp8-b128"},
        {"match": {"name": "*.layers.1.mlp.*", "modality": "llm"}, "activations": "none"},
    ],
    "powers of two": [
        {"match": {"role": "mlp"}, "weights": "mxfp4-ceil", **_RTN},
        {"match": {"role": "attn"}, "weights": "mxfp8-ceil", "activations": "mxfp8-ceil-dyn"},
    ],
}
"""Rules by the recipe's name."""
SUFFIXES = {"llm-compressor": "yaml", "modelopt": "py"}


def main() -> None:
    """Write every recipe in both dialects."""
    for name, rules in RECIPES.items():
        for dialect, suffix in SUFFIXES.items():
            recipe = {"name": name, "rules": [rule | {"optional": True} for rule in rules]}
            path = Path(sys.argv[1]) / f"{name}.{suffix}"
            path.write_text(export_recipe(recipe, dialect).text, encoding="utf-8")


if __name__ == "__main__":
    main()
