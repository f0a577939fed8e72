"""Predicted and measured losses of layers side by side, from the record of a run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from prismquant.diagnostics.predictions import Predictions
from prismquant.report.tables import format_figure, rich_table
from prismquant.run.record import RunRecord

_SHOWN = 8
# Statistics of a layer without which its loss is of its weight, and no input could change it.
_NEEDED = "hessian"


@dataclass(frozen=True)
class LayerComparison:
    """Layer whose loss an analysis predicted, and a run measured.

    Attributes:
        layer: Its name.
        unit: Its unit of choice.
        format: Its format.
        predicted: Loss that the solver reached in the analysis, on inputs of the float model.
        measured: Loss that it reached in the run, on inputs as layers before have left them.
        ratio: Measured through predicted; None where nothing was predicted but zero.
        failed: Whether it was rounded to nearest in the run because its solver failed.
        losses: Predicted loss of the model, by class of token, of the whole unit.
    """

    layer: str
    unit: str
    format: str
    predicted: float
    measured: float
    ratio: float | None
    failed: bool
    losses: Mapping[str, float]


def compared_layers(record: RunRecord) -> list[LayerComparison]:
    """All layers with a prediction whose loss depends on their input, the largest ratio first.

    Layers that are rounded without statistics are left out: their loss is that of their weight.
    """
    if record.predictions is None:
        return []
    layers = {layer.name: layer for step in record.steps for layer in step.layers}
    found = [
        LayerComparison(
            layer=name,
            unit=unit.unit,
            format=unit.format,
            predicted=predicted,
            measured=layers[name].loss,
            ratio=layers[name].loss / predicted if predicted else None,
            failed=layers[name].failure is not None,
            losses=unit.losses,
        )
        for unit in record.predictions.units
        for name, predicted in unit.layers.items()
        if name in layers and _NEEDED in layers[name].tokens
    ]
    return sorted(found, key=lambda one: -(one.ratio or 0.0))


def comparison_table(record: RunRecord, most: int = _SHOWN) -> Table | None:
    """Layers whose loss has grown most since the analysis; None where none can be compared.

    Args:
        record: Of the run.
        most: Rows at most.
    """
    found, predictions = compared_layers(record), record.predictions
    ratios = [one.ratio for one in found if one.ratio is not None]
    if predictions is None or not ratios:
        return None
    kinds = list(dict.fromkeys(kind for one in found for kind in one.losses))[:2]
    unit = "KL" if predictions.in_nats else predictions.method
    heads = [f"unit's {unit}, {kind}" for kind in kinds]
    rows = [
        [
            one.layer,
            one.format,
            format_figure(one.predicted),
            format_figure(one.measured),
            "" if one.ratio is None else f"{one.ratio:.2f}{' (rounded)' if one.failed else ''}",
            *(f"{one.losses[kind]:.3g}" if kind in one.losses else "" for kind in kinds),
        ]
        for one in found[:most]
    ]
    some = f"the {most} largest of {len(found)}" if len(found) > most else f"{len(found)} layers"
    title = (
        f"error of layers' outputs: measured against predicted by the analysis, {some} "
        f"(median {statistics.median(ratios):.2f}){_on_what(predictions)}"
    )
    table = rich_table(
        ["layer", "format", "predicted", "measured", "ratio", *heads],
        rows,
        title=title,
    )
    table.columns[1].justify = "left"
    return table


def _on_what(predictions: Predictions) -> str:
    """End of the heading: whose samples and whose weights the two losses are of."""
    told = "samples that may be others than the analysis'"
    if predictions.same_samples is not None:
        same = predictions.same_samples
        told = "the samples of the analysis" if same else "other samples than the analysis"
    other = ", which was of a model with other files" if predictions.same_files is False else ""
    return f", on {told}{other}"
