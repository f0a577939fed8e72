"""GPTQ, AWQ and SmoothQuant by llm-compressor on a language model; in an environment of its own.

    python -m venv peer && peer/bin/pip install llmcompressor==0.14.0.1
    peer/bin/python -m bench.peers.llm_compressor MODEL CALIBRATION.jsonl OUT [--method gptq]

Samples must have a picture: its tracing fails on a set that mixes pictures and clips. It has no
table of these models' norms for AWQ and SmoothQuant, so they are named here: AWQ's as for all
models of this shape; SmoothQuant's default table (the two norms), or, for ``smoothquant-all``,
also the gated product before the last projection.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.peers import worker

# What is beside the language model: towers and projectors of Qwen's and of VideoLLaMA's models.
IGNORED = ["re:.*lm_head", "re:.*visual.*", "re:.*vision.*", "re:.*projector.*"]
METHODS = ("gptq", "awq", "rtn", "smoothquant-gptq", "smoothquant-all-gptq")
LLM = "re:.*language_model.*"
ATTENTION = [f"{LLM}q_proj$", f"{LLM}k_proj$", f"{LLM}v_proj$"]
GATED = [f"{LLM}gate_proj$", f"{LLM}up_proj$"]


def recipe(method: str, bits: int, group_size: int, activation_bits: int) -> list[Any]:
    """The modifiers of a method, at its defaults."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    common = {"type": "int", "symmetric": True}
    scale = {"strategy": "group", "group_size": group_size} if group_size else {}
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {"strategy": "channel", **common, "num_bits": bits, **scale},
    }
    if activation_bits:
        tokens = {"strategy": "token", "dynamic": True, "num_bits": activation_bits}
        group["input_activations"] = common | tokens
    rounding: Any = GPTQModifier if method.endswith("gptq") else QuantizationModifier
    last = rounding(config_groups={"group_0": group}, ignore=IGNORED)
    if method == "awq":
        mappings = [
            AWQMapping(f"{LLM}input_layernorm$", ATTENTION),
            AWQMapping(f"{LLM}self_attn.v_proj$", [f"{LLM}self_attn.o_proj$"]),
            AWQMapping(f"{LLM}post_attention_layernorm$", GATED),
            AWQMapping(f"{LLM}up_proj$", [f"{LLM}down_proj$"]),
        ]
        return [AWQModifier(mappings=mappings), last]
    if method.startswith("smoothquant"):
        edges: list[Any] = [
            (ATTENTION, f"{LLM}input_layernorm$"),
            (GATED, f"{LLM}post_attention_layernorm$"),
        ]
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
    steps = recipe(options.method, options.bits, options.group_size, options.activation_bits)
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
