"""GPTQ by gptqmodel on a language model that sees; for an environment of its own.

    python -m venv peer && peer/bin/pip install gptqmodel==7.6.0 transformers==5.23.0
    peer/bin/python -m bench.peers.gptq_model MODEL CALIBRATION.jsonl OUT [--bits 4]

It reads the conversations itself, pictures included. Its class for a Qwen3.5 without experts takes
texts only, so that one is built as its class for the same model with experts is, which takes
pictures. Experts it takes apart by itself; each sees the tokens that the router sends to it.
"""

from __future__ import annotations

import os

import torch

from bench.peers import worker

METHODS = ("gptq",)


def take_pictures() -> None:
    """Let a Qwen3.5 without experts be calibrated with pictures."""
    from gptqmodel.models import auto
    from gptqmodel.models.definitions.base_qwen3_vl import BaseQwen3VLGPTQ

    name = "qwen3_5"
    known = auto.MODEL_MAP[name]
    kept = ("module_tree", "layer_modules_strict", "pre_lm_head_norm_module", "rotary_embedding")
    settings = {key: getattr(known, key) for key in (*kept, "out_of_model_tensors")}
    settings["require_mm_token_type_ids"] = True
    auto.MODEL_MAP[name] = type(known.__name__, (BaseQwen3VLGPTQ,), settings)


def main() -> None:
    """Quantize and write the rounded weights."""
    options = worker.arguments("gptqmodel on a language model that sees", METHODS)
    # With its default of more workers it stops on a machine of two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
    from transformers import AutoProcessor

    take_pictures()
    config = QuantizeConfig(
        bits=options.bits,
        group_size=options.group_size or -1,
        device="cpu",
        offload_to_disk=False,
    )
    model = GPTQModel.load(str(options.model), config, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(options.model)
    samples = worker.conversations(options.calibration, options.samples)
    watch = worker.stopwatch()
    model.quantize(samples, batch_size=1)
    took = watch()
    parameters = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            if module.qzero_format() == 1:  # as on disk, where zero points are one too small
                convert_gptq_v1_to_v2_format_module(module, options.bits, module.pack_dtype)
            # They were rounded to float16; their products with codes need not be.
            module.scales = module.scales.float()
            parameters[f"{name}.weight"] = module.dequantize_weight().T
    worker.save(options, parameters, processor, took, ("gptqmodel", "transformers"))


if __name__ == "__main__":
    main()
