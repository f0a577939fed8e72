"""Layers that are not as the recipe has them, readers that cannot load them, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prismquant.plan.plan import PlanRow
from prismquant.recipe.resolve import Resolved


def remarks_on(rows: Sequence[PlanRow], resolved: Mapping[str, Resolved]) -> tuple[str, ...]:
    """Remarks on formats that fell back, and on readers that cannot load the checkpoint.

    Args:
        rows: The layers.
        resolved: What the recipe asks of each, by name.
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        asked = resolved[row.site.name].config
        planned = (row.config.weights, row.config.activations)
        if row.quantized and planned != (asked.weights, asked.activations):
            found.setdefault(row.note, []).append(row.site.name)
    for row in rows:
        for why in _obstacles(row):
            found.setdefault(why, []).append(row.site.name)
    return tuple(f"{why}: {names[0]}{_and_more(names)}" for why, names in found.items())


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _obstacles(row: PlanRow) -> list[str]:
    found = []
    if row.online is not None and row.online.seed is not None:
        found.append("only prismquant.load applies signs before a rotation at run time")
    elif row.online is not None and row.site.has_bias:
        found.append("vLLM has no rotation before a layer with a bias; prismquant.load has")
    elif row.online is not None:
        found.append(
            "the rotation at run time is declared as a transform of compressed-tensors: vLLM "
            "applies it without tensor parallelism, transformers ignores it and computes nonsense"
        )
    if row.outliers is not None:
        found.append("only prismquant.load keeps split columns in floating point")
    if row.private_activations:
        found.append(
            f"no checkpoint format declares {row.config.describe()}: only prismquant.load does it"
        )
    elif row.config.undeclared_rounding:
        found.append(
            "no checkpoint format declares how the scales of dynamic MX inputs are rounded: only "
            "prismquant.load does it as the recipe says, transformers does it as compressed-tensors"
        )
    elif any(spec is not None and spec.narrow and spec.dynamic for spec in row.config.sides):
        found.append(
            "no checkpoint format declares narrow inputs with dynamic scales: prismquant.load "
            "divides by the highest code as the recipe says, compressed-tensors by half a step more"
        )
    return found
