"""Latency of units of choice, from a table of measured milliseconds.

    {"version": 1, "measured": "H100, batch 1, decoding",
     "layers": [{"out": 4096, "in": 4096, "format": "int4-g128", "ms": 0.021}, ..],
     "units":  [{"unit": "model.language_model.layers.0.mlp.{gate_proj,up_proj}",
                 "format": "float", "ms": 0.044}, ..]}

A unit's entry comes first. Without one a unit whose layers servers fuse is looked up as one layer
of all their outputs; else the times of its layers are added. The key-value cache takes no time
unless it has an entry. Nothing is guessed: a time that is missing is an error that names it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from prismquant.errors import DataError, grouped, listed
from prismquant.opening import read_json
from prismquant.search.knapsack import Table
from prismquant.search.sensitivity import ChoiceUnit

_VERSION = 1

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

    def _time(self, unit: ChoiceUnit, format_name: str, missing: list[str]) -> float:
        known = self.units.get((unit.name, format_name))
        if known is not None or unit.kind == "kv_cache":
            return known or 0.0
        inputs = {layer.in_features for layer in unit.layers}
        if len(inputs) == 1 and all(layer.fused for layer in unit.layers):
            whole = (format_name, sum(layer.out_features for layer in unit.layers), inputs.pop())
            if whole in self.layers:
                return self.layers[whole]
        keys = [(format_name, layer.out_features, layer.in_features) for layer in unit.layers]
        missing += [
            f"{layer.name}: out {out}, in {width}, {name}"
            for layer, (name, out, width) in zip(unit.layers, keys, strict=True)
            if (name, out, width) not in self.layers
        ]
        return sum(self.layers.get(key, 0.0) for key in keys)


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
