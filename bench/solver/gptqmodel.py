"""gptqmodel's GPTQ of one problem, 4 bits in groups of 128; for an environment of its own.

Layers that share an input share its factorization, as they do in a run of the tool.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

# Before the import that reads it: with more workers than cores it stops.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch

from bench.peers.worker import declare_torchvision_operators
from bench.solver import worker

_OPERATORS = declare_torchvision_operators()  # gone as soon as nothing holds it

from gptqmodel import QuantizeConfig  # noqa: E402
from gptqmodel.quantization.gptq import GPTQ, SharedHessianFactorCache  # noqa: E402


def solve(weights: Sequence[torch.Tensor], hessian: torch.Tensor) -> list[torch.Tensor]:
    """One layer after the other, with one factorization."""
    found = []
    cache = SharedHessianFactorCache(generation=0, cohort="input")
    for i, weight in enumerate(weights):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        task = GPTQ(layer, QuantizeConfig(bits=4, group_size=128, device="cpu"))
        task.quantizer.configure(perchannel=True)
        task.H = hessian if i == len(weights) - 1 else hessian.clone()
        task.nsamples = task.expected_nsamples = 4096
        if len(weights) > 1:
            task.attach_shared_hessian_cache(cache)
        found.append(task.quantize()[0].detach())
    return found


if __name__ == "__main__":
    worker.run(solve, "gptqmodel")
