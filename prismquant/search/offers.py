"""Options that a search may choose from: those that the reader takes, and that can be cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from prismquant.errors import grouped
from prismquant.formats.spec import NumberSpec, spec
from prismquant.models.arch import Parallel
from prismquant.plan.fallback import misfit
from prismquant.search.constraints import Constraints
from prismquant.search.sensitivity import (
    FLOAT,
    ChoiceUnit,
    FormatOption,
    LayerShape,
    Sensitivity,
)


@dataclass(frozen=True)
class _Cut:
    """A layer as it is asked whether a format fits the parts that servers cut it into."""

    out_features: int
    in_features: int
    parallel: Parallel | None
    fuse_key: str | None


def offers(
    found: Sensitivity, constraints: Constraints
) -> tuple[tuple[ChoiceUnit, ...], list[str]]:
    """Units with those options that may be chosen, and lines on those that may not.

    Args:
        found: The sensitivity.
        constraints: Of these, who is to load the checkpoint, and over how many devices.

    Returns:
        The units; to leave a unit alone is always on offer. And why other options are not.
    """
    kept: list[ChoiceUnit] = []
    dropped: list[str] = []
    for unit in found.units:
        options, reasons = [], dict[str, list[str]]()
        for option in unit.options:
            why = _refusal(unit, option, found, constraints)
            if why is None:
                options.append(option)
            else:
                reasons.setdefault(why, []).append(option.format)
        dropped += [
            f"{unit.name}: not offered as {', '.join(formats)}: {why}"
            for why, formats in reasons.items()
        ]
        kept.append(replace(unit, options=tuple(options)))
    return tuple(kept), grouped(dropped)


def layer_formats(
    layer: str, option: FormatOption, found: Sensitivity
) -> tuple[NumberSpec | None, NumberSpec | None]:
    """Number formats of a layer's weight and input as they will really be; None: floating point.

    Args:
        layer: Its name.
        option: The option that its unit has.
        found: The sensitivity, which says what the option's name means.
    """
    if option.format == FLOAT:
        return (None, None)
    if layer in option.formats:
        weights, _, inputs = option.formats[layer].partition("/")
        return (spec(weights), spec(inputs) if inputs else None)
    choice = found.formats[option.format]
    sides = (choice.weights, choice.activations)
    asked = [NumberSpec.from_dict(fields) if fields else None for fields in sides]
    return (asked[0], asked[1])


def _refusal(
    unit: ChoiceUnit, option: FormatOption, found: Sensitivity, constraints: Constraints
) -> str | None:
    if option.format == FLOAT:
        return None
    if not option.scores:
        return f"the analysis, by the method {found.method}, has no score of it"
    reader = constraints.reader
    if reader is not None and reader.value in option.refused:
        return option.refused[reader.value]
    faults = _cut_faults(unit, option, found, constraints.tensor_parallel)
    return next(faults, None)


def _cut_faults(
    unit: ChoiceUnit, option: FormatOption, found: Sensitivity, devices: int
) -> Iterator[str]:
    """Reasons for which a unit's layers cannot be cut over devices."""
    for layer in unit.layers if devices > 1 else ():
        weights, inputs = layer_formats(layer.name, option, found)
        if weights is not None:
            why = misfit(_cut(layer), weights, inputs, devices)
            if why is not None:
                yield why


def _cut(layer: LayerShape) -> _Cut:
    side = None if layer.parallel is None else Parallel(layer.parallel)
    fused = "fused" if layer.fused else None
    return _Cut(layer.out_features, layer.in_features, side, fused)
