"""A small block to tune: two linears, a nonlinearity between them, a residual around them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.algorithms.block_problem import BlockLayer, BlockProblem
from prismquant.algorithms.gptq import GPTQ
from prismquant.algorithms.problem import LayerProblem
from prismquant.algorithms.rtn import RTN
from prismquant.formats.spec import spec
from prismquant.numerics.ranges import RangeRule
from prismquant.statistics.hessian import Hessian

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, HIDDEN = 32, 64


def run(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The block."""
    return x + torch.nn.functional.gelu(x @ weights["fc1"].T) @ weights["fc2"].T


def draw(seed: int, calls: int, tokens: int) -> list[Tensor]:
    """Inputs of low rank plus noise, with features of different size; one stream for a seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mix, size = normal(WIDTH // 4, WIDTH) / math.sqrt(WIDTH // 4), torch.exp(0.5 * normal(WIDTH))
    return [
        (normal(tokens, WIDTH // 4) @ mix + 0.5 * normal(tokens, WIDTH)) * size
        for _ in range(calls)
    ]


def floats(seed: int) -> dict[str, Tensor]:
    """Float weights."""
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        "fc1": torch.randn(HIDDEN, WIDTH, generator=generator) / math.sqrt(WIDTH),
        "fc2": torch.randn(WIDTH, HIDDEN, generator=generator) / math.sqrt(HIDDEN),
    }


def block(
    name: str = "int3-g16",
    *,
    solver: RTN | GPTQ | None = None,
    calls: int = 8,
    tokens: int = 64,
    seed: int = 0,
    kind: str = "mse",
    dtype: torch.dtype = torch.bfloat16,
    token_weights: Sequence[Tensor] | None = None,
    inputs: Sequence[Tensor] | None = None,
    targets: Sequence[Tensor] | None = None,
) -> BlockProblem:
    """A problem that starts from what a solver (by default RTN) chose on the same inputs."""
    weights = floats(seed)
    xs = draw(seed, calls, tokens) if inputs is None else list(inputs)
    wanted = [run(x, weights) for x in xs] if targets is None else list(targets)
    rule = RangeRule(kind, norm=2.0)  # type: ignore[arg-type]
    layers, fed = [], draw(seed, calls, tokens)
    for layer, weight in weights.items():
        record = Hessian(weight.shape[1])
        for x in fed:
            record.update(x)
        problem = LayerProblem((layer,), (weight,), spec(name), rule, dtype, record.result())
        start = (solver or RTN()).solve(problem).weights[0]
        layers.append(BlockLayer(layer, weight, rule, dtype, start))
        fed = [torch.nn.functional.gelu(x @ start.dequantize().T) for x in fed]
    return BlockProblem(
        "blocks.0",
        tuple(layers),
        len(xs),
        lambda call, values: run(xs[call], values),
        lambda call: wanted[call],
        lambda call: None if token_weights is None else token_weights[call],
    )
