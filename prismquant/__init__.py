"""PrismQuant: post-training quantization of vision-language models, with a setting for each
modality.

    import prismquant as pq

    result = pq.quantize("path/to/model", recipe="w4a8", calibration="calib.jsonl", out="out/")
    model, processor = pq.load("out/")

Importing the package is cheap and inert: no model library is imported, no device is touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prismquant.api import find_mix, inspect, measure, quantize
    from prismquant.errors import PrismQuantError
    from prismquant.export.load_quantized import load
    from prismquant.families.check_family import check_family
    from prismquant.families.draft_family import draft_family
    from prismquant.quantization.request import Result
    from prismquant.recipe.exporters.export_recipe import export_recipe
    from prismquant.recipe.importers.import_recipe import import_recipe
    from prismquant.recipe.schema import Recipe, load_recipe
    from prismquant.search.find_mix import FoundMix
    from prismquant.search.public import analyze
    from prismquant.version import __version__

__all__ = [
    "FoundMix",
    "PrismQuantError",
    "Recipe",
    "Result",
    "__version__",
    "analyze",
    "check_family",
    "draft_family",
    "export_recipe",
    "find_mix",
    "import_recipe",
    "inspect",
    "load",
    "load_recipe",
    "measure",
    "quantize",
]

_HOMES = {
    "__version__": "prismquant.version",
    "PrismQuantError": "prismquant.errors",
    "Recipe": "prismquant.recipe.schema",
    "Result": "prismquant.quantization.request",
    "analyze": "prismquant.search.public",
    "check_family": "prismquant.families.check_family",
    "draft_family": "prismquant.families.draft_family",
    "export_recipe": "prismquant.recipe.exporters.export_recipe",
    "find_mix": "prismquant.api",
    "FoundMix": "prismquant.search.find_mix",
    "import_recipe": "prismquant.recipe.importers.import_recipe",
    "inspect": "prismquant.api",
    "load": "prismquant.export.load_quantized",
    "load_recipe": "prismquant.recipe.schema",
    "measure": "prismquant.api",
    "quantize": "prismquant.api",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: ``prismquant --help`` answers at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'prismquant' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
