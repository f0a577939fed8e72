"""Options of GPTQ that other tools have, or have not."""

from __future__ import annotations

from typing import Any

from prismquant.recipe.exporters.export_ledger import WorkNotes

# What all of them take: a fraction of the mean of the diagonal.
_DAMPING = 0.01


def damping(notes: WorkNotes, options: Any, key: str) -> float:
    """Fraction of the mean of the diagonal, as other tools' GPTQ has it, with a note.

    Args:
        notes: On the layer.
        options: Of our GPTQ.
        key: The tool's name for it.
    """
    value = float(options.damping)
    if value and options.damping_basis == "column":
        why = "of the mean of the diagonal there, not of each column's own"
        notes.changed("options.damping", value, f"{key}: {_DAMPING}", why)
        if notes.said("options.damping_basis"):
            notes.changed("options.damping_basis", "column", f"{key}: {_DAMPING}", why)
        return _DAMPING
    notes.written("options.damping", value, f"{key}: {value:.15g}")
    if notes.said("options.damping_basis"):
        notes.written("options.damping_basis", options.damping_basis, key)
    return value


def refined(notes: WorkNotes, options: Any) -> None:
    """Note that other tools' GPTQ refines nothing."""
    if options.refine_passes:
        notes.dropped("options.refine_passes", options.refine_passes, "no code is refined there")
    elif notes.said("options.refine_passes"):
        notes.written("options.refine_passes", 0, "no code is refined")
