"""GPTQ by llm-compressor, from a checkpoint to one of its own; for an environment of its own.

    peer/bin/python -m bench.engine.llm_compressor MODEL CALIBRATION.jsonl OUT [--bits 4]

As its examples do it: the model in the dtype of the checkpoint, one decoder layer at a time, saved
compressed. How to set the environment up is told in :mod:`bench.peers.llm_compressor`.
"""

from __future__ import annotations

from bench.peers import worker
from bench.peers.llm_compressor import one_sample, recipe

METHODS = ("gptq",)


def main() -> None:
    """Load, quantize, save."""
    options = worker.arguments("llm-compressor on a vision-language model", METHODS)
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForImageTextToText, AutoProcessor

    watch = worker.stopwatch()
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    processor = AutoProcessor.from_pretrained(options.model)
    rows = [
        {key: value.tolist() for key, value in worker.encode(messages, processor).items()}
        for messages in worker.conversations(options.calibration, options.samples)
    ]
    loaded, watch = watch(), worker.stopwatch()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe(options, model),
        data_collator=one_sample,
        processor=processor,
        num_calibration_samples=len(rows),
        sequential_targets=[type(model.model.language_model.layers[0]).__name__],
    )
    solved, watch = watch(), worker.stopwatch()
    layers = len(worker.language_linears(model))
    model.save_pretrained(options.out, save_compressed=True)
    processor.save_pretrained(options.out)
    steps = {"load": loaded, "quantize": solved, "save": watch()}
    packages = ("llmcompressor", "compressed-tensors", "transformers")
    worker.write_report(options.out, {"steps": steps, "layers": layers}, packages)


if __name__ == "__main__":
    main()
