"""SignRound by auto-round on a Qwen2-VL; for an environment of its own.

    python -m venv peer && peer/bin/pip install auto-round==0.16.1 transformers==5.23.0
    peer/bin/python -m bench.peers.auto_round MODEL CALIBRATION.jsonl OUT [--bits 4]

Its own loaders take text, or LLaVA's files; ready inputs, pictures included, go in as a list. They
differ in length, so a batch is one sample, and eight are accumulated, which equals its batch of
eight. ``rtn`` is its search for scales alone, without training.
"""

from __future__ import annotations

from bench.peers import worker

METHODS = ("signround", "rtn")
ACCUMULATED = 8


def main() -> None:
    """Quantize and write the rounded weights."""
    options = worker.arguments("auto-round on a Qwen2-VL", METHODS)
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    from auto_round import AutoRound
    from transformers import AutoProcessor

    model = worker.float_model(options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    samples = [
        worker.encode(messages, processor)
        for messages in worker.conversations(options.calibration, options.samples)
    ]
    scheme = {
        "bits": options.bits,
        "group_size": options.group_size or -1,
        "sym": True,
        "data_type": "int",
    }
    rounder = AutoRound(
        model,
        processor.tokenizer,
        processor=processor,
        scheme=scheme,
        dataset=samples,
        nsamples=len(samples),
        iters=options.iterations if options.method == "signround" else 0,
        batch_size=1,
        gradient_accumulate_steps=ACCUMULATED,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    watch = worker.stopwatch()
    rounded, _ = rounder.quantize()
    took = watch()
    parameters = dict(rounded.named_parameters())
    worker.save(options, parameters, processor, took, ("auto-round", "transformers"))


if __name__ == "__main__":
    main()
