"""llm-compressor's GPTQ of one problem, 4 bits in groups of 128; for an environment of its own.

Its function is given scales (from the extremes of each group, as its observer does) and a Hessian
that it may overwrite; neither is on the clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.peers.worker import declare_torchvision_operators
from bench.solver import worker

_OPERATORS = declare_torchvision_operators()  # gone as soon as nothing holds it

from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight  # noqa: E402

_ARGS = QuantizationArgs(
    num_bits=4, strategy="group", group_size=128, actorder=ActivationOrdering.STATIC
)


def solve(weights: Sequence[torch.Tensor], hessian: torch.Tensor) -> list[torch.Tensor]:
    """One layer after the other."""
    found = []
    for i, weight in enumerate(weights):
        groups = weight.unflatten(1, (-1, 128))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), _ARGS)
        last = i == len(weights) - 1
        own = hessian if last else hessian.clone()
        result, _, _ = quantize_weight(
            weight.unsqueeze(0),
            own.unsqueeze(0),
            scale.unsqueeze(0),
            zero.unsqueeze(0),
            None,
            _ARGS,
        )
        found.append(result.squeeze(0))
    return found


if __name__ == "__main__":
    worker.run(solve, "llmcompressor")
