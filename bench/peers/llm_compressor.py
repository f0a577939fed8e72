"""GPTQ, AWQ and SmoothQuant by llm-compressor on a language model; in an environment of its own.

    python -m venv peer && peer/bin/pip install llmcompressor==0.14.0.1
    peer/bin/python -m bench.peers.llm_compressor MODEL CALIBRATION.jsonl OUT [--method gptq]

Samples must have a picture: its tracing fails on a set that mixes pictures and clips. It has a
table of norms for AWQ and SmoothQuant for models with linear attention, which is used, and none for
the others, so they are named here: AWQ's as for all models of this shape; SmoothQuant's default
table (the two norms, where there are experts that of attention alone), or, for ``smoothquant-all``,
also the gated product before the last projection. It takes experts apart by itself, and shows all
tokens of the calibration set to each of them.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bench.peers import worker

# What is beside the language model: towers and projectors of Qwen's and of VideoLLaMA's models.
IGNORED = ["re:.*lm_head", "re:.*visual.*", "re:.*vision.*", "re:.*projector.*"]
METHODS = ("gptq", "awq", "rtn", "smoothquant-gptq", "smoothquant-all-gptq")
LLM = "re:.*language_model.*"
ATTENTION = [f"{LLM}q_proj$", f"{LLM}k_proj$", f"{LLM}v_proj$"]
GATED = [f"{LLM}gate_proj$", f"{LLM}up_proj$"]
ROUTER = f"{LLM}mlp.gate$"
SMALL = [f"re:.*{name}$" for name in worker.SMALL]


def recipe(options: argparse.Namespace, model: torch.nn.Module) -> list[Any]:
    """The modifiers of a method, at its defaults."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.modifiers.transform.smoothquant.dynamic_mappings import (
        get_layer_mappings_from_model,
    )

    method, group_size, bits = options.method, options.group_size, options.bits
    experts = bool(worker.experts_modules(model))
    own_table = any("linear_attn" in name for name, _ in model.named_modules())
    common = {"type": "int", "symmetric": True}
    scale = {"strategy": "group", "group_size": group_size} if group_size else {}
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {"strategy": "channel", **common, "num_bits": bits, **scale},
    }
    if options.activation_bits:
        tokens = {"strategy": "token", "dynamic": True, "num_bits": options.activation_bits}
        group["input_activations"] = common | tokens
    rounding: Any = GPTQModifier if method.endswith("gptq") else QuantizationModifier
    last = rounding(config_groups={"group_0": group}, ignore=[*IGNORED, *SMALL])
    if method == "awq" and own_table:
        return [AWQModifier(), last]
    if method == "awq":
        gated = [ROUTER, *GATED] if experts else GATED
        mappings = [
            AWQMapping(f"{LLM}input_layernorm$", ATTENTION),
            AWQMapping(f"{LLM}self_attn.v_proj$", [f"{LLM}self_attn.o_proj$"]),
            AWQMapping(f"{LLM}post_attention_layernorm$", gated),
            AWQMapping(f"{LLM}up_proj$", [f"{LLM}down_proj$"]),
        ]
        return [AWQModifier(mappings=mappings), last]
    if method.startswith("smoothquant"):
        edges = list(get_layer_mappings_from_model(model)) if own_table else []
        if not own_table:
            edges.append((ATTENTION, f"{LLM}input_layernorm$"))
        if not own_table and not experts:
            edges.append((GATED, f"{LLM}post_attention_layernorm$"))
        if "all" in method:
            edges.append(([f"{LLM}down_proj$"], f"{LLM}up_proj$"))
        return [SmoothQuantModifier(mappings=edges), last]
    return [last]


def one_sample(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate a batch of one."""
    return {key: torch.tensor(value) for key, value in batch[0].items()}


def leave_memory_unpinned() -> None:
    """Without an accelerator its AWQ stops at the first batch, which it wants in pinned memory."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, batch_index: None


def rounded_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters; where only a scale was stored so far, the weights are rounded with it."""
    from compressed_tensors.quantization import forward_quantize

    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            weight = parameters[f"{name}.weight"]
            value = forward_quantize(module, weight, "weight", scheme.weights)
            parameters[f"{name}.weight"] = value
    return parameters


def main() -> None:
    """Quantize and write the rounded weights."""
    options = worker.arguments("llm-compressor on a language model that sees", METHODS)
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoProcessor

    model = worker.float_model(options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    rows = [
        {key: value.tolist() for key, value in worker.encode(messages, processor).items()}
        for messages in worker.conversations(options.calibration, options.samples)
    ]
    steps = recipe(options, model)
    leave_memory_unpinned()
    watch = worker.stopwatch()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=steps,
        data_collator=one_sample,
        processor=processor,
        num_calibration_samples=len(rows),
        sequential_targets=[type(model.model.language_model.layers[0]).__name__],
    )
    took = watch()
    with torch.no_grad():
        parameters = rounded_parameters(model)
    packages = ("llmcompressor", "compressed-tensors", "transformers")
    worker.save(options, parameters, processor, took, packages)


if __name__ == "__main__":
    main()
