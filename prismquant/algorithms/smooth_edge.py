"""A smooth edge: a producer, the layers that consume its output, and what calibration saw there.

The producer is a norm or a linear layer, its consumers are all linear layers that read its output.
Dividing the producer by a positive number for each channel, and multiplying the consumers' columns
by it, leaves the function as it is; but it moves outliers between inputs and weights, and so
changes what is lost in rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.diagnostics.edge_diagnostics import EdgeDiagnostics
from prismquant.errors import FormatError, NumericsError, PrismQuantError
from prismquant.numerics.finite import check_finite
from prismquant.numerics.kinds import Granularity
from prismquant.numerics.ranges import RangeRule

if TYPE_CHECKING:
    from prismquant.algorithms.model_outline import ModelOutline, OutlineEdge, Scope
    from prismquant.formats.spec import NumberSpec
    from prismquant.statistics.channel_sizes import ChannelSizes

_NO_TOKEN = "no calibration token has reached this edge"
_FLOAT_CONSUMERS = "nothing that reads this edge is quantized"


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear layer that consumes what an edge's producer puts out.

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
                f"a consumer's weight must be float32 [out, in], not {self.weight.dtype} "
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
        name: What errors call the edge, e.g. the path of its producer.
        size: Channels at the producer.
        columns: Which channel of the producer feeds each column of the consumers, int64 ``[in]``.
        consumers: All consumers of the producer's output.
        activations: The format of their input; ``None`` leaves it in floating point.
        activation_range: How the range of a static input is chosen. Only ``minmax`` is taken from
            all tokens, the other rules from the sample (``ema`` takes it for one batch).
        scale_dtype: Dtype in which float scales of weights and inputs are stored.
        record: What calibration saw of the consumers' input, before any scaling.
        vision_weight: What an error at a vision token costs, where one at a text token costs 1.

    Raises:
        FormatError: The parts do not fit one another.
        NumericsError: The vision weight is not a finite number from 0 on.
    """

    name: str
    size: int
    columns: Tensor
    consumers: tuple[Consumer, ...]
    activations: NumberSpec | None
    activation_range: RangeRule
    scale_dtype: torch.dtype
    record: ChannelSizes
    vision_weight: float = 1.0

    def __post_init__(self) -> None:
        features = self.record.in_features
        widths = [consumer.weight.shape[1] for consumer in self.consumers]
        if not widths or any(width != features for width in widths):
            raise FormatError(
                f"consumers with {widths} input features cannot read {features}", where=self.name
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
        return self.activations is not None or any(r.spec is not None for r in self.consumers)

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


@dataclass(frozen=True)
class ScaledEdge:
    """A smooth edge along which scale may move.

    Attributes:
        index: Its place among the model's smooth edges.
    """

    index: int


def scaled_edges(model: ModelOutline, scope: Scope) -> list[ScaledEdge]:
    """The smooth edges of which a consumer is meant, and none shares its weight with another.

    Args:
        model: The model.
        scope: What is meant of it.
    """

    def meant(edge: OutlineEdge) -> bool:
        layers = [model.site(name) for name in edge.consumers]
        return not any(layer.tied for layer in layers) and any(map(scope.means, layers))

    return [ScaledEdge(index) for index, edge in enumerate(model.edges) if meant(edge)]


@dataclass(frozen=True, eq=False)
class EdgeResult:
    """Scale that a method chose for an edge.

    Attributes:
        scale: float32 ``[size]``, positive: the producer is divided by it, the consumers' columns
            are multiplied. ``None``: the edge stays as it is.
        diagnostics: What the record keeps of it; errors are those of :func:`output_error`.
    """

    scale: Tensor | None
    diagnostics: EdgeDiagnostics


def hopeless(problem: EdgeProblem) -> EdgeResult | None:
    """The result of an edge that no statistic can help, or ``None`` where one might.

    Args:
        problem: The edge.

    Returns:
        A result without a scale where nothing is quantized or no token was seen.
    """
    if not problem.quantized:
        return EdgeResult(None, EdgeDiagnostics(skipped=_FLOAT_CONSUMERS))
    if not len(problem.record.inputs):
        return EdgeResult(None, EdgeDiagnostics(skipped=_NO_TOKEN))
    return None
