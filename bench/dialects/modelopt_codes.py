"""Codes and scales of ModelOpt's fake quantization on the small Llama of ``tiny_llama``.

    python -m bench.dialects.modelopt_codes OUT.json

Runs in ModelOpt's own environment; `python -m bench.dialects` compares ours with it. Codes are what
the tool's own quantizers give, divided by its scales.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bench.dialects import tiny_llama
from bench.dialects.told_codes import checksum, told
from bench.peers import worker

_OFF = {"quantizer_name": "*", "enable": False}
_HEAD = {"quantizer_name": "*lm_head*", "enable": False}
_TOKEN = {"num_bits": 8, "type": "dynamic", "block_sizes": {"-1": None}}


def _config(weights: Any, inputs: Any = None, algorithm: Any = "max") -> dict[str, Any]:
    entries = [_OFF, {"quantizer_name": "*weight_quantizer", "cfg": weights}]
    if inputs:
        entries.append({"quantizer_name": "*input_quantizer", "cfg": inputs})
    return {"quant_cfg": [*entries, _HEAD], "algorithm": algorithm}


_FOUR, _GROUPS = {"num_bits": 4, "axis": 0}, {"num_bits": 4, "block_sizes": {"-1": 128}}
_GPTQ = {"method": "gptq", "perc_damp": 0.01, "block_size": 128}
CONFIGURATIONS: dict[str, dict[str, Any] | str] = {
    "rtn W4A16": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "rtn W8A16": "INT8_WEIGHT_ONLY_CFG",
    "rtn W8A8, static": "INT8_DEFAULT_CFG",
    "rtn W8A8": _config({"num_bits": 8, "axis": 0}, _TOKEN),
    "rtn W4A8": _config(_FOUR, _TOKEN),
    "rtn W4A8 in groups": _config(_GROUPS, _TOKEN),
    "gptq W4A16": _config(_GROUPS, algorithm=_GPTQ),
    "gptq W4A16 by channel": _config(_FOUR, algorithm=_GPTQ),
    "gptq W4A8": _config(_FOUR, _TOKEN, _GPTQ),
}
"""Configurations as JSON has them; a text is the name of one of the tool's own."""


def layer_codes(name: str, module: Any, *, solved: bool) -> dict[str, Any]:
    """Codes and scales of a layer, and how it rounds inputs."""
    quantizer, inputs = module.weight_quantizer, module.input_quantizer
    most = 2 ** (quantizer.num_bits - 1) - 1
    scale = quantizer.amax.to(torch.float32).reshape(module.out_features, -1) / most
    rounded = quantizer(module.weight)
    found = told(_codes(rounded, scale), scale, by_row=solved)
    if solved and name == tiny_llama.LAYERS[0]:
        found["loss"] = tiny_llama.first_loss(rounded)
    if not inputs.is_enabled:
        return found
    most = 2 ** (inputs.num_bits - 1) - 1
    if inputs.amax is not None:
        found["input scale"] = float(inputs.amax.to(torch.float32) / most)
    elif module.in_features == tiny_llama.HIDDEN:
        given = tiny_llama.inputs()
        own = given.abs().amax(-1, keepdim=True) / most
        found["inputs"] = checksum(_codes(inputs(given[None])[0], own) * own + 0.0)
    return found


def _codes(values: Tensor, scale: Tensor) -> Tensor:
    """Whole numbers that values stand for; what is not near one is an error."""
    points = values / scale.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)
    if (points - points.round()).abs().max() > 1e-3:
        raise ValueError("the values are no codes of these scales")
    return points.round()


def run(given: dict[str, Any] | str, folder: Path) -> dict[str, Any]:
    """Layers of a checkpoint after ``mtq.quantize``."""
    import modelopt.torch.quantization as mtq
    from transformers import AutoModelForCausalLM

    def forward_loop(model: torch.nn.Module) -> None:
        for window in tiny_llama.token_ids():
            model(torch.tensor([window]))

    solved = "gptq" in json.dumps(given)
    config = getattr(mtq, given) if isinstance(given, str) else with_numbers(given)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        mtq.quantize(model, config, forward_loop)
        return {
            name: layer_codes(name, model.get_submodule(name), solved=solved)
            for name in tiny_llama.LAYERS
        }


def with_numbers(value: Any) -> Any:
    """The keys of ``block_sizes`` as the numbers that JSON cannot hold."""
    if isinstance(value, list):
        return [with_numbers(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        int(key) if key.lstrip("-").isdigit() else key: with_numbers(one)
        for key, one in value.items()
    }


def main() -> None:
    """Write what all configurations come to."""
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    with TemporaryDirectory() as temporary:
        folder = tiny_llama.write(Path(temporary))
        found = {
            name: {"recipe": given, "layers": run(given, folder)}
            for name, given in CONFIGURATIONS.items()
        }
    tools = {name: version(name) for name in ("nvidia-modelopt", "torch")}
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump({"versions": tools, "recipes": found}, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
