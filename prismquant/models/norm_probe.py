"""A norm known by what it computes, not by the name of its class.

A module is called in float64 with random numbers in place of its parameters. Where scaling its
weight scales its output, scale can move between it and the layers that read it. Most norms multiply
by ``weight``, some (Gemma 3, Qwen3.5) by ``1 + weight``: there, ``1 + weight`` is what is scaled.
Where a norm is called with a gate, which multiplies its output, the gate is some numbers, too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["NormBehaviour", "NormProbe"]

_ROWS = 4
# Norms compute in float32 inside, whatever they are given.
_TOLERANCE = 1e-4
# What a module that is no norm may do when it is called like one.
_CALL_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)


@dataclass(frozen=True)
class NormBehaviour:
    """Treatment of its input by a norm.

    Attributes:
        gain: What it multiplies each channel by.
        centred: Whether it subtracts the mean over channels, as LayerNorm does; None where it
            commutes with no rotation, and no residual stream can be rotated before it.
    """

    gain: Literal["weight", "1 + weight"]
    centred: bool | None


class NormProbe:
    """Calls modules as if they were norms; equal modules are called once."""

    def __init__(self) -> None:
        self._known: dict[tuple[type, str, int], NormBehaviour | None] = {}

    def behaviour(self, module: nn.Module | None) -> NormBehaviour | None:
        """Treatment of its input by a norm; None for a module that is no norm with a weight."""
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, Tensor) or weight.dim() != 1:
            return None
        key = (type(module), repr(module), weight.numel())
        if key not in self._known:
            self._known[key] = _probe(module, weight.numel())
        return self._known[key]


@torch.no_grad()
def _probe(module: nn.Module, width: int) -> NormBehaviour | None:
    draw = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return 0.5 + torch.rand(*shape, generator=draw, dtype=torch.float64)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = {"weight": weight}
        if getattr(module, "bias", None) is not None:
            given["bias"] = bias
        result = torch.func.functional_call(module, given, (x, *gates))
        if not isinstance(result, Tensor) or result.shape != x.shape or result.is_meta:
            raise TypeError("not a norm")
        return result.double()

    # With a mean, which LayerNorm subtracts.
    x = uniform(_ROWS, width) + torch.randn(_ROWS, width, generator=draw, dtype=torch.float64)
    weight, bias, scale = uniform(width), uniform(width), uniform(width)
    gates = [uniform(_ROWS, width)] * (_arguments(module) == 2)
    try:
        scaled = call(x, weight, bias) * scale
        if _close(call(x, weight * scale, bias * scale), scaled):
            plus, plain = False, torch.ones(width, dtype=torch.float64)
        elif _close(call(x, (1 + weight) * scale - 1, bias * scale), scaled):
            plus, plain = True, torch.zeros(width, dtype=torch.float64)
        else:
            return None
        mirror = uniform(width) - 1
        commutes = [
            _close(call(_mirrored(x, v), plain, bias * 0), _mirrored(call(x, plain, bias * 0), v))
            for v in (mirror, mirror - mirror.mean())
        ]
    except _CALL_ERRORS:
        return None
    centred = None if not commutes[1] else not commutes[0]
    return NormBehaviour("1 + weight" if plus else "weight", centred)


def _arguments(module: nn.Module) -> int:
    """Arguments without which a module cannot be called."""
    given = inspect.signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in given)


def _mirrored(x: Tensor, normal: Tensor) -> Tensor:
    """Rows reflected at a hyperplane: an orthogonal map that fixes what is orthogonal to it."""
    normal = normal / normal.norm()
    return x - 2 * (x @ normal)[:, None] * normal


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE)
