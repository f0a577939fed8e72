"""Latency of units of choice, from a table of measured milliseconds.

    {"version": 1, "measured": "H100, batch 1, decoding",
     "layers": [{"out": 4096, "in": 4096, "format": "int4-g128", "ms": 0.021}, ..],
     "units":  [{"unit": "model.language_model.layers.0.mlp.{gate_proj,up_proj}",
                 "format": "float", "ms": 0.044}, ..]}

A unit's entry comes first. Without one a unit whose layers servers fuse is looked up as one layer
of all their outputs; else the times of its layers are added. The key-value cache takes no time
unless it has an entry. Nothing is guessed: a time that is missing is an error that names it. So is
a unit that the model does not have; shapes and formats that it does not have may be of other models
and are told.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from prismquant.errors import DataError, grouped, listed, nearest
from prismquant.opening import read_json
from prismquant.search.knapsack import Table
from prismquant.search.sensitivity import FLOAT, ChoiceUnit, Sensitivity

_VERSION = 1
# Shapes and formats of other models that a note names.
_SHOWN = 8

_Count = Annotated[int, Field(strict=True, ge=1)]
_Milliseconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str
    ms: _Milliseconds


class _LayerEntry(_Entry):
    outputs: _Count = Field(alias="out")
    inputs: _Count = Field(alias="in")


class _UnitEntry(_Entry):
    unit: str


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = _VERSION
    measured: str = ""
    layers: tuple[_LayerEntry, ...] = ()
    units: tuple[_UnitEntry, ...] = ()


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of layers and units in the formats that they may have.

    Attributes:
        source: The file.
        measured: What the times are of, as the file says.
        layers: Time by format, outputs and inputs.
        units: Time by the unit's name and format.
    """

    source: str
    measured: str
    layers: Mapping[tuple[str, int, int], float]
    units: Mapping[tuple[str, str], float]

    def table(self, units: Sequence[ChoiceUnit]) -> Table:
        """Milliseconds of each option of each unit.

        Raises:
            DataError: The table lacks times; lists them.
        """
        missing: list[str] = []
        found = tuple(
            tuple(self._time(unit, option.format, missing) for option in unit.options)
            for unit in units
        )
        if missing:
            findings = grouped(dict.fromkeys(missing))
            raise DataError(
                f"the table of latencies lacks times:{listed(findings)}",
                where=self.source,
                remedy='add them to its "layers" by out, in and format, or to its "units" by name',
                findings=findings,
            )
        return found

    def require_units(self, found: Sensitivity) -> None:
        """Refuse entries of units that the analyzed model does not have.

        Raises:
            DataError: There are such; says which units were probably meant.
        """
        known = [unit.name for unit in found.units]
        strange = dict.fromkeys(name for name, _ in self.units if name not in known)
        if strange:
            findings = [f"{name!r}: {nearest(name, known) or 'no such unit'}" for name in strange]
            raise DataError(
                f"the table of latencies names units that the model does not have:"
                f"{listed(findings)}",
                where=self.source,
                remedy="write their names as the sensitivity has them, or take them out",
                findings=findings,
            )

    def idle(self, found: Sensitivity) -> list[str]:
        """Lines on entries of shapes and formats that the analysis of the model does not have."""
        formats = {FLOAT, *found.formats}
        shapes = {shape for unit in found.units for shape in _shapes(unit)}
        named = [name for name, *_ in self.layers] + [name for _, name in self.units]
        strange = [name for name in named if name not in formats]
        other = [f"{out} x {width}" for _, out, width in self.layers if (out, width) not in shapes]
        told = {"formats that were not analyzed": strange, "shapes that no layer has": other}
        return [
            f"{self.source} has times of {what}: {_some(names)}; they are not used"
            for what, names in told.items()
            if names
        ]

    def _time(self, unit: ChoiceUnit, format_name: str, missing: list[str]) -> float:
        known = self.units.get((unit.name, format_name))
        if known is not None or unit.kind == "kv_cache":
            return known or 0.0
        whole = _fused_shape(unit)
        if whole is not None and (format_name, *whole) in self.layers:
            return self.layers[format_name, *whole]
        keys = [(format_name, layer.out_features, layer.in_features) for layer in unit.layers]
        missing += [
            f"{layer.name}: out {out}, in {width}, {name}"
            for layer, (name, out, width) in zip(unit.layers, keys, strict=True)
            if (name, out, width) not in self.layers
        ]
        return sum(self.layers.get(key, 0.0) for key in keys)


def _some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    each = list(dict.fromkeys(names))
    more = f" and {len(each) - _SHOWN} more" if len(each) > _SHOWN else ""
    return ", ".join(each[:_SHOWN]) + more


def _fused_shape(unit: ChoiceUnit) -> tuple[int, int] | None:
    """Outputs and inputs of the one layer that servers make of a unit's; None: they make none."""
    inputs = {layer.in_features for layer in unit.layers}
    if len(inputs) != 1 or not all(layer.fused for layer in unit.layers):
        return None
    return sum(layer.out_features for layer in unit.layers), inputs.pop()


def _shapes(unit: ChoiceUnit) -> list[tuple[int, int]]:
    """Outputs and inputs under which a unit's times are looked up."""
    whole = _fused_shape(unit)
    own = [(layer.out_features, layer.in_features) for layer in unit.layers]
    return own if whole is None else [whole, *own]


def read_latency(path: Path) -> LatencyTable:
    """Read a table of latencies.

    Raises:
        StorageError: The file cannot be read, or is not JSON.
        DataError: It is no table of latencies; says where.
    """
    content = read_json(path, remedy="correct the table, or write it again")
    try:
        read = _reader().validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        _refuse(path, f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}")
    if read.version != _VERSION:
        _refuse(path, f"version {read.version} is not {_VERSION}")
    layers = [((one.format, one.outputs, one.inputs), one.ms) for one in read.layers]
    units = [((one.unit, one.format), one.ms) for one in read.units]
    for entries in (layers, units):
        uses: Counter[tuple[Any, ...]] = Counter(key for key, _ in entries)
        for key in (key for key, count in uses.items() if count > 1):
            _refuse(path, f"{', '.join(map(str, key))} is there twice")
    return LatencyTable(str(path), read.measured, dict(layers), dict(units))


def _refuse(path: Path, what: str) -> NoReturn:
    raise DataError(
        f"no table of latencies: {what}",
        where=str(path),
        remedy='write {"layers": [{"out": 4096, "in": 4096, "format": "int4-g128", "ms": 0.02}]}',
    )


@cache
def _reader() -> TypeAdapter[_Content]:
    return TypeAdapter(_Content)
