"""SignRound by auto-round, from a checkpoint to one of its own; for an environment of its own.

    peer/bin/python -m bench.engine.auto_round MODEL CALIBRATION.jsonl OUT [--iterations 200]

With ``--iterations 0`` it rounds to nearest. Why samples go in one by one, and how to set the
environment up, is told in :mod:`bench.peers.auto_round`.
"""

from __future__ import annotations

from bench.peers import worker
from bench.peers.auto_round import ACCUMULATED

METHODS = ("signround",)


def main() -> None:
    """Load, quantize, save."""
    options = worker.arguments("auto-round on a vision-language model", METHODS)
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    from auto_round import AutoRound
    from transformers import AutoModelForImageTextToText, AutoProcessor

    watch = worker.stopwatch()
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    processor = AutoProcessor.from_pretrained(options.model)
    samples = [
        worker.encode(messages, processor)
        for messages in worker.conversations(options.calibration, options.samples)
    ]
    group = {"bits": options.bits, "group_size": options.group_size or -1}
    rounder = AutoRound(
        model,
        processor.tokenizer,
        processor=processor,
        scheme={**group, "sym": True, "data_type": "int"},
        dataset=samples,
        nsamples=len(samples),
        iters=options.iterations,
        batch_size=1,
        gradient_accumulate_steps=ACCUMULATED,
        device_map="cpu",
        enable_torch_compile=False,
    )
    loaded, watch = watch(), worker.stopwatch()
    layers = len(worker.language_linears(model))
    rounder.quantize()
    solved, watch = watch(), worker.stopwatch()
    rounder.save_quantized(str(options.out), format="auto_round")
    steps = {"load": loaded, "quantize": solved, "save": watch()}
    worker.write_report(
        options.out, {"steps": steps, "layers": layers}, ("auto-round", "transformers")
    )


if __name__ == "__main__":
    main()
