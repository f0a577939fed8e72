"""Codes and scales of llm-compressor's own ``oneshot`` on the small Llama of ``tiny_llama``.

    python -m bench.dialects.llm_compressor_codes OUT.json

Runs in llm-compressor's environment; `python -m bench.dialects` compares ours with it.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from bench.dialects import tiny_llama
from bench.dialects.told_codes import checksum, told
from bench.peers import worker

_FOUR = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_W4A8 = {"group_0": {"targets": ["Linear"], "weights": _FOUR, "input_activations": _TOKEN}}
_W2 = {"group_0": {"targets": ["Linear"], "weights": _FOUR | {"num_bits": 2}}}


def _recipe(modifier: str, **keys: Any) -> dict[str, Any]:
    return {"quant_stage": {"quant_modifiers": {modifier: {"ignore": ["lm_head"]} | keys}}}


BFLOAT16 = "of bfloat16"
"""End of the name of a recipe that is run on a checkpoint in bfloat16."""
RECIPES: dict[str, dict[str, Any]] = {
    "rtn W4A16": _recipe("QuantizationModifier", scheme="W4A16"),
    "rtn W4A16_ASYM": _recipe("QuantizationModifier", scheme="W4A16_ASYM"),
    "rtn W8A8": _recipe("QuantizationModifier", scheme="W8A8"),
    "rtn W4A8": _recipe("QuantizationModifier", scheme="W4A8"),
    "rtn W4A8 by channel": _recipe("QuantizationModifier", config_groups=_W4A8),
    "gptq W4A16": _recipe("GPTQModifier", scheme="W4A16"),
    "gptq W4A16, original order": _recipe("GPTQModifier", scheme="W4A16", actorder=None),
    "gptq W4A16_ASYM, weight": _recipe("GPTQModifier", scheme="W4A16_ASYM", actorder="weight"),
    "gptq W8A8": _recipe("GPTQModifier", scheme="W8A8"),
    "gptq W4A8 by channel, small blocks": _recipe(
        "GPTQModifier", config_groups=_W4A8, block_size=64, dampening_frac=0.05
    ),
    "gptq 2 bits by channel": _recipe("GPTQModifier", config_groups=_W2),
    f"rtn W4A16, {BFLOAT16}": _recipe("QuantizationModifier", scheme="W4A16"),
    f"rtn W8A8, {BFLOAT16}": _recipe("QuantizationModifier", scheme="W8A8"),
}
"""Recipes as a user of the tool writes them; in its YAML they are one text each."""


def layer_codes(name: str, module: Any, *, by_row: bool) -> dict[str, Any]:
    """Codes and scales of a module that was quantized, and how it rounds inputs."""
    from compressed_tensors.quantization import forward_quantize, quantize

    args, inputs = module.quantization_scheme.weights, module.quantization_scheme.input_activations
    zero = None if args.symmetric else module.weight_zero_point
    codes = quantize(module.weight, module.weight_scale, zero, args, dtype=torch.float32)
    found = told(codes, module.weight_scale, zero, by_row=by_row)
    if by_row and name == tiny_llama.LAYERS[0]:
        scale = module.weight_scale.float()
        points = codes if zero is None else codes - zero.repeat_interleave(args.group_size, dim=1)
        values = points * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
        found["loss"] = tiny_llama.first_loss(values, module.weight_scale.dtype)
    if inputs is not None and module.in_features == tiny_llama.HIDDEN:
        rounded = forward_quantize(module, tiny_llama.inputs()[None], "input", inputs)[0]
        found["inputs"] = checksum(rounded + 0.0)
    return found


def run(name: str, folder: Path) -> dict[str, Any]:
    """Layers of a checkpoint after ``oneshot``."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    recipe = RECIPES[name]
    dtype = torch.bfloat16 if name.endswith(BFLOAT16) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(tiny_llama.write(folder, dtype))
    ids = tiny_llama.token_ids()
    samples = [{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids]
    data: dict[str, Any] = {}
    solved = "GPTQModifier" in json.dumps(recipe)
    if solved:
        data = {"dataset": Dataset.from_list(samples), "num_calibration_samples": len(samples)}
    oneshot(model=model, recipe=yaml.safe_dump(recipe), **data)
    return {
        layer: layer_codes(
            layer, model.get_submodule(layer), by_row=solved or dtype != torch.float32
        )
        for layer in tiny_llama.LAYERS
    }


def main() -> None:
    """Write what all recipes come to."""
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    with TemporaryDirectory() as temporary:
        found = {
            name: {"recipe": recipe, "layers": run(name, Path(temporary) / str(number))}
            for number, (name, recipe) in enumerate(RECIPES.items())
        }
    tools = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch")}
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump({"versions": tools, "recipes": found}, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
