"""Findings of an analysis as tables: the most sensitive units, and sums by modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from prismquant.memory import readable_bytes
from prismquant.report.tables import NOTHING, as_text, rich_table

if TYPE_CHECKING:
    from prismquant.search.sensitivity import ChoiceUnit, FormatOption, Sensitivity

_SHOWN = 12


def unit_table(found: Sensitivity, most: int = _SHOWN) -> Table:
    """The units that lose most in the format that costs them most, the worst first.

    Args:
        found: The sensitivity.
        most: Rows at most.
    """
    chosen = [unit for unit in found.units if len(unit.options) > 1]
    ranked = sorted(chosen, key=lambda unit: -max(_losses(unit, found).values(), default=0.0))
    count = f"the {most} most sensitive of " if len(ranked) > most else ""
    title = f"{found.method}, {found.solver}: {count}{len(ranked)} units"
    table = rich_table(["unit", "modality", "float", *found.formats], [], title=title)
    for unit in ranked[:most]:
        losses = _losses(unit, found)
        size = readable_bytes(unit.options[0].stored_bytes or unit.options[0].cache_bytes)
        cells = [_shown(losses.get(name)) for name in found.formats]
        table.add_row(as_text(unit.name), unit.modality, size, *map(as_text, cells))
    return table


def modality_table(found: Sensitivity) -> Table:
    """Sums of losses and bytes over the units of each modality, format by format."""
    heads = ["modality", "units", "float", *found.formats]
    table = rich_table(heads, [], title="sums over units: loss, bytes")
    for modality in dict.fromkeys(unit.modality for unit in found.units):
        units = [u for u in found.units if u.modality == modality and len(u.options) > 1]
        if not units:
            continue
        alone = readable_bytes(sum(unit.options[0].stored_bytes for unit in units))
        cells = []
        for name in found.formats:
            options = [o for unit in units for o in unit.options if o.format == name]
            losses = [
                loss for unit in units if (loss := _losses(unit, found).get(name)) is not None
            ]
            size = readable_bytes(sum(option.stored_bytes for option in options))
            cells.append(
                f"{_shown(sum(losses) if losses else None)}, {size}" if options else NOTHING
            )
        table.add_row(modality, str(len(units)), alone, *cells)
    return table


def _losses(unit: ChoiceUnit, found: Sensitivity) -> Mapping[str, float]:
    """Weighted loss of each format that has one."""
    return {o.format: _loss(o, found) for o in unit.options if o.scores}


def _loss(option: FormatOption, found: Sensitivity) -> float:
    return sum(found.weights.get(name, 0.0) * score.loss for name, score in option.scores.items())


def _shown(loss: float | None) -> str:
    return NOTHING if loss is None else f"{loss:.3g}"
