"""What methods that move scale along an edge are given, what they return, and what judges them.

An edge is a norm or a linear layer and all linear layers that read its output. Dividing the upper
end by a positive number for each channel, and multiplying the readers' columns by it, leaves the
function as it is; but it moves outliers between inputs and weights, and so changes what is lost in
rounding. A method proposes scales; one measure, :func:`output_error`, judges all of them:

    mean over readers of  sum |X W^T - Xq Wq^T|^2 / sum |X W^T|^2

over a sample of tokens, with ``Wq`` the reader's weight times the scale, rounded to nearest in its
format, and ``Xq`` the input divided by the scale, quantized as it will be served. What readers put
out goes into products with one another (queries with keys, gate with up), where relative errors
add; so each reader counts by its relative error, not by its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from prismquant.algorithms.problem import scale_format
from prismquant.diagnostics.edge_diagnostics import EdgeDiagnostics
from prismquant.errors import FormatError, NumericsError, PrismQuantError
from prismquant.kernels.range_search import weight_scales
from prismquant.numerics.affine import (
    check_finite,
    dynamic_scale_zero_point,
    scale_zero_point,
    simulate,
)
from prismquant.numerics.kinds import Granularity, block_rows
from prismquant.numerics.ranges import SEARCHES, RangeRule
from prismquant.numerics.scales import ScaleFormat, global_scale
from prismquant.statistics.input_range import InputRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prismquant.diagnostics.edge_diagnostics import Choice
    from prismquant.formats.spec import NumberSpec
    from prismquant.statistics.channel_sizes import ChannelSizes

_NO_GAIN = "no scale lowers the error of the outputs"
_NO_TOKEN = "no calibration token has reached this edge"
_FLOAT_READERS = "nothing that reads this edge is quantized"

# Numbers in a piece of a weight, or of the outputs of its rows: bounds the temporary memory.
_PIECE = 1 << 24


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer at the lower end of an edge.

    Attributes:
        name: What errors call it.
        weight: float32 ``[out, in]``.
        spec: The format of its weight; ``None`` leaves it in floating point.
        range_rule: How the scales of the weight are chosen.

    Raises:
        FormatError: The weight is not a float32 matrix, or does not fit the format.
        NumericsError: The weight holds NaN or an infinity.
    """

    name: str
    weight: Tensor
    spec: NumberSpec | None
    range_rule: RangeRule = field(default_factory=RangeRule)

    def __post_init__(self) -> None:
        shape = tuple(self.weight.shape)
        if self.weight.dtype != torch.float32 or len(shape) != 2 or 0 in shape:
            raise FormatError(
                f"a reader's weight must be float32 [out, in], not {self.weight.dtype} "
                f"{list(shape)}",
                where=self.name,
            )
        try:
            if self.spec is not None:
                self.spec.scale_shape(*shape)
            check_finite(self.weight, "the weight")
        except PrismQuantError as error:
            raise type(error)(error.what, where=self.name, remedy=error.remedy) from error


@dataclass(frozen=True, eq=False)
class EdgeProblem:
    """An edge whose scale is to be chosen.

    Attributes:
        name: What errors call the edge, e.g. the path of its upper end.
        size: Channels at the upper end.
        columns: Which channel of the upper end feeds each column of the readers, int64 ``[in]``.
        readers: All readers of the upper end's output.
        activations: The format of their input; ``None`` leaves it in floating point.
        activation_range: How the range of a static input is chosen. Only ``minmax`` is taken from
            all tokens, the other rules from the sample (``ema`` takes it for one batch).
        scale_dtype: Dtype in which float scales of weights and inputs are stored.
        record: What calibration saw of the readers' input, before any scaling.
        vision_weight: What an error at a vision token costs, where one at a text token costs 1.

    Raises:
        FormatError: The parts do not fit one another.
        NumericsError: The vision weight is not a finite number from 0 on.
    """

    name: str
    size: int
    columns: Tensor
    readers: tuple[Reader, ...]
    activations: NumberSpec | None
    activation_range: RangeRule
    scale_dtype: torch.dtype
    record: ChannelSizes
    vision_weight: float = 1.0

    def __post_init__(self) -> None:
        features = self.record.in_features
        widths = [reader.weight.shape[1] for reader in self.readers]
        if not widths or any(width != features for width in widths):
            raise FormatError(
                f"readers with {widths} input features cannot read {features}", where=self.name
            )
        columns = self.columns
        if tuple(columns.shape) != (features,) or columns.dtype != torch.int64:
            raise FormatError(
                f"columns must be int64 [{features}], not {columns.dtype} {list(columns.shape)}",
                where=self.name,
            )
        if int(columns.min()) < 0 or int(columns.max()) >= self.size:
            raise FormatError(
                f"columns name channels {int(columns.min())} to {int(columns.max())}, "
                f"there are {self.size}",
                where=self.name,
            )
        spec = self.activations
        if spec is not None and not spec.dynamic and spec.granularity != Granularity.TENSOR:
            raise FormatError(
                f"{spec.describe()} is not a format of activations",
                where=self.name,
                remedy="use token granularity, or tensor granularity for a static scale",
            )
        if not 0 <= self.vision_weight < math.inf:
            raise NumericsError(
                f"vision tokens cannot have the weight {self.vision_weight}",
                where=self.name,
                remedy="use a finite number from 0 on",
            )

    @property
    def quantized(self) -> bool:
        """Whether anything is rounded at all."""
        return self.activations is not None or any(r.spec is not None for r in self.readers)

    def channel_max(self, values: Tensor) -> Tensor:
        """The largest value over the columns that a channel feeds.

        Args:
            values: ``[in]``, not negative.

        Returns:
            ``[size]``; 0 for a channel that feeds none.
        """
        result = values.new_zeros(self.size)
        return result.scatter_reduce_(0, self.columns.to(values.device), values, "amax")

    def channel_mean(self, values: Tensor) -> Tensor:
        """The mean over the columns that a channel feeds.

        Args:
            values: ``[in]``.

        Returns:
            ``[size]``; 0 for a channel that feeds none.
        """
        columns = self.columns.to(values.device)
        total = values.new_zeros(self.size).index_add_(0, columns, values)
        count = values.new_zeros(self.size).index_add_(0, columns, torch.ones_like(values))
        return total / count.clamp_min_(1.0)


@dataclass(frozen=True, eq=False)
class EdgeResult:
    """What a method chose.

    Attributes:
        scale: float32 ``[size]``, positive: the upper end is divided by it, the readers' columns
            are multiplied. ``None``: the edge stays as it is.
        diagnostics: What the record keeps of it; errors are those of :func:`output_error`.
    """

    scale: Tensor | None
    diagnostics: EdgeDiagnostics


class Equalizer(Protocol):
    """A method that chooses scales: a frozen dataclass whose fields are its options.

    Every field has a default; ``__post_init__`` raises RecipeError on a value out of bounds.
    """

    name: ClassVar[str]

    def equalize(self, problem: EdgeProblem) -> EdgeResult:
        """Choose the scale of one edge."""
        ...


def output_error(problem: EdgeProblem, scale: Tensor | None) -> float:
    """The module's measure, over all rows of all readers.

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
    """Measures many scales of one edge on some rows of each reader.

    Rows never interact, and all scales are tried on the same ones, so a fraction is enough to find
    the best scale; what is found should then be judged by :func:`output_error`.

    Args:
        problem: The edge.
        rows: Look at so many rows of each reader at most, evenly spread; ``None`` for all. What a
            few rows put out is kept between trials, that of all is not.
    """

    def __init__(self, problem: EdgeProblem, rows: int | None = None) -> None:
        self._problem = problem
        record = problem.record
        self._device = problem.readers[0].weight.device
        self._columns = problem.columns.to(self._device)
        self._inputs = record.inputs.to(self._device)
        costs = record.token_weights.to(torch.float64)
        costs = torch.where(record.vision, costs * problem.vision_weight, costs)
        self._costs = costs.to(self._device)
        self.complete = rows is None or all(len(r.weight) <= rows for r in problem.readers)
        # E4M3 scales hang on the largest weight of all the readers together.
        self._peaks = {
            index: reader.weight.abs().amax(0)
            for index, reader in enumerate(problem.readers)
            if reader.spec is not None and reader.spec.scale == "e4m3"
        }
        self._kept = None if rows is None else list(self._pieces(rows))

    def error(self, scale: Tensor | None) -> float:
        """What :func:`output_error` says, from the rows that are looked at.

        Args:
            scale: float32 ``[size]``, or ``None``.

        Returns:
            A relative squared error.

        Raises:
            NumericsError: Scaled weights or inputs leave float32.
        """
        problem = self._problem
        if not len(self._inputs) or not problem.quantized:
            return 0.0
        factors = None if scale is None else scale.to(self._device, torch.float32)[self._columns]
        seen, forms = self._seen(factors), self._forms(factors)
        lost = torch.zeros(len(problem.readers), dtype=torch.float64, device=self._device)
        total = torch.zeros_like(lost)
        for piece in self._pieces(None) if self._kept is None else self._kept:
            reader = problem.readers[piece.reader]
            weight = _rounded(reader, piece.weight, factors, forms[piece.reader])
            output = torch.addmm(piece.output, seen, weight.T, alpha=-1)
            lost[piece.reader] += self._energy(output)
            total[piece.reader] += self._energy(piece.output)
        # A reader that puts out nothing loses nothing.
        return float((lost / torch.where(total > 0, total, math.inf)).mean())

    def _energy(self, output: Tensor) -> Tensor:
        # Norms in one pass; only their squares, one a token, are summed in float64.
        lengths: Tensor = torch.linalg.vector_norm(output, dim=1)
        return lengths.to(torch.float64).square() @ self._costs

    def _pieces(self, rows: int | None) -> Iterator[_Piece]:
        height = max(1, _PIECE // max(self._inputs.shape[1], len(self._inputs), 1))
        for index, reader in enumerate(self._problem.readers):
            weight = reader.weight
            side = _block_side(reader.spec)
            if rows is not None and rows < len(weight):
                weight = weight[_spread(len(weight), rows, side).to(weight.device)]
            # One scale of a whole weight cannot be chosen from a piece of it.
            whole = reader.spec is not None and reader.spec.granularity == Granularity.TENSOR
            step = len(weight) if whole else side * max(1, height // side)
            for piece in weight.split(step):
                yield _Piece(index, piece, self._inputs @ piece.T)

    def _forms(self, factors: Tensor | None) -> list[ScaleFormat | None]:
        """How each reader's scales are stored once its columns are scaled."""
        peaks = self._peaks.values()
        scaled = [(p if factors is None else p * factors).amax() for p in peaks]
        return [
            None
            if r.spec is None
            else scale_format(r.spec, r.range_rule, self._problem.scale_dtype, scaled)
            for r in self._problem.readers
        ]

    def _seen(self, factors: Tensor | None) -> Tensor:
        """The readers' input as it will be served, float32 ``[n, in]``."""
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
class _Piece:
    """Rows of a reader.

    Attributes:
        reader: Its index.
        weight: ``[rows, in]``.
        output: What they put out in floating point, ``[n, rows]``.
    """

    reader: int
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
    reader: Reader, weight: Tensor, factors: Tensor | None, form: ScaleFormat | None
) -> Tensor:
    """Rows of a reader's weight, scaled and rounded to nearest."""
    scaled = weight if factors is None else weight * factors
    spec = reader.spec
    if spec is None or form is None:
        return scaled
    scale, zero = weight_scales(
        scaled,
        spec.grid,
        spec.symmetric,
        spec.granularity,
        spec.group_size,
        reader.range_rule,
        form,
    )
    return simulate(scaled, scale, zero, spec.grid, spec.granularity, spec.group_size)


def settle(logs: Tensor, live: Tensor, max_scale: float, power_of_two: bool) -> Tensor:
    """Make scales fit to be folded: centred on 1, bounded, and 1 where nothing is known.

    A factor common to all channels changes no rounding, so it is free to choose: the smallest and
    the largest scale become reciprocals of one another (AWQ's ``sqrt(max * min)``).

    Args:
        logs: Binary logarithms of the scales, ``[size]``; anything where ``live`` is false.
        live: Which channels calibration has seen active, bool ``[size]``.
        max_scale: Scales end in ``[1 / max_scale, max_scale]``.
        power_of_two: Round to powers of two, so that folding is exact in floating point.

    Returns:
        float32 ``[size]``.
    """
    result = torch.ones(logs.shape, dtype=torch.float32, device=logs.device)
    chosen = logs[live].to(torch.float64)
    if not len(chosen):
        return result
    bound = math.floor(math.log2(max_scale)) if power_of_two else math.log2(max_scale)
    # First around the median: one stray channel must not push all others to the bound.
    chosen = (chosen - chosen.median()).clamp_(-bound, bound)
    chosen -= (chosen.max() + chosen.min()) / 2
    if power_of_two:
        chosen = chosen.round_()
    result[live] = torch.exp2(chosen).to(torch.float32)
    return result


def best_scale(
    problem: EdgeProblem,
    candidates: Iterable[tuple[Choice, Tensor]],
    rows: int,
) -> EdgeResult:
    """Try scales on some rows, judge the best on all, and keep it only if it lowers the error.

    Args:
        problem: The edge.
        candidates: Scales ``[size]``, each with how it was chosen. Those that are 1 everywhere are
            passed over: no scaling is always a candidate.
        rows: Rows of each reader that are looked at in the search.

    Returns:
        The scale, or ``None`` where no scaling is better.

    Raises:
        NumericsError: Scaled weights or inputs leave float32.
    """
    trials = Trials(problem, rows)
    least = before = trials.error(None)
    best: tuple[Choice, Tensor] | None = None
    tried = 0
    for choice, scale in candidates:
        if bool((scale == 1).all()):
            continue
        tried += 1
        error = trials.error(scale)
        if error < least:
            least, best = error, (choice, scale)
    if best is None:
        return EdgeResult(None, EdgeDiagnostics(skipped=_NO_GAIN, tried=tried, error_before=before))
    return judge(
        problem,
        best[1],
        best[0],
        tried=tried,
        must_gain=True,
        known=(before, least) if trials.complete else None,
    )


def judge(
    problem: EdgeProblem,
    scale: Tensor,
    choice: Choice,
    *,
    tried: int = 0,
    must_gain: bool,
    known: tuple[float, float] | None = None,
) -> EdgeResult:
    """Measure a scale on all rows, and write down what it does.

    Args:
        problem: The edge.
        scale: ``[size]``. One that is 1 everywhere is an exact no-op, and none.
        choice: How it was chosen.
        tried: Scales that a search has looked at.
        must_gain: Refuse it unless it lowers the error.
        known: The errors without and with it, where they have been measured already.

    Returns:
        The scale, or ``None`` where it is refused.

    Raises:
        NumericsError: Scaled weights or inputs leave float32.
    """
    if bool((scale == 1).all()):
        diagnostics = EdgeDiagnostics(choice, skipped="all scales are one", tried=tried)
        return EdgeResult(None, diagnostics)
    before, after = known or (output_error(problem, None), output_error(problem, scale))
    refused = must_gain and not after < before
    diagnostics = EdgeDiagnostics(
        choice=choice,
        skipped=_NO_GAIN if refused else "",
        tried=tried,
        error_before=before,
        error_after=after,
        smallest_scale=float(scale.min()),
        largest_scale=float(scale.max()),
    )
    return EdgeResult(None if refused else scale, diagnostics)


def hopeless(problem: EdgeProblem) -> EdgeResult | None:
    """The result of an edge that no statistic can help, or ``None`` where one might.

    Args:
        problem: The edge.

    Returns:
        A result without a scale where nothing is quantized or no token was seen.
    """
    if not problem.quantized:
        return EdgeResult(None, EdgeDiagnostics(skipped=_FLOAT_READERS))
    if not len(problem.record.inputs):
        return EdgeResult(None, EdgeDiagnostics(skipped=_NO_TOKEN))
    return None
