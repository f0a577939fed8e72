"""GPTQ by gptqmodel, from a checkpoint to one of its own; for an environment of its own.

    peer/bin/python -m bench.engine.gptq_model MODEL CALIBRATION.jsonl OUT [--bits 4]

At its defaults, on a CPU. How to set the environment up is told in :mod:`bench.peers.gptq_model`.
"""

from __future__ import annotations

import os

from bench.peers import worker

METHODS = ("gptq",)


def main() -> None:
    """Load, quantize, save."""
    options = worker.arguments("gptqmodel on a vision-language model", METHODS)
    # With its default of more workers it stops on a machine of two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    from gptqmodel import GPTQModel, QuantizeConfig

    watch = worker.stopwatch()
    config = QuantizeConfig(bits=options.bits, group_size=options.group_size or -1, device="cpu")
    model = GPTQModel.load(str(options.model), config)
    loaded, watch = watch(), worker.stopwatch()
    model.quantize(worker.conversations(options.calibration, options.samples), batch_size=1)
    solved, watch = watch(), worker.stopwatch()
    model.save(str(options.out))
    steps = {"load": loaded, "quantize": solved, "save": watch()}
    layers = sum(hasattr(module, "qweight") for module in model.model.modules())
    worker.write_report(
        options.out, {"steps": steps, "layers": layers}, ("gptqmodel", "transformers")
    )


if __name__ == "__main__":
    main()
