"""Quantizers of ModelOpt's named configurations, layer by layer, as ModelOpt itself sets them.

    python bench/dialects/modelopt_quantizers.py OUT.json

Runs in ModelOpt's own environment. Layers have the names of a Qwen3-VL;
`tests/recipe/test_modelopt.py` compares them with what our importer makes of the same.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.opt.config_loader import load_config
from modelopt.torch.quantization.conversion import replace_quant_module, set_quantizer_by_cfg

LAYERS = (
    "lm_head",
    "model.visual.blocks.0.mlp.linear_fc1",
    "model.visual.merger.linear_fc1",
    "model.language_model.layers.0.self_attn.q_proj",
    "model.language_model.layers.0.self_attn.o_proj",
    "model.language_model.layers.0.mlp.up_proj",
    "model.language_model.layers.1.mlp.down_proj",
)
# Orders, toggles and globs that no named configuration has.
OWN = {
    "glob in the middle": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*layers.[1-9].*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}},
        {"quantizer_name": "*up_proj.w?ight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*_proj*", "enable": False},
        {"quantizer_name": "*down_proj*", "cfg": {"num_bits": (4, 3), "axis": None}},
    ],
    "off and on again": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}},
        {"quantizer_name": "*mlp*", "enable": False},
        {"quantizer_name": "*up_proj.weight_quantizer", "enable": True},
    ],
    "nothing off first": [
        {"quantizer_name": "*mlp*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}},
        {"quantizer_name": "*lm_head*", "enable": False},
    ],
}


def tree() -> torch.nn.Module:
    """A model of linear layers alone."""
    root = torch.nn.Module()
    for name in LAYERS:
        *parents, leaf = name.split(".")
        at = root
        for parent in parents:
            if not hasattr(at, parent):
                setattr(at, parent, torch.nn.Module())
            at = getattr(at, parent)
        setattr(at, leaf, torch.nn.Linear(128, 128))
    return root


def told(quantizer: Any) -> list[object] | None:
    """Bits, axis, type and block sizes of a quantizer; None where it is off."""
    if isinstance(quantizer, torch.nn.Sequential):
        return [told(one) for one in quantizer]
    if not quantizer.is_enabled:
        return None
    blocks = quantizer.block_sizes
    return [
        quantizer.num_bits,
        quantizer.axis,
        "dynamic" if getattr(quantizer, "_dynamic", False) else "static",
        {str(key): value for key, value in blocks.items()} if blocks else None,
    ]


def parts() -> dict[str, object]:
    """Parts that recipe files import, resolved; of whole configurations the paths alone."""
    folder = Path(str(files("modelopt_recipes")))
    found: dict[str, object] = {}
    for file in sorted(folder.glob("configs/**/*.yaml")):
        path = str(file.relative_to(folder)).removesuffix(".yaml")
        if "diffusers" not in path:
            found[path] = None if "presets/model" in path else load_config(path)
    return found


def given(value: Any) -> Any:
    """A configuration as JSON types, without what it leaves at its default."""
    return value.model_dump(exclude_unset=True)


def main() -> None:
    """Write the quantizers of all configurations."""
    warnings.filterwarnings("ignore")
    named = {
        name: getattr(mtq, name)["quant_cfg"] for name in sorted(dir(mtq)) if name.endswith("_CFG")
    }
    found = {}
    for name, entries in (named | OWN).items():
        if "KV" in name:
            continue
        model = tree()
        replace_quant_module(model)
        set_quantizer_by_cfg(model, mtq.config.normalize_quant_cfg_list(entries))
        found[name] = {
            layer: [
                told(getattr(model.get_submodule(layer), kind))
                for kind in ("weight_quantizer", "input_quantizer")
            ]
            for layer in LAYERS
        }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        content = {"own": OWN, "quantizers": found, "parts": parts()}
        json.dump(content, file, separators=(",", ":"), default=given)
        file.write("\n")


if __name__ == "__main__":
    main()
