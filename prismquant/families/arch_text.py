"""An architecture as the text of a file: towers as parts where a part says the same."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from prismquant.errors import ModelError
from prismquant.families.tower_parts import part_table
from prismquant.models.arch import ArchSpec, Layout, SiteKind, Tower
from prismquant.models.arch_files import load_arch
from prismquant.models.reader_names import FusedLayer

__all__ = ["arch_text"]

# Keys of a file that parts can say.
_BETWEEN = ("edges", "streams")
# Keys of a file that are tables, or follow from its name.
_OF_READERS = ("fused", "vllm", "gguf", "gptq", "config_map", "processor_map")
_TABLES = ("name", "towers", "layouts", *_BETWEEN, "left_alone", *_OF_READERS)
_Notes = Mapping[str, Sequence[str]]


def arch_text(arch: ArchSpec, notes: _Notes, paths: Container[str] = ()) -> str:
    """The text of a file that says what an architecture says, as shortly as parts allow.

    Args:
        arch: Without maps of remote code and without names of readers.
        notes: Lines of comments, before the tables whose names they have: ``top``, ``layouts``,
            the modalities of towers, ``streams``, ``left_alone``, ``end``.
        paths: Of all modules; of parts that say the same, the one is taken whose norms are there.

    Raises:
        ModelError: The architecture contradicts itself.
    """
    refusal = "it is read as something else"
    for liked, derived in (
        *((True, derived) for derived in (_BETWEEN, ("streams",), ("edges",), ())),
        (False, ()),
    ):
        text = "\n".join(_lines(arch, notes, paths, liked=liked, derived=derived)) + "\n"
        try:
            said = _says(text)
        except ModelError as error:
            refusal = error.what
            continue
        # Parts also name what servers make of layers that this model does not have.
        if replace(said, fused=_used(said)) == replace(arch, fused=_used(arch)):
            return text
    raise ModelError(
        f"the draft contradicts itself: {refusal}",
        where=arch.title,
        remedy="write the file by hand: docs/families.md",
    )


def _used(arch: ArchSpec) -> dict[str, FusedLayer]:
    """Fused layers of servers, of those layers that an architecture has."""
    labels = {site.fuse for tower in arch.towers for site in tower.sites if "*" not in site.path}
    return {label: layer for label, layer in arch.fused.items() if label in labels}


def _says(text: str) -> ArchSpec:
    """The architecture that a text describes.

    Raises:
        ModelError: It describes none.
    """
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "draft.toml"
        path.write_text(text, encoding="utf-8")
        return load_arch(path)


def _lines(
    arch: ArchSpec, notes: _Notes, paths: Container[str], *, liked: bool, derived: Collection[str]
) -> Iterator[str]:
    """Lines of a file.

    Args:
        arch: The architecture.
        notes: Comments.
        paths: Of all modules.
        liked: Whether towers may be like parts.
        derived: What is left to the parts, of edges between units and streams.
    """
    yield from _comments(notes, "top")
    yield from (f"{key} = {_value(value)}" for key, value in _said(arch, _TABLES).items())
    whole = [key for key in _BETWEEN if key not in derived]
    yield from (f"{key} = []" for key in whole if not getattr(arch, key))
    for layout in arch.layouts:
        yield from ("", *(_comments(notes, "layouts") if layout is arch.layouts[0] else ()))
        yield from _layout(layout)
    tables = [part_table(tower, arch, paths) if liked else None for tower in arch.towers]
    for tower, table in zip(arch.towers, tables, strict=True):
        yield from ("", *_comments(notes, str(tower.modality)), "[[towers]]")
        if table is not None:
            own = {k: v for k, v in table.items() if "streams" in derived or k != "stream"}
            yield from (f"{key} = {_value(value)}" for key, value in own.items())
        else:
            yield from _tower(tower)
    if "edges" in whole:
        yield from _between("edges", [_said(edge) for edge in arch.edges])
    if notes.get("streams"):
        yield from ("", *_comments(notes, "streams"))
    if "streams" in whole:
        yield from _between("streams", [_said(stream) for stream in arch.streams])
    yield from _left_alone(arch, notes)
    if arch.fused and any(table is None for table in tables):
        yield from ("", "[fused]")
        for label, layer in arch.fused.items():
            said = {"name": layer.name, "class": layer.kind}
            yield f"{label} = {_value(said)}"
    if notes.get("end"):
        yield from ("", *_comments(notes, "end"))


def _comments(notes: _Notes, place: str) -> Iterator[str]:
    yield from (f"# {' '.join(line.split())}" for line in notes.get(place, ()))


def _layout(layout: Layout) -> Iterator[str]:
    said = _said(layout, ["rewrites", "joined"]).items()
    yield from ("[[layouts]]", *(f"{key} = {_value(value)}" for key, value in said))
    if layout.rewrites:
        yield "[layouts.rewrites]"
        yield from (f"{_value(disk)} = {_value(module)}" for disk, module in layout.rewrites)
    if layout.joined:
        yield "[layouts.joined]"
        yield from (f"{_value(stored)} = {_value(list(parts))}" for stored, parts in layout.joined)


def _tower(tower: Tower) -> Iterator[str]:
    lists = ("entry_sites", "sites", "edges")
    yield from (f"{key} = {_value(value)}" for key, value in _said(tower, lists).items())
    for key in lists:
        if members := getattr(tower, key):
            tables = (_value(_said(member)) for member in members)
            yield from (f"{key} = [", *(f"    {table}," for table in tables), "]")


def _between(key: str, tables: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Tables of a key that stands behind the towers."""
    for table in tables:
        yield from (
            "",
            f"[[{key}]]",
            *(f"{name} = {_value(value)}" for name, value in table.items()),
        )


def _left_alone(arch: ArchSpec, notes: _Notes) -> Iterator[str]:
    if arch.left_alone:
        yield from ("", *_comments(notes, "left_alone"), "[left_alone]")
        yield from (f"{_value(name)} = {_value(why)}" for name, why in arch.left_alone.items())


def _said(one: Any, passed_over: Collection[str] = ()) -> dict[str, Any]:
    """Keys of a part of an architecture whose values are not those that hold unless said."""
    return {
        field.name: value
        for field in fields(one)
        if field.name not in passed_over
        and (value := getattr(one, field.name)) != _default(field)
        and value is not None
        and value is not SiteKind.LINEAR
    }


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _value(value: Any) -> str:
    """A value in TOML, on one line."""
    if isinstance(value, Enum):
        return json.dumps(str(value.value))
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() else json.dumps(name)
