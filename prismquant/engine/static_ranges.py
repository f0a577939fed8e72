"""Static ranges of the input and the outputs of layers that share an input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prismquant.diagnostics.solver_diagnostics import StaticInputRange
from prismquant.distributed import Ranks
from prismquant.engine.calls import StepCall
from prismquant.errors import NumericsError
from prismquant.formats.quantized_layer import StaticScale
from prismquant.formats.spec import NumberSpec
from prismquant.numerics.rules import RangeRule
from prismquant.plan.plan import PlanRow
from prismquant.statistics.input_range import InputRange, static_scale_zero_point

UNSEEN = "no calibration token reached this layer"
MORE_SAMPLES = "add samples of the modality that passes it"


class StaticRanges:
    """Ranges that calibration finds for layers which share an input.

    Args:
        rows: Their rows of the plan, all alike but for the layer.
        device: Where scales are wanted.
        stored_dtype: Of scales.
    """

    def __init__(
        self, rows: Sequence[PlanRow], device: torch.device, stored_dtype: torch.dtype
    ) -> None:
        self._rows, self._config = rows, rows[0].config
        self._device, self._dtype = device, stored_dtype
        self._inputs: dict[str, InputRange] = {}
        self._outputs: dict[str, InputRange] = {}
        self._input: StaticScale | None = None

    def update_input(self, rows: Tensor, call: StepCall) -> None:
        """Take in an input ``[rows, in]``: text and vision tokens apart, for the record.

        A moving average is one of all tokens, batch after batch.
        """
        vision = None if self._config.activation_range.ordered else call.vision
        counted = None if call.row_weights is None else call.row_weights > 0
        parts = {"text": None if vision is None else ~vision}
        if vision is not None:
            parts["vision"] = vision
        for name, part in parts.items():
            mask = part if counted is None else counted if part is None else part & counted
            seen = rows if mask is None else rows[mask]
            if len(seen):
                self._inputs.setdefault(name, self._fresh()).update(seen)

    def update_output(self, row: PlanRow, rows: Tensor, call: StepCall) -> None:
        """Take in an output ``[rows, out]`` of one of the layers."""
        counted = rows if call.row_weights is None else rows[call.row_weights > 0]
        self._outputs.setdefault(row.site.name, self._fresh()).update(counted)

    def share(self, ranks: Ranks) -> None:
        """Take in what all ranks have seen."""
        inputs = ("text", "vision") if self._config.static_input else ()
        self._inputs = self._shared(self._inputs, inputs, ranks)
        outputs = [row.site.name for row in self._rows if row.config.static_output]
        self._outputs = self._shared(self._outputs, outputs, ranks)

    def require(self) -> None:
        """Refuse a static range that has seen nothing: it has no scale, and rounding needs one.

        Raises:
            NumericsError: There is one; names the layer.
        """
        sides = [("input", row) for row in self._rows if row.config.static_input]
        unseen = sides if not self._inputs else []
        unseen += [
            ("output", row)
            for row in self._rows
            if row.config.static_output and row.site.name not in self._outputs
        ]
        for side, row in unseen:
            raise NumericsError(
                f"{UNSEEN}, so its static {side} has no scale",
                where=row.site.name,
                remedy=f"{MORE_SAMPLES}, or use dynamic activations; `on_failure: rtn` cannot "
                "help a static range",
            )

    def input_scale(self) -> StaticScale | None:
        """The static scale of the input, if it has one."""
        spec, rule = self._config.activations, self._config.activation_range
        if spec is None or not spec.calibrated or not self._inputs:
            return None
        if self._input is None:
            merged = self._fresh()
            for record in self._inputs.values():
                merged.merge(record)
            self._input = self._static(merged, spec, rule)
        return self._input

    def output_scale(self, row: PlanRow) -> StaticScale | None:
        """The static scale of a layer's output, if it has one."""
        if row.config.outputs is None or row.site.name not in self._outputs:
            return None
        rule = row.config.activation_range
        return self._static(self._outputs[row.site.name], row.config.outputs, rule)

    def diagnostics(self) -> StaticInputRange | None:
        """The static input range for the record, of the modalities together and apart."""
        static, spec = self.input_scale(), self._config.activations
        if static is None or spec is None:
            return None
        apart = self._inputs if len(self._inputs) > 1 else {}
        extremes = {
            name: record.result(RangeRule("minmax"), spec.grid, spec.symmetric)
            for name, record in apart.items()
        }
        return StaticInputRange(static.low, static.high, extremes)

    def _fresh(self) -> InputRange:
        return InputRange(self._config.activation_range.momentum)

    def _shared(
        self, ranges: dict[str, InputRange], names: Sequence[str], ranks: Ranks
    ) -> dict[str, InputRange]:
        """Ranges of what all ranks have seen, by those of the names that any has seen."""
        for name in names:
            ranges.setdefault(name, self._fresh()).share(ranks)
        return {name: ranges[name] for name in names if ranges[name].count}

    def _static(self, record: InputRange, spec: NumberSpec, rule: RangeRule) -> StaticScale:
        scale, zero_point, low, high = static_scale_zero_point(
            record, rule, spec.grid, spec.symmetric, self._dtype, spec.scale
        )
        zero_point = None if zero_point is None else zero_point.to(self._device)
        return StaticScale(scale.to(self._device), zero_point, low, high)
