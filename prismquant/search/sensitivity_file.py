"""The file of a sensitivity: JSON, written whole, and read back strictly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

from pydantic import TypeAdapter, ValidationError

from prismquant.algorithms.methods import SOLVERS, build_solver
from prismquant.errors import PrismQuantError, StorageError, suggest
from prismquant.formats.spec import spec
from prismquant.models.arch import Modality
from prismquant.opening import read_json
from prismquant.recipe.match import known_roles
from prismquant.search.analysis_methods import METHODS
from prismquant.search.format_grammar import require_sound
from prismquant.search.sensitivity import (
    FLOAT,
    LEAST_WEIGHT,
    MOST_WEIGHT,
    SENSITIVITY_VERSION,
    ChoiceUnit,
    Sensitivity,
    is_weight,
)
from prismquant.storage import write_json

# No model has more, and no loss that an analysis writes is larger.
_MOST_BYTES, _MOST_LOSS = 1 << 60, 1e100
_AGAIN = "write it again with `prismquant analyze`"
# Versions that can be read: what later ones have added may be missing.
_VERSIONS = (1, SENSITIVITY_VERSION)


def write_sensitivity(path: Path, found: Sensitivity) -> None:
    """Write a sensitivity as JSON, whole or not at all.

    Raises:
        StorageError: It cannot be written.
    """
    write_json(path, asdict(found))


def read_sensitivity(path: Path) -> Sensitivity:
    """Read back what :func:`write_sensitivity` wrote.

    Raises:
        StorageError: The file is missing, is no such file, is of another version, or is damaged;
            says where.
    """
    content = read_json(path, remedy=_AGAIN)
    if not isinstance(content, Mapping) or not {"units", "formats"} <= content.keys():
        raise StorageError(
            "this is no file of a sensitivity: it has no units and formats",
            where=str(path),
            remedy="`prismquant analyze MODEL --calib DATA --formats .. --out FILE` writes one",
        )
    version = content.get("version")
    if isinstance(version, bool) or version not in _VERSIONS:
        raise StorageError(
            f"a sensitivity of version {version!r} cannot be read: this is version "
            f"{SENSITIVITY_VERSION}",
            where=str(path),
            remedy=_AGAIN,
        )
    try:
        found: Sensitivity = _reader().validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    for fault in _faults(found):
        _damaged(path, fault)
    return found


def _damaged(path: Path, what: str) -> NoReturn:
    raise StorageError(f"the sensitivity is damaged: {what}", where=str(path), remedy=_AGAIN)


@cache
def _reader() -> TypeAdapter[Sensitivity]:
    return TypeAdapter(Sensitivity)


def _faults(found: Sensitivity) -> Iterator[str]:
    """Faults that no analysis writes, although every field is of its type."""
    if not found.units:
        yield "there are no units"
    for names, what in (
        ([unit.name for unit in found.units], "unit"),
        ([layer.name for unit in found.units for layer in unit.layers], "layer"),
    ):
        yield from (
            f"{what} {name!r} is there twice" for name, uses in Counter(names).items() if uses > 1
        )
    if not all(0 <= count <= _MOST_BYTES for count in (found.fixed_bytes, found.fixed_weights)):
        yield "fixed_bytes or fixed_weights is no size"
    if not all(map(is_weight, found.weights.values())):
        yield f"weights are neither 0 nor from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
    if not any(found.weights.values()):
        yield "no class of tokens has a weight above 0"
    if found.solver not in SOLVERS:
        yield f"there is no solver {found.solver!r}; {suggest(found.solver, SOLVERS)}"
    else:
        options = found.solver_options
        yield from _faults_of(partial(build_solver, found.solver, options), "solver_options")
    for name, choice in found.formats.items():
        yield from _faults_of(partial(require_sound, choice, name), f"format {name!r}")
    # Those that layers have in place of what was asked for, of weights and of inputs.
    given = {said for unit in found.units for o in unit.options for said in o.formats.values()}
    for name in sorted({side for said in given for side in said.split("/", 1)}):
        yield from _faults_of(partial(spec, name), "a format of a layer")
    if found.method not in METHODS:
        yield f"there is no method {found.method!r}; {suggest(found.method, METHODS)}"
    for unit in found.units:
        yield from (f"unit {unit.name!r}: {fault}" for fault in _unit_faults(unit, found))


def _faults_of(made: Callable[[], object], of: str) -> Iterator[str]:
    """Fault of what cannot be made of some fields."""
    try:
        made()
    except PrismQuantError as error:
        yield f"{of}: {'; '.join(error.findings) or error.what}"


def _unit_faults(unit: ChoiceUnit, found: Sensitivity) -> Iterator[str]:
    names = [option.format for option in unit.options]
    if unit.modality not in tuple(Modality):
        yield f"there is no modality {unit.modality!r}"
    for layer in unit.layers:
        if not all(0 < size <= _MOST_BYTES for size in (layer.out_features, layer.in_features)):
            yield f"layer {layer.name!r} has no shape"
        if layer.role not in known_roles():
            yield f"layer {layer.name!r}: there is no role {layer.role!r}"
    if names[:1] != [FLOAT]:
        yield f"the first option is not {FLOAT!r}"
    if len(set(names)) < len(names):
        yield "an option is there twice"
    if (unit.kind == "layers") != bool(unit.layers):
        yield f"a unit of kind {unit.kind} with {len(unit.layers)} layers"
    for option in unit.options:
        if option.format not in (FLOAT, *found.formats):
            yield f"there is no format {option.format!r}"
        if not all(0 <= size <= _MOST_BYTES for size in (option.stored_bytes, option.cache_bytes)):
            yield f"{option.format}: bytes are no size"
        for kind, score in option.scores.items():
            if not abs(score.loss) <= _MOST_LOSS:
                yield f"{option.format}: the loss of {kind} tokens is no number"
            if score.error is not None and not 0 <= score.error <= _MOST_LOSS:
                yield f"{option.format}: the error of {kind} tokens is no number from 0"
        if len(option.layer_losses) not in (0, len(unit.layers)):
            yield f"{option.format}: not as many layer_losses as layers"
        if not all(0 <= loss <= _MOST_LOSS for loss in option.layer_losses):
            yield f"{option.format}: a loss of a layer is no number from 0"
