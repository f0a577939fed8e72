"""A tower as one of the package's parts, where one says the same under other names."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from prismquant.models.arch import ArchSpec, Tower
from prismquant.models.arch_files import read_toml
from prismquant.models.arch_parts import PARTS, with_parts

__all__ = ["part_table"]

_Table = dict[str, Any]


def part_table(tower: Tower, arch: ArchSpec, paths: Container[str] = ()) -> _Table | None:
    """The table of a tower that is like a part; None where no part has its sites and edges.

    The part with the fewest paths that are called otherwise is taken. What a part says of streams
    and edges between units is compared by whoever reads the file again.

    Args:
        tower: The tower.
        arch: Whose tower it is.
        paths: Of all modules; among equal parts the one is taken whose tensors are there.
    """
    found = [
        table
        for path in sorted(PARTS.glob("*.toml"))
        if (table := _as_part(path.stem, tower, arch)) is not None
    ]

    def order(table: _Table) -> tuple[int, int, int]:
        there = [path in paths for path in _named(table, tower)]
        return len(str(table)) - len(table["like"]), there.count(False), -there.count(True)

    return min(found, key=order, default=None)


def _named(table: _Table, tower: Tower) -> list[str]:
    """Modules of the first block that a part has a name of llama.cpp for."""
    data = with_parts({"head": "lm_head", "towers": [table], "gguf": {}}, "draft", read_toml)
    block = f"{tower.blocks}."
    names = data.get("gguf", {}).get("tensors", {})
    return [name.replace(f"{block}*", f"{block}0") for name in names if name.startswith(block)]


def _as_part(name: str, tower: Tower, arch: ArchSpec) -> _Table | None:
    table: _Table = {"like": name, "root": tower.root}
    part = _expanded(table)
    if part.get("modality") != tower.modality or part.get("experts", []) != [*tower.experts]:
        return None
    names = _names(part, tower, arch)
    if names is None:
        return None
    rename = {old: new for old, new in names.items() if old != new}
    table |= {"rename": rename} if rename else {}
    section = (tower.depth or "").rpartition(".")[0]
    default = str(part.get("depth", "")).rpartition(".")[0]
    if section != default and "depth" in part:
        table["config"] = section
    stream = next((s for s in arch.streams if s.modality is tower.modality), None)
    made = _expanded(table, arch)
    if tower.modules and tower.modules != tuple(made.get("modules", ())):
        table["modules"] = tower.modules
    for key in ("entry", "blocks", "depth", "heads", "kv_heads"):
        if made.get(key) != getattr(tower, key):
            if getattr(tower, key) is None:
                return None
            table[key] = getattr(tower, key)
    if stream is None and made.get("stream"):
        table["stream"] = False
    elif stream is not None:
        said = made.get("streams", {"writers": (), "norms": ()})
        more = {
            end: [one for one in getattr(stream, end) if one not in said[end]]
            for end in ("writers", "norms")
        }
        if any(more.values()):
            table["stream"] = {end: paths for end, paths in more.items() if paths}
        less = [one for one in said["writers"] if one not in stream.writers]
        if less:
            table["without"] = [one.removeprefix(f"{tower.root}.") for one in less]
    return table


def _names(part: Mapping[str, Any], tower: Tower, arch: ArchSpec) -> dict[str, str] | None:
    """Paths of a part -> those of a tower; None where the two differ in more than names."""
    names: dict[str, str] = {}
    for theirs, ours in (
        (part.get("sites", ()), tower.sites),
        (part.get("entry_sites", ()), tower.entry_sites),
    ):
        paths = {site["role"]: site["path"] for site in theirs}
        if len(theirs) != len(ours) or len({site.role for site in ours}) != len(ours):
            return None
        if {site.role for site in ours} != paths.keys():
            return None
        names |= {paths[site.role]: site.path for site in ours}
    known = {
        frozenset(names.get(path, path) for path in edge["consumers"]): edge
        for edge in part.get("edges", ())
        if "norm" in edge
    }
    mine = {frozenset(edge.consumers): edge.norm for edge in tower.edges if edge.norm}
    if known.keys() != mine.keys():
        return None
    names |= {known[ends]["norm"]: norm for ends, norm in mine.items()}
    below = f"{tower.root}."
    for key in ("entry", "blocks"):
        said, ours = part.get(key), getattr(tower, key)
        if isinstance(said, str) and isinstance(ours, str) and ours.startswith(below):
            names[said.removeprefix(below)] = ours.removeprefix(below)
    final = next((edge.norm for edge in arch.edges if arch.head in edge.consumers), None)
    if "final_norm" in part and final is not None and final.startswith(below):
        names[part["final_norm"].removeprefix(below)] = final.removeprefix(below)
    return names


def _expanded(table: Mapping[str, Any], arch: ArchSpec | None = None) -> _Table:
    """A tower of a part with all that the part says of it, and of its stream."""
    head = "lm_head" if arch is None else arch.head
    data = with_parts({"head": head, "towers": [table]}, "draft", read_toml)
    tower: _Table = data["towers"][0]
    streams = data.get("streams", [])
    edges = [edge["norm"] for edge in data.get("edges", [])]
    return {
        **tower,
        **({"stream": True, "streams": streams[0]} if streams else {}),
        **({"final_norm": edges[0]} if edges else {}),
    }
