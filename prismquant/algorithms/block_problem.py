"""A block whose codes are tuned together, on the error of its output.

A solver sees one input and the layers that read it. A tuner sees a block of the model (an attention
and its MLP, say) and a function that runs it with other weights, so it can trade the error of one
layer against that of another, across the nonlinearities between them. It starts from codes that a
solver chose. The measure of success is

    loss = sum over calls and tokens of w_t |output_t - target_t|^2  /  sum of w_t

the mean squared error of the block's output, summed over features, over the tokens that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.diagnostics.tuning_diagnostics import TuningDiagnostics
from prismquant.errors import FormatError, NumericsError, PrismQuantError
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.numerics.finite import check_finite
from prismquant.numerics.scales import AnyScale, ScaleFormat, as_scale_format

if TYPE_CHECKING:
    from prismquant.numerics.ranges import RangeRule


@dataclass(frozen=True, eq=False)
class BlockLayer:
    """One layer of a block, with the codes to start from.

    Attributes:
        name: What the block's output function and errors call it.
        weight: The float weight, float32 ``[out, in]``.
        range_rule: How the scales of the start were chosen.
        scale_dtype: How scales are stored. A dtype is that of float scales; for scales of 8 bits,
            what else it takes follows from the start.
        start: What a solver chose.

    Raises:
        FormatError: The parts do not fit one another.
        NumericsError: The weight holds NaN or an infinity.
    """

    name: str
    weight: Tensor
    range_rule: RangeRule
    scale_dtype: AnyScale
    start: QuantizedTensor

    def __post_init__(self) -> None:
        if self.weight.dtype != torch.float32 or self.weight.ndim != 2:
            raise FormatError(
                f"tuners work on float32 [out, in], "
                f"not {self.weight.dtype} {list(self.weight.shape)}",
                where=self.name,
            )
        if tuple(self.weight.shape) != self.start.shape:
            raise FormatError(
                f"codes {list(self.start.shape)} are no start for a weight "
                f"{list(self.weight.shape)}",
                where=self.name,
            )
        wanted = self.scale_format.memory_dtype
        if self.start.scale.dtype != wanted:
            raise FormatError(
                f"the start has scales in {self.start.scale.dtype}, not {wanted}",
                where=self.name,
            )
        try:
            check_finite(self.weight, "the weight")
        except PrismQuantError as error:
            raise type(error)(error.what, where=self.name, remedy=error.remedy) from error

    @property
    def scale_format(self) -> ScaleFormat:
        """Storage format of the scales; a global scale stays that of the start."""
        if self.start.spec.scale == "float":
            return as_scale_format(self.scale_dtype)
        return self.start.scale_format


@dataclass(frozen=True, eq=False)
class BlockProblem:
    """A block to tune, and how to run it.

    Attributes:
        name: What errors call the block.
        layers: Its quantized layers.
        calls: How many recorded calls of the block there are.
        output: Runs call ``i`` with the given weights (by the layers' names, ``[out, in]``) in
            place and returns ``[tokens, features]``; differentiable in the weights.
        target: What call ``i`` should give, ``[tokens, features]``.
        token_weights: How much each token of call ``i`` counts, ``[tokens]``, not negative;
            ``None`` counts all alike. Tokens of weight zero are ignored, whatever they hold.

    Raises:
        FormatError: There are no layers or no calls, or two layers have one name.
    """

    name: str
    layers: tuple[BlockLayer, ...]
    calls: int
    output: Callable[[int, Mapping[str, Tensor]], Tensor]
    target: Callable[[int], Tensor]
    token_weights: Callable[[int], Tensor | None]

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if not names or len(set(names)) != len(names):
            raise FormatError(
                f"the layers of a block need distinct names: {names}", where=self.name
            )
        if self.calls < 1:
            raise FormatError(
                "a block cannot be tuned without calls",
                where=self.name,
                remedy="add calibration data that reaches it",
            )


@dataclass(frozen=True, eq=False)
class BlockResult:
    """Codes and scales that a tuner chose, and what it gained.

    Attributes:
        weights: One for each layer of the problem, in its order.
        loss: The module's loss of these weights over all calls.
        start_loss: That of the start.
        diagnostics: What the record keeps of it.
    """

    weights: tuple[QuantizedTensor, ...]
    loss: float
    start_loss: float
    diagnostics: TuningDiagnostics


def block_loss(problem: BlockProblem, weights: Sequence[QuantizedTensor]) -> float:
    """The module's loss of a choice of weights, over all calls.

    Args:
        problem: The block.
        weights: One for each of its layers, in their order.

    Returns:
        The loss; zero when no token counts.

    Raises:
        FormatError: An output, a target and its token weights do not fit one another.
    """
    values = {
        layer.name: quantized.dequantize()
        for layer, quantized in zip(problem.layers, weights, strict=True)
    }
    total, count = 0.0, 0.0
    with torch.no_grad():
        for call in range(problem.calls):
            error, weight = call_error(problem, call, values)
            total += float(error)
            count += weight
    return total / count if count else 0.0


def starting_loss(problem: BlockProblem) -> float:
    """The loss of the start over all calls.

    Args:
        problem: The block.

    Returns:
        The loss.

    Raises:
        NumericsError: It is not finite.
    """
    loss = block_loss(problem, [layer.start for layer in problem.layers])
    if not math.isfinite(loss):
        raise NumericsError(
            f"the block's output error is {loss} before tuning",
            where=problem.name,
            remedy="check the calibration data, or compute in a wider dtype",
        )
    return loss


def call_error(
    problem: BlockProblem, call: int, values: Mapping[str, Tensor]
) -> tuple[Tensor, float]:
    """Weighted squared error of one call, a float32 scalar, and the weight of its tokens."""
    output = problem.output(call, values)
    target = problem.target(call)
    if output.shape != target.shape or output.ndim != 2:
        raise FormatError(
            f"call {call} gives {list(output.shape)}, its target is {list(target.shape)}",
            where=problem.name,
            remedy="give both as [tokens, features]",
        )
    error = output.to(torch.float32) - target.to(output.device, torch.float32)
    weights = problem.token_weights(call)
    if weights is None:
        return error.square().sum(), float(len(error))
    if tuple(weights.shape) != (len(error),):
        raise FormatError(
            f"call {call} has {len(error)} tokens and weights {list(weights.shape)}",
            where=problem.name,
        )
    weights = weights.to(error.device, torch.float32)
    # Padding may hold anything, even what is not a number.
    error = torch.where((weights > 0).unsqueeze(1), error, 0.0)
    return (error.square().sum(dim=1) * weights).sum(), float(weights.sum())
