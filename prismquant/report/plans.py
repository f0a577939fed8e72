"""Tables of what will be done to a model, and of what was done, from the files that say so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from prismquant.diagnostics.expert_coverage import coverage_lines
from prismquant.diagnostics.failed_layers import failed_layers
from prismquant.diagnostics.step_record import StepRecord
from prismquant.report.plan_summary import FLOAT, PlannedEdge, PlannedLayer, PlanSummary
from prismquant.report.run_files import RunFiles
from prismquant.report.tables import format_bytes, format_figure, rich_table
from prismquant.run.record import RunRecord
from prismquant.statistics.tokens import Tokens

_TOWERS = {"vision": "vision tower", "projector": "projector", "llm": "language model"}


def layer_table(plan: PlanSummary) -> Table:
    """One row for all layers that differ only in their block: what, how stored, by which method.

    A layer of many blocks is named once, with ``*`` for the numbers of its blocks.
    """
    headers = ["layer", "count", "role", "shape", "weights", "input", "solver", "bytes", "note"]
    alike: dict[tuple[str, ...], list[PlannedLayer]] = {}
    for row in plan.layers:
        alike.setdefault(_likeness(row), []).append(row)
    rows = [
        [_common_name(group), str(len(group)), *what, format_bytes(_stored(group)), note]
        for (_, *what, note), group in alike.items()
    ]
    rows += [[name, "", "", "", FLOAT, "", "", "", reason] for name, reason in plan.left_alone]
    table = rich_table(headers, rows, title=f"{plan.architecture}, recipe {plan.recipe}")
    for column in (*table.columns[2:7], table.columns[8]):
        column.justify = "left"
    # The note folds before the name does.
    table.columns[8].max_width = 28
    return table


def totals_table(plan: PlanSummary) -> Table:
    """Layers and bytes by modality and for the whole model."""
    headers = ["", "layers", "quantized", "before", "after", "of it"]
    rows = [
        _totals(
            name, entry["layers"], entry["quantized"], entry["float_bytes"], entry["stored_bytes"]
        )
        for name, entry in plan.totals.items()
    ]
    rows.append(_totals("other tensors", None, None, plan.other_bytes, plan.other_bytes))
    quantized = sum(layer.quantized for layer in plan.layers)
    rows.append(_totals("model", len(plan.layers), quantized, plan.float_bytes, plan.total_bytes))
    return rich_table(headers, rows, title="weights on disk")


def transform_table(plan: PlanSummary) -> Table | None:
    """Changes of the model before anything is rounded; None where there are none."""
    headers = ["transform", "where", "count", "options"]
    rows = [
        ["rotation", f"{modality} tower", "1", _options(options)]
        for modality, options in plan.towers
    ]
    alike: dict[tuple[str, ...], list[PlannedEdge]] = {}
    for edge in plan.edges:
        where = re.sub(r"\d+", "*", edge.source)
        alike.setdefault((edge.transform, where, _options(edge.options)), []).append(edge)
    rows += [[name, where, str(len(e)), said] for (name, where, said), e in alike.items()]
    keeping = Counter(layer.columns for layer in plan.layers if layer.columns)
    rows += [[n, "where one column sets the range", str(k), ""] for n, k in keeping.items()]
    if not rows:
        return None
    table = rich_table(headers, rows, title="before anything is rounded")
    for column in (table.columns[1], table.columns[3]):
        column.justify = "left"
    return table


def _options(options: Mapping[str, Any]) -> str:
    given = {k: v for k, v in options.items() if v is not None}
    flags = {True: "{}", False: "no {}"}
    return ", ".join(
        flags[value].format(key) if isinstance(value, bool) else f"{key} {value}"
        for key, value in given.items()
    )


def run_table(files: RunFiles) -> Table:
    """One row per step: its layers, the method's loss against rounding to nearest, the time."""
    plan, record = files.plan, files.record
    headers = ["step", "layers", "loss", "of rounding's", "seconds", "remarks"]
    rows = []
    for step in record.steps:
        if not step.layers and not step.kv_cache:
            continue
        loss = sum(layer.loss for layer in step.layers)
        baseline = sum(layer.baseline_loss for layer in step.layers)
        share = f"{loss / baseline:.3f}" if baseline else ""
        count = str(len(step.layers))
        remark = _remark(step)
        told = format_figure(loss) if step.layers else ""
        rows.append([step.name, count, told, share, f"{step.seconds:.2f}", remark])
    before, after = format_bytes(plan.float_bytes), format_bytes(plan.total_bytes)
    title = f"recipe {plan.recipe}: {before} to {after} in {record.seconds:.1f} s"
    return rich_table(headers, rows, title=title)


def memory_line(record: RunRecord) -> str:
    """The peak of memory that was measured, beside the one that was predicted."""
    told = record.memory
    predicted = format_bytes(int(told.get("predicted_peak_bytes", 0)))
    budget = f", budget {format_bytes(int(told['budget_bytes']))}" if "budget_bytes" in told else ""
    measured = format_bytes(record.peak_memory_bytes)
    return f"peak memory {measured}, predicted {predicted}{budget}; {told.get('placement', '')}"


def token_lines(files: RunFiles) -> list[str]:
    """Tokens of each modality that the statistics have seen, a line for each tower; more where
    layers of one tower differ; and those that experts were sent.
    """
    towers = {layer.name: layer.modality for layer in files.plan.layers}
    found: dict[tuple[str, Tokens], list[str]] = {}
    for layer in (layer for step in files.record.steps for layer in step.layers):
        for statistic, tokens in layer.tokens.items() if layer.routed is None else ():
            found.setdefault((towers[layer.name], tokens), []).append(statistic)
    alike = Counter(tower for tower, _ in found)
    lines = [
        f"statistics of the {_TOWERS.get(tower, tower)}"
        + (f" ({', '.join(sorted(set(names)))})" if alike[tower] > 1 else "")
        + f" have seen {tokens.describe()}"
        for (tower, tokens), names in found.items()
    ]
    return lines + coverage_lines(files.record.steps)


def _remark(step: StepRecord) -> str:
    """Remarks on a step that did not go as the plan may suggest, and on what tuning brought."""
    parts = []
    kept = [edge for edge in step.edges if edge.diagnostics.skipped]
    if kept:
        parts.append(f"{len(kept)} of {len(step.edges)} edges not worth scaling")
    failed = failed_layers(step.layers)
    if failed:
        parts.append(f"{len(failed)} of {len(step.layers)} layers failed: rounded to nearest")
    split = [layer for layer in step.layers if layer.split_columns]
    if split:
        parts.append(f"columns split off in {len(split)}")
    tuned = next((layer.tuning for layer in step.layers if layer.tuning), None)
    if tuned is not None and tuned.loss_before > 0:
        parts.append(f"block error tuned to {tuned.loss / tuned.loss_before:.2f}")
    bias = None if step.kv_cache is None else step.kv_cache.bias
    if bias is not None:
        parts.append(
            f"the key bias makes {100 * bias.energy:.0f} % of the keys' energy and "
            f"{100 * bias.range:.0f} % of their range"
        )
    return "; ".join(parts)


def _likeness(layer: PlannedLayer) -> tuple[str, ...]:
    """Key of layers that share a row of the table: name without numbers, and all columns."""
    return (
        re.sub(r"\d+", "*", layer.name),
        layer.role,
        " x ".join(map(str, layer.shape)),
        layer.weights,
        layer.activations,
        layer.method,
        layer.note,
    )


def _common_name(group: Sequence[PlannedLayer]) -> str:
    """The layers' name, with ``*`` for a number in which they differ."""
    parts = zip(*(layer.name.split(".") for layer in group), strict=True)
    return ".".join(options[0] if len(set(options)) == 1 else "*" for options in parts)


def _stored(group: Sequence[PlannedLayer]) -> int:
    return sum(layer.stored_bytes for layer in group)


def _totals(
    name: str, layers: int | None, quantized: int | None, before: int, after: int
) -> list[str]:
    share = f"{100 * after / before:.1f} %" if before else ""
    counts = ["" if n is None else str(n) for n in (layers, quantized)]
    return [name, *counts, format_bytes(before), format_bytes(after), share]
