"""Layers that need nothing from data: rounded straight from their weights, as stored on disk.

A weight stays in the dtype that it has on disk and is widened a block of rows at a time, while the
block is in the cache. Codes, losses and diagnostics are those of the solver, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import scale_format
from prismquant.algorithms.protocols import WeightSolver
from prismquant.diagnostics.step_record import LayerRecord
from prismquant.engine.group import require_finite
from prismquant.engine.unit_plan import Quantizing
from prismquant.engine.walk import Unit
from prismquant.errors import NumericsError
from prismquant.formats.quantized_layer import QuantizedLayer
from prismquant.numerics.finite import check_finite
from prismquant.plan.plan import PlanRow


def is_rounded(row: PlanRow) -> bool:
    """Whether a layer's codes and scales come from its weight alone."""
    solver = build_solver(row.config.solver, row.config.options)
    return not row.needs_data and isinstance(solver, WeightSolver)


def round_layers(
    unit: Unit, rows: Sequence[PlanRow], how: Quantizing
) -> Iterator[tuple[QuantizedLayer, LayerRecord]]:
    """Round layers that share an input, and the global scale where there is one.

    Args:
        unit: Gives their weights.
        rows: Their rows of the plan, all alike but for the layer.
        how: What holds for the run; its ``pulse`` is called between blocks of rows.

    Yields:
        Each layer, with what to tell of it.

    Raises:
        NumericsError: A weight is not finite; names the layer and says how many values.
    """
    spec, site = rows[0].config.weights, rows[0].site
    solver = build_solver(rows[0].config.solver, rows[0].config.options)
    if spec is None or not isinstance(solver, WeightSolver):
        return

    def weight_of(row: PlanRow) -> Tensor:
        how.pulse()
        return unit.weight(row.site)

    # Only a global scale needs all the weights at once.
    kept = [weight_of(row) for row in rows] if spec.scale == "e4m3" else []
    try:
        largest = [_magnitude(weight) for weight in kept]
        form = scale_format(spec, rows[0].config.weight_range, site.dtype, largest)
        for index, row in enumerate(rows):
            weight = kept[index] if kept else weight_of(row)
            rule = row.config.weight_range
            rounded = solver.solve_weight(weight, spec, rule, form, how.pulse)
            record = LayerRecord(
                row.site.name,
                rounded.loss,
                rounded.loss,
                rounded.diagnostics,
                vision_weight=how.vision_weight(row),
            )
            yield QuantizedLayer(row.site.name, rounded.weight), record
    except NumericsError:
        for row in rows:
            require_finite(weight_of(row), row.site.name)
        raise


def _magnitude(weight: Tensor) -> Tensor:
    """The largest magnitude of a weight as float32, without a copy of the weight."""
    check_finite(weight, "the weight")
    low, high = torch.aminmax(weight)
    return torch.maximum(-low, high).to(torch.float32)
