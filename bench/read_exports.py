"""GPTQModel reads exported GPTQ and AWQ checkpoints; for an environment of its own.

    prismquant export RUN --format dense --out DENSE
    prismquant export RUN --format gptq --out GPTQ
    python -m venv peer && peer/bin/pip install gptqmodel==7.6.0 transformers==5.23.0
    peer/bin/python -m bench.read_exports DENSE GPTQ [AWQ ..]

One JSON line a checkpoint: how many quantized layers GPTQModel found, of which classes, and the
largest difference of a weight from the dense export's, relative to the layer's largest. Both are
rounded to bfloat16 once, from the same product: 0 is expected. GPTQModel looks at the language
model only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.peers import worker


def main() -> int:
    """Compare every checkpoint with the dense one; 1 if any differs or cannot be loaded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("exports", type=Path, nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    from transformers import AutoModelForImageTextToText

    dense = AutoModelForImageTextToText.from_pretrained(options.dense, dtype=torch.bfloat16)
    failed = False
    for folder in options.exports:
        try:
            found = compared(folder, dense)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        failed |= found.get("worst", 1.0) != 0 or not found["layers"]
        print(json.dumps({"folder": str(folder), **found}), flush=True)
    return int(failed)


def compared(folder: Path, dense: torch.nn.Module) -> dict[str, Any]:
    """What GPTQModel makes of one checkpoint."""
    from gptqmodel import BACKEND, GPTQModel

    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
    loaded = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.bfloat16)
    expected = dict(dense.named_modules())
    worst, classes = 0.0, set()
    layers = 0
    for name, module in loaded.model.named_modules():
        if not hasattr(module, "qweight"):
            continue
        layers += 1
        classes.add(type(module).__name__)
        weight = expected[name].weight.float()
        apart = (dequantized(module, method).float() - weight).abs().max() / weight.abs().max()
        worst = max(worst, float(apart))
    return {"method": method, "layers": layers, "classes": sorted(classes), "worst": worst}


def dequantized(module: Any, method: str) -> torch.Tensor:
    """The weight [out, in] by GPTQModel's own arithmetic."""
    if method == "gptq":
        weight: torch.Tensor = module.dequantize_weight().T
        return weight
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    parts = (module.qweight, module.qzeros, module.scales)
    values: torch.Tensor = dequantize_gemm(*parts, module.bits, module.group_size)
    return values.T


if __name__ == "__main__":
    sys.exit(main())
