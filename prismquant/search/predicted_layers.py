"""Predictions of layers for the record of a run, from the sensitivity that its recipe was found by.

The recipe names the file and its checksum. Where the file is at hand, the run compares what its
solver reaches in every layer with what the same solver reached in the analysis, on inputs of the
float model. A run needs none of it: what is missing is told and no error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prismquant.diagnostics.predictions import Predictions, UnitPrediction
from prismquant.errors import PrismQuantError
from prismquant.plan.plan import Plan, PlanRow
from prismquant.recipe.schema import Recipe
from prismquant.recipe.sensitivity_source import SensitivitySource
from prismquant.run.identity import Identity
from prismquant.search.offers import layer_formats
from prismquant.search.sensitivity import (
    FLOAT,
    IN_NATS,
    ChoiceUnit,
    FormatOption,
    Sensitivity,
)
from prismquant.search.sensitivity_file import read_sensitivity
from prismquant.storage import file_digest


@dataclass(frozen=True)
class Predictor:
    """Looks up what was predicted of a plan's layers.

    Attributes:
        recipe: The recipe of the run.
        source: What it was read from, by which the file is looked for; any other value than a path
            says nothing.
    """

    recipe: Recipe
    source: object = None

    def __call__(self, plan: Plan, run: Identity) -> tuple[Predictions | None, list[str]]:
        """Predictions, None where there are none; and notes on those that are missing."""
        origin = self.recipe.sensitivity
        if origin is None:
            return None, []
        lost = f"what was predicted of the layers is not in the record: {origin.file}"
        places = self._places(origin)
        try:
            there = [path for path in places if path.is_file()]
            path = next((path for path in there if file_digest(path) == origin.sha256), None)
            if path is None:
                return None, [f"{lost} {_missing(places, there)}"]
            found = read_sensitivity(path)
        except (OSError, PrismQuantError) as error:
            what = error.what if isinstance(error, PrismQuantError) else error.strerror
            return None, [f"{lost}: {what}"]
        if not any(option.layer_losses for unit in found.units for option in unit.options):
            return None, [f"{lost} has no losses of layers: an earlier version wrote it"]
        return predictions_of(found, plan, origin, run)

    def _places(self, origin: SensitivitySource) -> list[Path]:
        """Paths at which the file may lie: its own, and others near the recipe."""
        given = Path(origin.file)
        places = [given]
        if isinstance(self.source, str | os.PathLike):
            folder = Path(self.source).parent
            places += [folder / given, folder / given.name, folder.parent / given.name]
        return list({path.resolve(): path for path in places}.values())


def _missing(places: Sequence[Path], there: Sequence[Path]) -> str:
    """Words on a file that lies at none of the places with its checksum."""
    if places[0] in there:
        gone = "has changed since the search: its checksum is another"
        near = f", and the file as it was is not at {_joined(places[1:])}" if places[1:] else ""
        return gone + near
    others = f"; {_joined(there)} has another checksum" if there else ""
    return f"is not there: it was looked for at {_joined(places)}{others}"


def _joined(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def predictions_of(
    found: Sensitivity, plan: Plan, origin: SensitivitySource, run: Identity
) -> tuple[Predictions, list[str]]:
    """Predictions of the units that a plan quantizes, and notes on what is amiss with them.

    Args:
        found: The sensitivity.
        plan: What a run will do; its formats say which option a unit has.
        origin: Name and checksum of the sensitivity's file.
        run: Of the run: says whether its model and its samples are those of the analysis.
    """
    rows = {row.site.name: row for row in plan.rows}
    units, other = [], []
    for unit in found.units:
        own = [rows[layer.name] for layer in unit.layers if layer.name in rows]
        if not any(row.quantized for row in own):
            continue
        option = next(_alike(unit, rows, found), None)
        if option is None:
            other.append(unit.name)
            continue
        losses = zip(unit.layers, option.layer_losses, strict=False)
        units.append(
            UnitPrediction(
                unit=unit.name,
                format=option.format,
                losses={str(kind): score.loss for kind, score in option.scores.items()},
                layers={layer.name: loss for layer, loss in losses},
            )
        )
    known = found.identity
    kept = Predictions(
        file=origin.file,
        sha256=origin.sha256,
        method=found.method,
        in_nats=found.method in IN_NATS,
        units=tuple(units),
        model=found.model,
        same_files=_same(known.get("files"), run.files_digest),
        same_samples=_same(known.get("samples"), run.samples_digest) if run.samples else None,
    )
    return kept, _notes(kept, other, found.solver)


def _same(one: str | None, other: str) -> bool | None:
    """Whether two checksums are one; None where the first is not known."""
    return None if one is None else one == other


def _notes(kept: Predictions, other: Sequence[str], solver: str) -> list[str]:
    """Notes on what makes losses differ from their predictions, and on what has none."""
    notes = []
    if kept.same_files is False:
        notes.append(
            f"what the search predicted is of another model: that of {kept.model}, whose files "
            "differ from this one's"
        )
    if kept.same_samples is False and kept.units:
        notes.append(
            "layers are compared with an analysis on other samples: their losses may differ from "
            "what was predicted for that alone"
        )
    if other:
        some = f"{', '.join(other[:3])}{' ..' if len(other) > 3 else ''}"
        notes.append(
            f"nothing is predicted of units that were not analyzed in their formats by their "
            f"solver (the analysis had {solver}): {some}"
        )
    return notes


def _alike(
    unit: ChoiceUnit, rows: Mapping[str, PlanRow], found: Sensitivity
) -> Iterator[FormatOption]:
    """Options that give a unit's layers the formats that they have in a plan, by its solver."""
    for option in unit.options:
        if option.format != FLOAT and all(
            layer.name in rows
            and (not rows[layer.name].quantized or rows[layer.name].config.solver == found.solver)
            and layer_formats(layer.name, option, found)
            == (rows[layer.name].config.weights, rows[layer.name].config.activations)
            for layer in unit.layers
        ):
            yield option
