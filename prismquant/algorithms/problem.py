"""A solver's problem and its result: layers that share an input, and the codes chosen for them.

A problem is one input and all the layers that read it (the query, key and value projections; gate
and up): they have one Hessian, so a solver factorizes it once. The measure of success is the same
for every method and does not depend on how the codes were chosen:

    loss = trace((W - Q) H (W - Q)^T),    H = mean of x x^T over the calibration tokens

which is the mean squared error of the layer's output, summed over output features; without a
Hessian it is the squared error of the weight. Rows of a weight never interact, so it is a sum over
rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError, NumericsError, PrismQuantError
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.numerics.finite import check_finite
from prismquant.numerics.ranges import RangeRule
from prismquant.numerics.scales import (
    E4M3_MOST,
    E4M3_MOST_4_OVER_6,
    AnyScale,
    ScaleFormat,
    global_scale,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prismquant.diagnostics.solver_diagnostics import Failure, SolverDiagnostics
    from prismquant.formats.spec import NumberSpec

# Columns of a Hessian multiplied at once where its symmetry is used.
LOSS_BLOCK = 512


@dataclass(frozen=True)
class ProblemShape:
    """Sizes of a problem, on which its cost and its memory depend.

    Attributes:
        in_features: Columns of the weights.
        rows: Of all layers that are solved together.
        hessian: Whether there is a Hessian.
    """

    in_features: int
    rows: int
    hessian: bool = True


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Layers to quantize that are all fed by the same input.

    Attributes:
        names: What errors call the layers.
        weights: float32 ``[out_i, in]``, one for each name.
        spec: The format of all of them: static, tensor, channel, group or block granularity.
        range_rule: How scales are chosen.
        scale_dtype: How scales are stored; they are rounded to that before codes are chosen. A
            dtype is that of float scales; for scales of 8 bits, what else it takes follows from the
            format and the weights.
        hessian: Mean of ``x x^T`` over the counted tokens, float32 ``[in, in]``, symmetric;
            ``None`` when nothing was calibrated. A solver may work in its memory, and leaves it as
            it was; so it is one solver's at a time.
        tokens: How many tokens, each by its weight, the Hessian is the mean over; ``None`` when
            that is not known. Only errors tell it.
        products: To what solvers may round factors of large products: float32 leaves them as they
            are; bfloat16 is what layers that multiply in it give away anyway.

    Raises:
        FormatError: The parts do not fit one another, or the format is one of activations.
        NumericsError: A weight or the Hessian holds NaN or an infinity, or the Hessian's diagonal a
            negative number.
    """

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    spec: NumberSpec
    range_rule: RangeRule
    scale_dtype: AnyScale
    hessian: Tensor | None = None
    tokens: float | None = None
    products: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.weights):
            raise FormatError(
                f"{len(self.names)} names cannot stand for {len(self.weights)} weights",
                where=self.title,
            )
        shapes = [tuple(weight.shape) for weight in self.weights]
        if any(len(s) != 2 or s[1] != self.in_features or 0 in s for s in shapes):
            raise FormatError(
                f"weights that share an input must be [out, in] with one in, not {shapes}",
                where=self.title,
            )
        if any(weight.dtype != torch.float32 for weight in self.weights):
            raise FormatError(
                f"solvers work on float32, not {[weight.dtype for weight in self.weights]}",
                where=self.title,
            )
        if self.spec.dynamic:
            raise FormatError(
                f"{self.spec.describe()} is a format of activations",
                where=self.title,
                remedy="use a static format for weights",
            )
        for name, weight in zip(self.names, self.weights, strict=True):
            try:
                self.spec.scale_shape(*weight.shape)
                check_finite(weight, "the weight")
            except PrismQuantError as error:
                raise type(error)(error.what, where=name, remedy=error.remedy) from error
        if self.hessian is not None:
            self._check_hessian(self.hessian)

    @property
    def in_features(self) -> int:
        """Columns of every weight."""
        return int(self.weights[0].shape[-1])

    @property
    def shape(self) -> ProblemShape:
        """The sizes of the problem."""
        rows = sum(len(weight) for weight in self.weights)
        return ProblemShape(self.in_features, rows, self.hessian is not None)

    @property
    def scale_format(self) -> ScaleFormat:
        """Storage format of the scales; one global scale serves all layers, as in servers."""
        largest = (weight.abs().amax() for weight in self.weights)
        return scale_format(self.spec, self.range_rule, self.scale_dtype, largest)

    @property
    def title(self) -> str:
        """The names, for an error."""
        return ", ".join(self.names)

    @property
    def seen(self) -> str:
        """Number of tokens that the Hessian is of, for an error; empty where that is not known."""
        return "" if self.tokens is None else f" over {self.tokens:g} tokens"

    def _check_hessian(self, hessian: Tensor) -> None:
        expected = (self.in_features, self.in_features)
        if tuple(hessian.shape) != expected:
            raise FormatError(
                f"the Hessian of {self.in_features} input features must be {list(expected)}, "
                f"not {list(hessian.shape)}",
                where=self.title,
            )
        try:
            check_finite(hessian, f"the Hessian{self.seen}")
        except NumericsError as error:
            raise NumericsError(error.what, where=self.title, remedy=error.remedy) from error
        lowest = float(hessian.diagonal().min())
        if lowest < 0:
            raise NumericsError(
                f"the diagonal of the Hessian{self.seen} holds {lowest:.4g}, a mean of squares is "
                f"never negative; its largest entry is {float(hessian.diagonal().max()):.4g}",
                where=self.title,
                remedy="check the calibration data, or use solver: rtn for this layer",
            )


@dataclass(frozen=True, eq=False)
class LayerResult:
    """Codes that a solver chose, and what they cost.

    Attributes:
        weights: One for each layer of the problem, in its order.
        losses: The module's loss of each layer.
        baseline_losses: The loss of rounding to nearest with the same scales.
        diagnostics: How the codes of all the layers were chosen, for the record.
        failure: Why they were rounded to nearest in place of being solved; None: they were solved.
    """

    weights: tuple[QuantizedTensor, ...]
    losses: tuple[float, ...]
    baseline_losses: tuple[float, ...]
    diagnostics: SolverDiagnostics
    failure: Failure | None = None


@dataclass(frozen=True, eq=False)
class SolvedWeight:
    """A weight that was solved by itself.

    Attributes:
        weight: Its codes and scales.
        loss: The squared error, summed over the weight.
        diagnostics: How its codes were chosen, for the record.
    """

    weight: QuantizedTensor
    loss: float
    diagnostics: SolverDiagnostics


def scale_format(
    spec: NumberSpec, rule: RangeRule, scale_dtype: AnyScale, magnitudes: Iterable[Tensor]
) -> ScaleFormat:
    """Storage format of the scales of weights that are served as one.

    Args:
        spec: Their format.
        rule: How their scales are chosen.
        scale_dtype: Dtype of float scales, or the whole format where it is known already.
        magnitudes: The largest magnitude of each weight, a scalar; E4M3 scales need it, of which
            all the weights have one global scale.

    Returns:
        The format.

    Raises:
        FormatError: ``scale_dtype`` is a format of another kind.
    """
    if isinstance(scale_dtype, ScaleFormat):
        if scale_dtype.kind != spec.scale:
            raise FormatError(
                f"scales of the kind {scale_dtype.kind} are not those of {spec.describe()}"
            )
        return scale_dtype
    if spec.scale != "e4m3":
        return ScaleFormat(scale_dtype, spec.scale)
    most = E4M3_MOST_4_OVER_6 if rule.kind == "four_over_six" else E4M3_MOST
    largest = torch.stack(list(magnitudes)).amax()
    return ScaleFormat(scale_dtype, spec.scale, global_scale(largest, spec.grid, most))


def row_losses(error: Tensor, hessian: Tensor | None) -> Tensor:
    """The loss of each row.

    Args:
        error: ``W - Q``, float32 ``[out, in]``.
        hessian: Symmetric ``[in, in]``, of which the upper triangle is read; or ``None`` for the
            squared error of the weight.

    Returns:
        float64 ``[out]``, never negative.
    """
    if hessian is None:
        return error.square().sum(dim=1, dtype=torch.float64)
    hessian = hessian.to(error.device, error.dtype)
    losses = torch.zeros(len(error), dtype=torch.float64, device=error.device)
    for start in range(0, len(hessian), LOSS_BLOCK):
        stop = start + LOSS_BLOCK
        lines, own = hessian[start:stop], error[:, start:stop]
        corner = lines[:, start:stop]
        # A pair of columns counts twice, but is multiplied only once.
        image = own @ (corner.triu() + corner.triu(1).T)
        image.addmm_(error[:, stop:], lines[:, stop:].T, alpha=2)
        losses += image.mul_(own).sum(dim=1, dtype=torch.float64)
    # A positive semidefinite form can only come out negative by rounding.
    return losses.clamp_min_(0.0)
