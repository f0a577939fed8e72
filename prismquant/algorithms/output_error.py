"""Output error of a smooth edge: one measure that judges all methods which choose its scale.

    mean over consumers of  sum |X W^T - Xq Wq^T|^2 / sum |X W^T|^2

over a sample of tokens, with ``Wq`` the consumer's weight times the scale, rounded to nearest in
its format, and ``Xq`` the input divided by the scale, quantized as it will be served. What
consumers put out goes into products with one another (queries with keys, gate with up), where
relative errors add; so each consumer counts by its relative error, not by its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.algorithms.problem import scale_format
from prismquant.kernels.range_search import weight_scales
from prismquant.numerics.affine import dynamic_scale_zero_point, scale_zero_point, simulate
from prismquant.numerics.kinds import Granularity, block_rows
from prismquant.numerics.ranges import SEARCHES
from prismquant.numerics.scales import ScaleFormat, global_scale
from prismquant.statistics.input_range import InputRange

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prismquant.algorithms.smooth_edge import Consumer, EdgeProblem
    from prismquant.formats.spec import NumberSpec

# Numbers in a piece of a weight, or of the outputs of its rows: bounds the temporary memory.
_PIECE = 1 << 24
# Numbers in weights that are rounded together.
_TOGETHER = 1 << 18


def output_error(problem: EdgeProblem, scale: Tensor | None) -> float:
    """The module's measure, over all rows of all consumers.

    Args:
        problem: The edge.
        scale: float32 ``[size]``, or ``None`` for no scaling.

    Returns:
        A relative squared error; 0 where nothing is quantized or there is no token.

    Raises:
        NumericsError: Scaled weights or inputs leave float32.
    """
    return Trials(problem).error(scale)


class Trials:
    """Measures many scales of one edge on some rows of each consumer.

    Rows never interact, and all scales are tried on the same ones, so a fraction is enough to find
    the best scale; what is found should then be judged by :func:`output_error`.

    Args:
        problem: The edge.
        rows: Look at so many rows of each consumer at most, evenly spread; ``None`` for all. What a
            few rows put out is kept between trials, that of all is not.
    """

    def __init__(self, problem: EdgeProblem, rows: int | None = None) -> None:
        self._problem = problem
        record = problem.record
        self._device = problem.consumers[0].weight.device
        self._columns = problem.columns.to(self._device)
        self._inputs = record.inputs.to(self._device)
        costs = record.token_weights.to(torch.float64)
        costs = torch.where(record.vision, costs * problem.vision_weight, costs)
        self._costs = costs.to(self._device)
        self.complete = rows is None or all(len(r.weight) <= rows for r in problem.consumers)
        # E4M3 scales hang on the largest weight of all the consumers together.
        self._peaks = {
            index: consumer.weight.abs().amax(0)
            for index, consumer in enumerate(problem.consumers)
            if consumer.spec is not None and consumer.spec.scale == "e4m3"
        }
        self._kept = None if rows is None else list(self._pieces(rows))

    def error(self, scale: Tensor | None) -> float:
        """The :func:`output_error` of one scale, as :meth:`errors` gives those of many."""
        return self.errors([scale])[0]

    def errors(self, scales: Sequence[Tensor | None]) -> list[float]:
        """The :func:`output_error` of each scale, from the rows that are looked at.

        Args:
            scales: float32 ``[size]``, or ``None``.

        Returns:
            Relative squared errors.

        Raises:
            NumericsError: Scaled weights or inputs leave float32.
        """
        if not len(self._inputs) or not self._problem.quantized:
            return [0.0] * len(scales)
        found: list[float] = []
        together = self._together()
        for start in range(0, len(scales), together):
            found += self._errors(scales[start : start + together])
        return found

    def _together(self) -> int:
        """Number of scales that are tried at once: small weights are rounded in one go."""
        if self._kept is None:
            return 1
        return max(1, _TOGETHER // max(1, sum(piece.weight.numel() for piece in self._kept)))

    def _errors(self, scales: Sequence[Tensor | None]) -> list[float]:
        consumers = self._problem.consumers
        factors = [
            None if scale is None else scale.to(self._device, torch.float32)[self._columns]
            for scale in scales
        ]
        seen, forms = [self._seen(one) for one in factors], [self._forms(one) for one in factors]
        lost = torch.zeros(len(scales), len(consumers), dtype=torch.float64, device=self._device)
        total = torch.zeros_like(lost[0])
        for piece in self._pieces(None) if self._kept is None else self._kept:
            consumer = consumers[piece.consumer]
            own = [form[piece.consumer] for form in forms]
            for number, weight in enumerate(_rounded(consumer, piece.weight, factors, own)):
                output = torch.addmm(piece.output, seen[number], weight.T, alpha=-1)
                lost[number, piece.consumer] += self._energy(output)
            total[piece.consumer] += self._energy(piece.output)
        # A consumer that puts out nothing loses nothing.
        relative = lost / torch.where(total > 0, total, math.inf)
        return [float(one.mean()) for one in relative]

    def _energy(self, output: Tensor) -> Tensor:
        # Norms in one pass; only their squares, one a token, are summed in float64.
        lengths: Tensor = torch.linalg.vector_norm(output, dim=1)
        return lengths.to(torch.float64).square() @ self._costs

    def _pieces(self, rows: int | None) -> Iterator[_ConsumerPiece]:
        height = max(1, _PIECE // max(self._inputs.shape[1], len(self._inputs), 1))
        for index, consumer in enumerate(self._problem.consumers):
            weight = consumer.weight
            side = _block_side(consumer.spec)
            if rows is not None and rows < len(weight):
                weight = weight[_spread(len(weight), rows, side).to(weight.device)]
            # One scale of a whole weight cannot be chosen from a piece of it.
            whole = consumer.spec is not None and consumer.spec.granularity == Granularity.TENSOR
            step = len(weight) if whole else side * max(1, height // side)
            for piece in weight.split(step):
                yield _ConsumerPiece(index, piece, self._inputs @ piece.T)

    def _forms(self, factors: Tensor | None) -> list[ScaleFormat | None]:
        """Storage format of each consumer's scales once its columns are scaled."""
        peaks = self._peaks.values()
        scaled = [(p if factors is None else p * factors).amax() for p in peaks]
        return [
            None
            if r.spec is None
            else scale_format(r.spec, r.range_rule, self._problem.scale_dtype, scaled)
            for r in self._problem.consumers
        ]

    def _seen(self, factors: Tensor | None) -> Tensor:
        """The consumers' input as it will be served, float32 ``[n, in]``."""
        problem, spec = self._problem, self._problem.activations
        x = self._inputs if factors is None else self._inputs / factors
        if spec is None:
            return x
        if spec.dynamic:
            divisor = None
            if spec.scale == "e4m3":
                low, high = self._static_range(x, factors, spec)
                divisor = global_scale(torch.maximum(-low, high), spec.grid)
            form = ScaleFormat(problem.scale_dtype, spec.scale, divisor)
            scale, zero = dynamic_scale_zero_point(
                x, spec.grid, spec.symmetric, spec.granularity, spec.group_size, form
            )
        else:
            low, high = self._static_range(x, factors, spec)
            scale, zero = scale_zero_point(
                low, high, spec.grid, spec.symmetric, problem.scale_dtype
            )
        return simulate(x, scale, zero, spec.grid, spec.granularity, spec.group_size)

    def _static_range(
        self, x: Tensor, factors: Tensor | None, spec: NumberSpec
    ) -> tuple[Tensor, Tensor]:
        rule, record = self._problem.activation_range, self._problem.record
        # Where only a global scale is looked for, there is nothing to search.
        if rule.kind == "minmax" or (spec.scale == "e4m3" and rule.kind in SEARCHES):
            low, high = record.low.amin(0).to(x.device), record.high.amax(0).to(x.device)
            if factors is not None:
                low, high = low / factors, high / factors
            return low.amin().view(1), high.amax().view(1)
        values = InputRange(rule.momentum)
        values.update(x)
        ends = values.result(rule, spec.grid, spec.symmetric)
        return x.new_tensor(ends[:1]), x.new_tensor(ends[1:])


@dataclass(frozen=True, eq=False)
class _ConsumerPiece:
    """Rows of a consumer.

    Attributes:
        consumer: Its index.
        weight: ``[rows, in]``.
        output: What they put out in floating point, ``[n, rows]``.
    """

    consumer: int
    weight: Tensor
    output: Tensor


def _block_side(spec: NumberSpec | None) -> int:
    """Rows that share scales; pieces of a weight must not cut them."""
    structure = None if spec is None else spec.block_structure
    return 1 if structure is None else structure[0]


def _spread(total: int, rows: int, side: int) -> Tensor:
    """Indices of about ``rows`` rows, evenly spread in runs of ``side``."""
    count = block_rows(rows, side)
    runs = torch.arange(count) * block_rows(total, side) // count
    index = (runs.unsqueeze(1) * side + torch.arange(side)).flatten()
    return index[index < total]


def _rounded(
    consumer: Consumer,
    weight: Tensor,
    factors: Sequence[Tensor | None],
    forms: Sequence[ScaleFormat | None],
) -> Iterator[Tensor]:
    """Rows of a consumer's weight, scaled by each of some factors and rounded to nearest."""
    scaled = [weight if own is None else weight * own for own in factors]
    spec, stored = consumer.spec, [form for form in forms if form is not None]
    if spec is None or not stored:
        yield from scaled
        return
    # Rows share no scale, but in whole blocks.
    apart = spec.granularity == Granularity.TENSOR or len(weight) % _block_side(spec) != 0
    # E4M3 scales hang on a global one.
    apart |= stored[0].global_scale is not None
    joined = zip(scaled, stored, strict=True) if apart else [(torch.cat(scaled), stored[0])]
    for values, form in joined:
        scale, zero = weight_scales(
            values,
            spec.grid,
            spec.symmetric,
            spec.granularity,
            spec.group_size,
            consumer.range_rule,
            form,
        )
        rounded = simulate(values, scale, zero, spec.grid, spec.granularity, spec.group_size)
        yield from rounded.split(len(weight))
