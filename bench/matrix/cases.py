"""What is quantized: every number format once alone, and with inputs that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from prismquant.formats.kv_formats import KV_PRESETS
from prismquant.formats.spec import PRESETS as FORMATS
from prismquant.formats.spec import spec
from prismquant.recipe.presets import PRESETS as RECIPES
from prismquant.recipe.schema import Recipe, load_recipe

LLM = {"modality": "llm", "role": ["attn", "mlp"]}
# How codes are chosen does not matter to a reader.
QUICK = {"solver": "rtn", "tuner": "none", "weight_range": "minmax"}

# Inputs -> the weights that servers, or a recipe of ours, put beside them.
PARTNERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "int4-token": ("int4-channel",),
        "int4-token-asym": ("int4-channel",),
        "int8-token": ("int8-channel", "int8-tensor", "int4-channel", "int4-g128"),
        "int8-token-asym": ("int8-channel",),
        "int8-tensor": ("int8-channel", "int8-tensor", "int4-channel"),
        "int8-tensor-asym": ("int8-channel", "int4-g128-asym"),
        "int8-tensor-dyn": ("int8-channel",),
        "fp8-token": ("fp8-channel", "fp8-tensor", "int4-g128", "int4-channel"),
        "fp8-tensor": ("fp8-channel", "fp8-tensor", "int4-g128"),
        "fp8-tensor-dyn": ("fp8-tensor",),
        "fp8-g128-dyn": ("fp8-b128",),
        "fp8-e5m2-token": ("fp8-e5m2-channel",),
        "fp8-e5m2-tensor": ("fp8-e5m2-tensor",),
        "fp4-token": ("fp4-channel",),
        "fp4-g16-dyn": ("fp4-g16",),
        "fp4-g32-dyn": ("fp4-g32",),
        "nvfp4-dyn": ("nvfp4",),
        "mxfp4-dyn": ("mxfp4",),
        "mxfp4-floor-dyn": ("mxfp4-floor",),
        "mxfp4-ceil-dyn": ("mxfp4-ceil",),
        "mxfp6-dyn": ("mxfp6",),
        "mxfp6-e3m2-dyn": ("mxfp6-e3m2",),
        "mxfp8-dyn": ("mxfp8", "mxfp4"),
        "mxfp8-ceil-dyn": ("mxfp8",),
        "mxfp8-e5m2-dyn": ("mxfp8-e5m2",),
        "mxint8-dyn": ("mxint8",),
    }
)
# Recipes of the whole model: vision tower, patch embedding and projector too.
WHOLE = (
    *("w8a8-all", "w8a8-static-all", "w4a16-all", "w4a8-all", "fp8-all"),
    *("nvfp4-all", "mxfp4-all", "mxfp8-all"),
)


@dataclass(frozen=True)
class Case:
    """One recipe.

    Attributes:
        name: What the table calls it.
        group: Under which title: ``weights``, ``inputs``, ``cache`` or ``whole``.
        fields: What the recipe says.
    """

    name: str
    group: str
    fields: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return self.name.replace(" + ", "_").replace(" ", "-")

    def recipe(self) -> Recipe:
        """The recipe, its codes rounded to nearest."""
        return load_recipe(dict(self.fields)).with_rules(QUICK)


def cases() -> tuple[Case, ...]:
    """All of them, in the order of the table."""
    weights = [name for name, number in FORMATS.items() if not number.dynamic]
    alone = [Case(name, "weights", _rules(name)) for name in weights]
    pairs = [
        Case(f"{weight} + {name}", "inputs", _rules(weight, activations=name))
        for name, partners in PARTNERS.items()
        for weight in partners
    ]
    caches = [
        Case(f"int4-g128 + cache {name}", "cache", _rules("int4-g128") | {"kv_cache": name})
        for name in KV_PRESETS
    ]
    # Their transforms change weights, which are to be compared with the source's.
    whole = [Case(name, "whole", {"rules": RECIPES[name]["rules"]}) for name in WHOLE]
    return (*alone, *pairs, *caches, *whole)


def input_formats() -> tuple[str, ...]:
    """All formats that only inputs have, and those of weights that inputs have as well."""
    static = [name for name, n in FORMATS.items() if not n.dynamic and name.count("-tensor")]
    return (*(name for name, n in FORMATS.items() if n.dynamic), *static)


def _rules(weights: str, **fields: Any) -> dict[str, Any]:
    return {"rules": [{"match": LLM, "weights": spec(weights).name} | fields]}
