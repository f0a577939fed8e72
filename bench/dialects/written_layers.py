"""Formats that a tool gives each layer by recipes that were written for it.

    python -m bench.dialects.written_layers FOLDER OUT.json

Runs in the environment of llm-compressor (for ``.yaml``) or of ModelOpt (for ``.py``), on the files
of `bench.dialects.written_recipes`. A layer is a matrix of zeros with its name.
"""

from __future__ import annotations

import ast
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.peers import worker

LAYERS = (
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.11.self_attn.o_proj",
    "model.language_model.layers.0.mlp.up_proj",
    "model.language_model.layers.1.mlp.gate_proj",
    "model.language_model.layers.1.self_attn.v_proj",
    "model.language_model.layers.10.mlp.down_proj",
    "model.visual.blocks.0.attn.qkv",
    "model.visual.blocks.3.mlp.linear_fc2",
    "model.visual.merger.linear_fc1",
    "model.visual.deepstack_merger_list.2.linear_fc2",
    "model.vision_model.encoder.layers.0.self_attn.q_proj",
    "model.vision_model.encoder.layers.4.mlp.fc2",
    "model.projector.readout.2",
)
ARGUMENTS = {
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"),
    "scale_dtype",
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


def of_llm_compressor(file: Path) -> dict[str, list[Any]]:
    """Weights and inputs of each layer, as arguments of compressed-tensors."""
    from llmcompressor.modifiers.quantization import QuantizationMixin
    from llmcompressor.recipe import Recipe

    model = tree()
    for modifier in Recipe.create_instance(str(file)).modifiers:
        if isinstance(modifier, QuantizationMixin):
            modifier.initialize_quantization(model)
    found: dict[str, list[Any]] = {}
    for name in LAYERS:
        scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
        sides = [None, None] if scheme is None else [scheme.weights, scheme.input_activations]
        found[name] = [
            None if one is None else one.model_dump(mode="json", include=ARGUMENTS) for one in sides
        ]
    return found


def of_modelopt(file: Path) -> dict[str, list[Any]]:
    """Weights and inputs of each layer, as attributes of its quantizers."""
    from modelopt.torch.quantization.config import QuantizeConfig
    from modelopt.torch.quantization.conversion import replace_quant_module, set_quantizer_by_cfg

    from bench.dialects.modelopt_quantizers import told

    [statement] = ast.parse(file.read_text(encoding="utf-8")).body
    config = QuantizeConfig(**ast.literal_eval(statement.value))  # type: ignore[attr-defined]
    model = tree()
    replace_quant_module(model)
    set_quantizer_by_cfg(model, config.quant_cfg)
    kinds = ("weight_quantizer", "input_quantizer")
    return {
        name: [told(getattr(model.get_submodule(name), kind)) for kind in kinds] for name in LAYERS
    }


def main() -> None:
    """Write what every layer gets by every recipe."""
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    tool = "modelopt" if find_spec("modelopt") else "llm-compressor"
    apply, suffix = (of_modelopt, "py") if tool == "modelopt" else (of_llm_compressor, "yaml")
    package = {"modelopt": "nvidia-modelopt", "llm-compressor": "llmcompressor"}[tool]
    files = sorted(Path(sys.argv[1]).glob(f"*.{suffix}"))
    found = {"tool": f"{tool} {version(package)}", "layers": {f.stem: apply(f) for f in files}}
    with open(sys.argv[2], "w", encoding="utf-8") as out:
        json.dump(found, out, separators=(",", ":"))
        out.write("\n")


if __name__ == "__main__":
    main()
