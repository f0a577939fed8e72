"""Layers that their solver could not solve, as the record has them."""

from __future__ import annotations

from collections.abc import Iterable

from prismquant.diagnostics.step_record import LayerRecord, StepRecord

_NAMES = 3


def failed_layers(layers: Iterable[LayerRecord]) -> dict[str, str]:
    """Reasons for which layers were rounded to nearest in place of being solved, by name."""
    return {layer.name: layer.failure.why for layer in layers if layer.failure is not None}


def failure_lines(steps: Iterable[StepRecord]) -> tuple[str, ...]:
    """One line for all layers of a run that failed for one reason; none where all went as planned.

    Reasons that differ in their figures alone are told once, with those of the first layer.
    """
    alike: dict[str, list[tuple[str, str]]] = {}
    for step in steps:
        for name, why in failed_layers(step.layers).items():
            alike.setdefault(_kind(why), []).append((name, why))
    return tuple(_line(found) for found in alike.values())


def _line(found: list[tuple[str, str]]) -> str:
    names, more = [name for name, _ in found[:_NAMES]], len(found) - _NAMES
    listed = ", ".join(names) + (f" and {more} more" if more > 0 else "")
    layers = "1 layer" if len(found) == 1 else f"{len(found)} layers"
    return f"{layers} rounded to nearest in place of being solved: {listed}: {found[0][1]}"


def _kind(why: str) -> str:
    """A reason without its figures."""
    return "".join(letter for letter in why if letter.isalpha())
