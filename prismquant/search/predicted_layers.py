"""Predictions of layers for the record of a run, from the sensitivity that its recipe was found by.

The recipe names the file and its checksum. Where the file is at hand, the run compares what its
solver reaches in every layer with what the same solver reached in the analysis, on inputs of the
float model. A run needs none of it: what is missing is told and no error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prismquant.diagnostics.predictions import Predictions, UnitPrediction
from prismquant.errors import PrismQuantError
from prismquant.plan.plan import Plan, PlanRow
from prismquant.recipe.schema import Recipe
from prismquant.recipe.sensitivity_source import SensitivitySource
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

    def __call__(self, plan: Plan) -> tuple[Predictions | None, list[str]]:
        """Predictions, None where there are none; and notes on those that are missing."""
        origin = self.recipe.sensitivity
        if origin is None:
            return None, []
        lost = f"what was predicted of the layers is not in the record: {origin.file}"
        try:
            path = self._path(origin)
            if path is None:
                return None, [f"{lost} is not there, or has changed since the search"]
            found = read_sensitivity(path)
        except (OSError, PrismQuantError) as error:
            what = error.what if isinstance(error, PrismQuantError) else error.strerror
            return None, [f"{lost}: {what}"]
        if not any(option.layer_losses for unit in found.units for option in unit.options):
            return None, [f"{lost} has no losses of layers: an earlier version wrote it"]
        return predictions_of(found, plan, origin)

    def _path(self, origin: SensitivitySource) -> Path | None:
        """The file with the recipe's checksum: at its place, or near the recipe."""
        given = Path(origin.file)
        places = [given]
        if isinstance(self.source, str | os.PathLike):
            folder = Path(self.source).parent
            places += [folder / given, folder / given.name, folder.parent / given.name]
        there = (path for path in places if path.is_file())
        return next((path for path in there if file_digest(path) == origin.sha256), None)


def predictions_of(
    found: Sensitivity, plan: Plan, origin: SensitivitySource
) -> tuple[Predictions, list[str]]:
    """Predictions of the units that a plan quantizes, and a note on those that have none.

    Args:
        found: The sensitivity.
        plan: What a run will do; its formats say which option a unit has.
        origin: Name and checksum of the sensitivity's file.
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
    kept = Predictions(
        origin.file, origin.sha256, found.method, found.method in IN_NATS, tuple(units)
    )
    note = "nothing is predicted of units whose formats were not analyzed: "
    some = f"{', '.join(other[:3])}{' ..' if len(other) > 3 else ''}"
    return kept, [f"{note}{some}"] if other else []


def _alike(
    unit: ChoiceUnit, rows: Mapping[str, PlanRow], found: Sensitivity
) -> Iterator[FormatOption]:
    """Options that give a unit's layers the formats that they have in a plan."""
    for option in unit.options:
        if option.format != FLOAT and all(
            layer.name in rows
            and layer_formats(layer.name, option, found)
            == (rows[layer.name].config.weights, rows[layer.name].config.activations)
            for layer in unit.layers
        ):
            yield option
