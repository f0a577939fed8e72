"""Layers that share an input: what is gathered for them, and how they are solved together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prismquant.algorithms.correction import correct
from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import LayerProblem, LayerResult
from prismquant.algorithms.protocols import Solver
from prismquant.algorithms.split import outlying_columns
from prismquant.diagnostics.solver_diagnostics import (
    CorrectionDiagnostics,
    Failure,
    StaticInputRange,
)
from prismquant.diagnostics.step_record import LayerRecord
from prismquant.distributed import Ranks
from prismquant.engine.calls import StepCall
from prismquant.engine.failure import Guarded, with_way_out
from prismquant.errors import NumericsError
from prismquant.formats.quantized_layer import (
    OutlierColumns,
    QuantizedLayer,
    StaticScale,
    scale_and_zero_point,
)
from prismquant.formats.spec import NumberSpec
from prismquant.models.bound import BoundSite
from prismquant.numerics.finite import all_finite, finiteness
from prismquant.numerics.rules import RangeRule
from prismquant.plan.plan import PlanRow
from prismquant.runtime.linear import ActivationQuantizer, QuantLinear
from prismquant.statistics.channel_max import ChannelMax
from prismquant.statistics.drift import Drift
from prismquant.statistics.hessian import Hessian
from prismquant.statistics.input_range import InputRange, static_scale_zero_point
from prismquant.statistics.tokens import Tokens, summed

What = Literal["columns", "ranges", "moments"]
# What the record is told the tokens of, by what they are taken in for.
_STATISTICS: dict[What, tuple[str, ...]] = {
    "columns": (),
    "ranges": ("input_range", "output_range"),
    "moments": ("hessian",),
}

_UNSEEN = "no calibration token reached this layer"
_MORE_SAMPLES = "add samples of the modality that passes it"


@dataclass(frozen=True)
class GroupSettings:
    """Settings of a run that a group needs.

    Attributes:
        device: Where the arithmetic happens.
        stored_dtype: Of scales and of what stays in floating point.
        quantized_inputs: Whether moments are of the inputs as they will be served.
        vision_weight: What a vision token counts for, a text token counting one.
        products: In which dtype the layers multiply.
    """

    device: torch.device
    stored_dtype: torch.dtype
    quantized_inputs: bool
    vision_weight: float
    products: torch.dtype = torch.float32


class Group:
    """Layers that share an input and a scheme.

    Args:
        rows: Their rows of the plan, all alike but for the layer.
        modules: The layers.
        settings: What to know of the run.
        weight: Gives a layer's weight, ``[out, in]``.
    """

    def __init__(
        self,
        rows: Sequence[PlanRow],
        modules: Sequence[nn.Module],
        settings: GroupSettings,
        weight: Callable[[BoundSite], Tensor],
    ) -> None:
        self.rows = rows
        self.modules = modules
        self.settings = settings
        self._weight_of = weight
        solver = build_solver(rows[0].config.solver, rows[0].config.options)
        # Plain rounding has nothing to fall back to.
        self.solver: Solver = (
            Guarded(solver, rows[0].config.on_failure) if solver.statistics else solver
        )
        self._failed: str | None = None
        self.columns: Tensor | None = None
        self._hessian: Hessian | None = None
        self._drift: Drift | None = None
        self._ranges: dict[str, InputRange] = {}
        self._outputs: dict[str, InputRange] = {}
        self._channels = ChannelMax(rows[0].site.in_features, settings.device)
        self._seen: dict[str, Tokens] = {}
        self._input: StaticScale | None = None
        self._kept: list[OutlierColumns | None] = [None] * len(rows)
        self._correction: CorrectionDiagnostics | None = None

    @property
    def name(self) -> str:
        """Name of its first layer."""
        return self.rows[0].site.name

    def wants(self, what: What) -> bool:
        """Whether a pass over the data is needed for this."""
        row = self.rows[0]
        if what == "columns":
            return row.split is not None
        if what == "ranges":
            return row.config.static_input or any(row.config.static_output for row in self.rows)
        return bool(self.solver.statistics) or row.config.correction is not None

    def observe(self, x: Tensor, call: StepCall, what: What, wanted: Tensor | None = None) -> None:
        """Take in one call's input of the layers, any shape that reshapes to [rows, in].

        Args:
            x: The input.
            call: Which rows count, and which are of images and videos.
            what: What it is taken in for.
            wanted: What the float model has in its place, where a correction needs it.
        """
        rows = self._rows(x)
        try:
            if what == "columns":
                self._channels.update(rows, call.row_weights)
            elif what == "ranges":
                if self.rows[0].config.static_input:
                    self._observe_range(self._ranges, self._without_columns(rows), call)
                    self._count("input_range", call.seen(len(rows)))
            elif self._failed is None:
                self._observe_moments(rows, call, wanted)
        except NumericsError as error:
            # A static range cannot be had without these values; moments can be done without.
            if what == "moments" and self.rows[0].config.on_failure == "rtn":
                self._give_up(f"input: {error.what}")
                return
            raise NumericsError(
                error.what, where=f"input of {self.name}", remedy=error.remedy
            ) from error

    def _count(self, statistic: str, tokens: Tokens) -> None:
        self._seen[statistic] = self._seen.get(statistic, Tokens()) + tokens

    def observe_outputs(self, x: Tensor, call: StepCall) -> None:
        """Take in one call's outputs of the layers that have a static range for them."""
        for row, module in self._pairs():
            if row.config.static_output:
                rows = module(x).detach().reshape(-1, row.site.out_features)
                counted = rows if call.row_weights is None else rows[call.row_weights > 0]
                momentum = row.config.activation_range.momentum
                self._outputs.setdefault(row.site.name, InputRange(momentum)).update(counted)
        if any(row.config.static_output for row in self.rows):
            self._count("output_range", call.seen(x.shape[:-1].numel()))

    def split_columns(self) -> None:
        """Decide which columns stay in floating point, once their magnitudes are known."""
        split = self.rows[0].split
        found = [] if split is None else outlying_columns(self._channels.result(), split)
        if found:
            self.columns = torch.tensor(found, device=self.settings.device)

    def share(self, what: What, ranks: Ranks) -> None:
        """Let the group know what all ranks have seen."""
        if ranks.size == 1:
            return
        names = _STATISTICS[what]
        self._seen |= summed({n: t for n, t in self._seen.items() if n in names}, ranks)
        width = self.rows[0].site.in_features
        if what == "columns":
            self._channels.share(ranks)
        elif what == "ranges":
            own = ("text", "vision") if self.rows[0].config.static_input else ()
            self._ranges = self._shared(self._ranges, own, ranks)
            outputs = [row.site.name for row in self.rows if row.config.static_output]
            self._outputs = self._shared(self._outputs, outputs, ranks)
        elif self._failed_on_any(ranks):
            return
        elif self.rows[0].config.correction is not None:
            self._drift = self._drift or Drift(width, self.settings.device, self.name)
            self._drift.share(ranks)
        else:
            self._hessian = self._hessian or Hessian(width, self.settings.device, self.name)
            self._hessian.share(ranks)

    def _shared(
        self, ranges: dict[str, InputRange], names: Sequence[str], ranks: Ranks
    ) -> dict[str, InputRange]:
        """Ranges of what all ranks have seen, by those of the names that any has seen."""
        momentum = self.rows[0].config.activation_range.momentum
        for name in names:
            ranges.setdefault(name, InputRange(momentum)).share(ranks)
        return {name: ranges[name] for name in names if ranges[name].count}

    def problem(self) -> LayerProblem:
        """The problem for the solver, once everything was observed.

        Raises:
            NumericsError: A weight is not finite, or no calibration token has reached layers that
                cannot do without.
        """
        row = self.rows[0]
        weights = [self._weight(row) for row in self.rows]
        self._require_ranges()
        tokens, hessian = self._tokens(), None
        if self._failed is None:
            try:
                hessian = self._moments()
                weights = self._corrected(weights)
            except NumericsError as error:
                if row.config.on_failure == "stop":
                    raise with_way_out(error) from error
                self._give_up(error.what)
        if self._failed is not None:
            # The solver refuses a problem without a Hessian, and its guard rounds it.
            hessian, self._correction = None, None
        self._hessian, self._drift = None, None
        self._kept = self._take_columns(weights)
        return LayerProblem(
            names=tuple(row.site.name for row in self.rows),
            weights=tuple(weights),
            spec=_required(row),
            range_rule=row.config.weight_range,
            scale_dtype=self.settings.stored_dtype,
            hessian=hessian,
            tokens=tokens,
            products=self.settings.products,
        )

    def solved(self, result: LayerResult) -> list[tuple[QuantizedLayer, LayerRecord]]:
        """The layers, with what to tell of each."""
        outcomes = zip(
            self.rows,
            result.weights,
            self._kept,
            result.losses,
            result.baseline_losses,
            strict=True,
        )
        # The first reason counts: without statistics the solver only says that they are missing.
        wanted = self.rows[0].config.solver
        failure = Failure(self._failed, wanted) if self._failed else result.failure
        columns = () if self.columns is None else tuple(int(column) for column in self.columns)
        return [
            (
                QuantizedLayer(
                    row.site.name, weight, self._input_scale(), self._output_scale(row), kept
                ),
                LayerRecord(
                    row.site.name,
                    loss,
                    baseline,
                    result.diagnostics,
                    tokens=self._seen_by(row),
                    input_range=self._input_range(),
                    vision_weight=self.settings.vision_weight,
                    correction=self._correction,
                    split_columns=columns,
                    failure=failure,
                ),
            )
            for row, weight, kept, loss, baseline in outcomes
        ]

    def _seen_by(self, row: PlanRow) -> dict[str, Tokens]:
        """Tokens that each of a layer's statistics has seen; outputs are each layer's own."""
        own = row.config.static_output
        return {name: seen for name, seen in self._seen.items() if own or name != "output_range"}

    def _pairs(self) -> list[tuple[PlanRow, nn.Module]]:
        return list(zip(self.rows, self.modules, strict=True))

    def _rows(self, x: Tensor) -> Tensor:
        """An input as the layer's quantizer sees it, [rows, in]."""
        module = self.modules[0]
        x = x.detach()
        seen = module.rotated(x) if isinstance(module, QuantLinear) else x
        return seen.reshape(-1, self.rows[0].site.in_features)

    def _without_columns(self, rows: Tensor) -> Tensor:
        return rows if self.columns is None else rows.index_fill(1, self.columns, 0.0)

    def _observe_range(self, records: dict[str, InputRange], rows: Tensor, call: StepCall) -> None:
        """Text and vision tokens apart, so that the record can tell them apart.

        A moving average is one of all tokens, batch after batch.
        """
        vision = None if self.rows[0].config.activation_range.kind == "ema" else call.vision
        counted = None if call.row_weights is None else call.row_weights > 0
        parts = {"text": None if vision is None else ~vision}
        if vision is not None:
            parts["vision"] = vision
        for name, part in parts.items():
            mask = part if counted is None else counted if part is None else part & counted
            seen = rows if mask is None else rows[mask]
            if len(seen):
                momentum = self.rows[0].config.activation_range.momentum
                records.setdefault(name, InputRange(momentum)).update(seen)

    def _observe_moments(self, rows: Tensor, call: StepCall, wanted: Tensor | None) -> None:
        weights = call.token_weights(self.settings.vision_weight)
        seen = self._quantized(rows)
        if self.rows[0].config.correction is not None and wanted is not None:
            if self._drift is None:
                self._drift = Drift(rows.shape[1], rows.device, self.name)
            self._drift.update(seen, self._rows(wanted), weights)
        else:
            if self._hessian is None:
                self._hessian = Hessian(rows.shape[1], rows.device, self.name)
            # What is rounded for the layer's product can be rounded here, where it saves time.
            self._hessian.update(seen.to(self.settings.products), weights)
        tokens = call.seen(len(rows))
        # Where vision tokens count for nothing, none of them has been seen.
        unseen = call.vision is not None and self.settings.vision_weight == 0
        self._count("hessian", tokens.without_vision if unseen else tokens)

    def _quantized(self, rows: Tensor) -> Tensor:
        """The input as the layer will really see it."""
        spec = self.rows[0].config.activations
        if spec is None or not self.settings.quantized_inputs:
            return rows
        scale, zero_point = scale_and_zero_point(self._input_scale())
        seen: Tensor = ActivationQuantizer(spec, scale, zero_point, self.columns)(rows)
        return seen

    def _moments(self) -> Tensor | None:
        """The Hessian, if it was gathered; the split columns are no longer in it."""
        record = self._drift or self._hessian
        if record is None:
            if self.wants("moments"):
                raise NumericsError(_UNSEEN, where=self.name, remedy=_MORE_SAMPLES)
            return None
        hessian = record.result(consume=True)
        if self.columns is None:
            return hessian
        return hessian.index_fill(0, self.columns, 0.0).index_fill(1, self.columns, 0.0)

    def _corrected(self, weights: list[Tensor]) -> list[Tensor]:
        """The weights that are to be approached."""
        correction = self.rows[0].config.correction
        if self._drift is None or correction is None:
            return weights
        corrected, self._correction = correct(self._drift, weights, correction)
        return list(corrected)

    def _tokens(self) -> float | None:
        """Number of tokens that the Hessian is of."""
        record = self._drift or self._hessian
        return None if record is None else record.count

    def _give_up(self, why: str) -> None:
        """Do without moments."""
        self._failed, self._hessian, self._drift = why, None, None
        self._seen.pop("hessian", None)

    def _failed_on_any(self, ranks: Ranks) -> bool:
        """Whether the moments are lost; every rank then does without, for the same reason."""
        if self.rows[0].config.on_failure == "stop":
            return False
        told = [why for why in ranks.gather_json(self._failed) if why is not None]
        if told:
            self._give_up(told[0])
        return bool(told)

    def _require_ranges(self) -> None:
        """Refuse a static range that has seen nothing: it has no scale, and rounding needs one."""
        sides = [
            ("input", row) for row in self.rows if row.config.static_input and not self._ranges
        ]
        sides += [
            ("output", row)
            for row in self.rows
            if row.config.static_output and row.site.name not in self._outputs
        ]
        for side, row in sides:
            raise NumericsError(
                f"{_UNSEEN}, so its static {side} has no scale",
                where=row.site.name,
                remedy=f"{_MORE_SAMPLES}, or use dynamic activations; `on_failure: rtn` cannot "
                "help a static range",
            )

    def _take_columns(self, weights: list[Tensor]) -> list[OutlierColumns | None]:
        """Take the split columns out of the weights, in place of the list's entries."""
        if self.columns is None:
            return [None] * len(weights)
        kept: list[OutlierColumns | None] = []
        for index, weight in enumerate(weights):
            values = weight[:, self.columns].to(self.settings.stored_dtype)
            kept.append(OutlierColumns(self.columns, values))
            weights[index] = weight.index_fill(1, self.columns, 0.0)
        return kept

    def _input_scale(self) -> StaticScale | None:
        row = self.rows[0]
        if (
            row.config.activations is None
            or not row.config.activations.calibrated
            or not self._ranges
        ):
            return None
        if self._input is None:
            merged = InputRange(row.config.activation_range.momentum)
            for record in self._ranges.values():
                merged.merge(record)
            self._input = self._static(merged, row.config.activations, row.config.activation_range)
        return self._input

    def _output_scale(self, row: PlanRow) -> StaticScale | None:
        if row.config.outputs is None or row.site.name not in self._outputs:
            return None
        return self._static(
            self._outputs[row.site.name], row.config.outputs, row.config.activation_range
        )

    def _static(self, record: InputRange, spec: NumberSpec, rule: RangeRule) -> StaticScale:
        device, dtype = self.settings.device, self.settings.stored_dtype
        scale, zero_point, low, high = static_scale_zero_point(
            record, rule, spec.grid, spec.symmetric, dtype, spec.scale
        )
        zero_point = None if zero_point is None else zero_point.to(device)
        return StaticScale(scale.to(device), zero_point, low, high)

    def _input_range(self) -> StaticInputRange | None:
        """The static input range for the record, of the modalities together and apart."""
        static, spec = self._input_scale(), self.rows[0].config.activations
        if static is None or spec is None:
            return None
        apart = self._ranges if len(self._ranges) > 1 else {}
        extremes = {
            name: record.result(RangeRule("minmax"), spec.grid, spec.symmetric)
            for name, record in apart.items()
        }
        return StaticInputRange(static.low, static.high, extremes)

    def _weight(self, row: PlanRow) -> Tensor:
        matrix = self._weight_of(row.site).to(torch.float32)
        require_finite(matrix, row.site.name)
        return matrix


def require_finite(weight: Tensor, name: str) -> None:
    """Refuse a damaged weight.

    Raises:
        NumericsError: It holds NaN or infinities; names the layer and says how many.
    """
    if not all_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise NumericsError(
            f"the weight holds {bad} values that are NaN or infinite: {finiteness(weight)}",
            where=name,
            remedy="the source checkpoint is damaged: download or convert it again",
        )


def _required(row: PlanRow) -> Any:
    if row.config.weights is None:
        raise NumericsError("a layer without a weight format reached a solver", where=row.site.name)
    return row.config.weights
