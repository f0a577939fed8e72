"""Layers that share an input: their statistics, and how they are solved together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prismquant.algorithms.methods import build_fitted, build_solver
from prismquant.algorithms.problem import LayerProblem, LayerResult
from prismquant.algorithms.protocols import Solver
from prismquant.algorithms.split import ColumnProblem
from prismquant.diagnostics.solver_diagnostics import (
    CorrectionDiagnostics,
    Failure,
)
from prismquant.diagnostics.step_record import LayerRecord
from prismquant.distributed import Ranks
from prismquant.engine.calls import StepCall
from prismquant.engine.failure import Guarded, with_way_out
from prismquant.engine.group_moments import Gathered, GroupMoments
from prismquant.engine.static_ranges import MORE_SAMPLES, UNSEEN, StaticRanges
from prismquant.errors import NumericsError
from prismquant.formats.quantized_layer import (
    OutlierColumns,
    QuantizedLayer,
    scale_and_zero_point,
)
from prismquant.models.bound import BoundSite
from prismquant.numerics.finite import all_finite, finiteness
from prismquant.plan.plan import PlanRow
from prismquant.runtime.linear import ActivationQuantizer, QuantLinear
from prismquant.statistics.channel_max import ChannelMax
from prismquant.statistics.tokens import Tokens, summed

What = Literal["columns", "ranges", "moments"]
# What the record is told the tokens of, by what they are taken in for.
_STATISTICS: dict[What, tuple[str, ...]] = {
    "columns": (),
    "ranges": ("input_range", "output_range"),
    "moments": ("hessian",),
}


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


class LayerGroup:
    """Layers that share an input and a scheme.

    Args:
        rows: Their rows of the plan, all alike but for the layer.
        modules: The layers.
        settings: What to know of the run.
        weight: Gives a layer's weight, ``[out, in]``.

    Attributes:
        keeps: Whether its Hessian is kept for others that have the same input.
        gathered: That Hessian, once there was a problem.
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
        self.columns: Tensor | None = None
        width = rows[0].site.in_features
        self._channels = ChannelMax(width, settings.device)
        self._ranges = StaticRanges(rows, settings.device, settings.stored_dtype)
        correction = rows[0].config.correction
        self._moments = GroupMoments(self.name, width, settings.device, correction)
        self._seen: dict[str, Tokens] = {}
        self._kept: list[OutlierColumns | None] = [None] * len(rows)
        self._correction: CorrectionDiagnostics | None = None
        self.keeps = False
        self.gathered: Gathered | None = None

    @property
    def name(self) -> str:
        """Name of its first layer."""
        return self.rows[0].site.name

    def wants(self, what: What) -> bool:
        """Whether a pass over the data is needed for this."""
        row = self.rows[0]
        if what == "columns":
            return row.outliers is not None
        if what == "ranges":
            return row.config.static_input or any(row.config.static_output for row in self.rows)
        gathers = self._moments.given is None
        return gathers and (bool(self.solver.statistics) or row.config.correction is not None)

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
                    self._ranges.update_input(self._without_columns(rows), call)
                    self._count("input_range", call.seen(len(rows)))
            elif self._moments.failure is None:
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
                self._ranges.update_output(row, rows, call)
        if any(row.config.static_output for row in self.rows):
            self._count("output_range", call.seen(x.shape[:-1].numel()))

    def take(self, gathered: Gathered) -> None:
        """Have the Hessian that others with the same input have gathered; no pass is wanted."""
        self._moments.given = gathered
        self._seen["hessian"] = gathered.seen

    def forgo(self, why: str) -> None:
        """Do without moments, whatever may be shown: the layers are rounded to nearest."""
        self._give_up(why)

    def fit_columns(self) -> None:
        """Decide which columns stay in floating point, once their magnitudes are known."""
        room = self.rows[0].outliers
        if room is None:
            return
        transform = build_fitted(room.transform, room.options)
        found = transform.fit(ColumnProblem(self._channels.result()))
        if found:
            self.columns = torch.tensor(found, device=self.settings.device)

    def share(self, what: What, ranks: Ranks) -> None:
        """Let the group know what all ranks have seen."""
        if ranks.size == 1:
            return
        names = _STATISTICS[what]
        self._seen |= summed({n: t for n, t in self._seen.items() if n in names}, ranks)
        if what == "columns":
            self._channels.share(ranks)
        elif what == "ranges":
            self._ranges.share(ranks)
        elif not self._failed_on_any(ranks):
            self._moments.share(ranks)

    def problem(self) -> LayerProblem:
        """The problem for the solver, once everything was observed.

        Raises:
            NumericsError: A weight is not finite, or no calibration token has reached layers that
                cannot do without.
        """
        row = self.rows[0]
        weights = [self._weight(row) for row in self.rows]
        self._ranges.require()
        tokens, hessian = self._moments.tokens, None
        if self._moments.failure is None:
            try:
                if self.wants("moments"):
                    self._moments.require(MORE_SAMPLES, UNSEEN)
                hessian = self._moments.hessian(self.columns)
                weights, self._correction = self._moments.corrected(weights)
            except NumericsError as error:
                if row.config.on_failure == "stop":
                    raise with_way_out(error) from error
                self._give_up(error.what)
        if self._moments.failure is not None:
            # The solver refuses a problem without a Hessian, and its guard rounds it.
            hessian, self._correction = None, None
        if self.keeps and hessian is not None and tokens is not None:
            self.gathered = Gathered(hessian, tokens, self._seen["hessian"])
        self._moments.release()
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
        lost = self._moments.failure
        failure = Failure(lost, wanted) if lost else result.failure
        columns = () if self.columns is None else tuple(int(column) for column in self.columns)
        return [
            (
                QuantizedLayer(
                    row.site.name,
                    weight,
                    self._ranges.input_scale(),
                    self._ranges.output_scale(row),
                    kept,
                ),
                LayerRecord(
                    row.site.name,
                    loss,
                    baseline,
                    result.diagnostics,
                    tokens=self._seen_by(row),
                    input_range=self._ranges.diagnostics(),
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

    def _observe_moments(self, rows: Tensor, call: StepCall, wanted: Tensor | None) -> None:
        weights = call.token_weights(self.settings.vision_weight)
        seen = self._quantized(rows)
        float_rows = None if wanted is None else self._rows(wanted)
        self._moments.update(seen, float_rows, weights, self.settings.products)
        tokens = call.seen(len(rows))
        # Where vision tokens count for nothing, none of them has been seen.
        unseen = call.vision is not None and self.settings.vision_weight == 0
        self._count("hessian", tokens.without_vision if unseen else tokens)

    def _quantized(self, rows: Tensor) -> Tensor:
        """The input as the layer will really see it."""
        spec = self.rows[0].config.activations
        if spec is None or not self.settings.quantized_inputs:
            return rows
        scale, zero_point = scale_and_zero_point(self._ranges.input_scale())
        seen: Tensor = ActivationQuantizer(spec, scale, zero_point, self.columns)(rows)
        return seen

    def _give_up(self, why: str) -> None:
        """Do without moments."""
        self._moments.give_up(why)
        self._seen.pop("hessian", None)

    def _failed_on_any(self, ranks: Ranks) -> bool:
        """Whether the moments are lost; every rank then does without, for the same reason."""
        if self.rows[0].config.on_failure == "stop":
            return False
        told = [why for why in ranks.gather_json(self._moments.failure) if why is not None]
        if told:
            self._give_up(told[0])
        return bool(told)

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
