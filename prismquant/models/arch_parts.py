"""Parts of architectures: towers that many families share, as data in ``archs/parts/``.

A tower of a family's file says ``like = "llama"``, and where its copy of the part lies; what is
peculiar is written beside it. :func:`with_parts` puts the parts in place, so that the result is as
if the file had said everything itself. Paths in a part are relative to the tower's root, and keys
of the configuration to its section; a file's own paths and keys are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prismquant.errors import ModelError, suggest

__all__ = ["PARTS", "with_parts"]

PARTS = Path(__file__).parent / "archs" / "parts"

_Table = dict[str, Any]
_Reader = Callable[[Path], _Table]
# A path of a part -> the path that takes its place; None: it has none.
_Rule = Callable[[str], str | None]

_CONFIG_KEYS = {"depth", "heads", "kv_heads"}
_ENDS, _GGUF = ("writers", "norms"), ("tensors", "block")
# Keys of a part that say something of the family, and keys of how a tower is made of a part.
_OF_A_FAMILY = {"final_norm", "fused", "gguf"}
_HOW_IT_IS_MADE = {"config", "rename", "stream", "without"}


def with_parts(data: Mapping[str, Any], file: str, read: _Reader) -> _Table:
    """The keys of an architecture file with all parts in their places.

    What parts say of the family is gathered from all towers: ``edges`` and ``streams`` where the
    file has none of its own, ``fused`` and ``gguf.tensors`` beside what the file says. llama.cpp
    is told of only where the file has a table ``gguf``, and a tensor that is an empty list there
    is none.

    Args:
        data: Keys of the file.
        file: Its path, for messages.
        read: Reads the keys of a TOML file.

    Raises:
        ModelError: There is no such part, or it has not what the tower takes away or renames.
    """
    towers = data.get("towers")
    if not isinstance(towers, list) or not all(isinstance(tower, dict) for tower in towers):
        return dict(data)
    made = [_made(tower, f"{file}, towers[{place}]", read) for place, tower in enumerate(towers)]
    result = {**data, "towers": [_tower_alone(tower) for tower in made]}
    made = [tower for tower in made if "like" in tower]
    edges = [_last_edge(tower, data.get("head")) for tower in made if "final_norm" in tower]
    streams = [_stream(tower) for tower in made if tower.get("stream")]
    result |= {"edges": edges} if edges and "edges" not in data else {}
    result |= {"streams": streams} if streams and "streams" not in data else {}
    fused = _one_of_each(_fused(tower) for tower in made)
    if fused and isinstance(own := data.get("fused", {}), dict):
        result["fused"] = fused | own
    gguf = data.get("gguf")
    if isinstance(gguf, dict) and isinstance(own := gguf.get("tensors", {}), dict):
        tensors = dict(item for tower in made for item in _gguf_tensors(tower)) | own
        result["gguf"] = gguf | {"tensors": {k: v for k, v in tensors.items() if v != []}}
    return result


def _tower_alone(tower: Mapping[str, Any]) -> _Table:
    """The keys of a tower that its part and it say of the tower itself."""
    keys = _OF_A_FAMILY | _HOW_IT_IS_MADE if "like" in tower else ()
    return _without_keys(tower, keys)


# -------------------------------------------------------------------------- a tower of a part


def _made(own: _Table, where: str, read: _Reader) -> _Table:
    """A tower with its part in place; as it is where it is like none.

    Raises:
        ModelError: A key beside ``like`` cannot stand there.
    """
    if "like" not in own:
        return own
    where = f"{where} (like {own['like']!r})"
    root = own.get("root")
    if not isinstance(root, str):
        raise ModelError("a tower that is like a part says its root", where=where)
    if strange := sorted(_OF_A_FAMILY & own.keys()):
        raise ModelError(f"{strange[0]!r} is said in the file, not in a tower", where=where)
    part = _changed(_part(own["like"], where, read), own, where)
    section = own.get("config", part.get("config", ""))

    def below(path: str) -> str:
        return f"{root}.{path}" if path else root

    placed = part | {
        key: f"{section}.{part[key]}".lstrip(".") for key in _CONFIG_KEYS & part.keys()
    }
    placed |= {key: below(part[key]) for key in {"entry", "blocks", "final_norm"} & part.keys()}
    if "modules" in part:
        placed["modules"] = [below(path) for path in part["modules"]]
    if "stream" in part:
        placed["stream"] = {end: [*map(below, paths)] for end, paths in part["stream"].items()}
    if "gguf" in part:
        tensors = {below(path): name for path, name in part["gguf"].get("tensors", {}).items()}
        placed["gguf"] = part["gguf"] | {"tensors": tensors}
    return _overlaid(placed, own, where)


def _part(name: Any, where: str, read: _Reader, below: tuple[str, ...] = ()) -> _Table:
    """The keys of a part, and of the one that it is like."""
    known = sorted(path.stem for path in PARTS.glob("*.toml"))
    if name not in known or name in below:
        raise ModelError(
            f"there is no part {name!r}",
            where=where,
            remedy=suggest(str(name), known) or f"the package has {', '.join(known)}",
        )
    own = read(PARTS / f"{name}.toml")
    if "like" not in own:
        return own
    base = _part(own["like"], where, read, (*below, name))
    return _overlaid(_changed(base, own, f"part {name!r}"), own, f"part {name!r}")


def _changed(part: _Table, own: Mapping[str, Any], where: str) -> _Table:
    """A part under the names that a tower has for its paths, without those that it lacks.

    Raises:
        ModelError: The part has no such path.
    """
    names, lacking = own.get("rename", {}), own.get("without", [])
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError("rename is a table of paths, old = new", where=where)
    if not isinstance(lacking, list):
        raise ModelError("without is a list of paths", where=where)
    known: list[str] = []
    _mapped(part, lambda path: known.append(path))
    for path in (*names, *lacking):
        if path not in known:
            raise ModelError(
                f"the part has no path {path!r} that could be renamed or left out",
                where=where,
                remedy=suggest(str(path), known) or f"it has {', '.join(sorted({*known} - {''}))}",
            )
    return _mapped(part, lambda path: None if path in lacking else names.get(path, path))


def _mapped(part: _Table, rule: _Rule) -> _Table:
    """A part with each of its paths replaced; what has lost its path is left out."""
    result: _Table = dict(part)

    def several(paths: Iterable[str]) -> list[str]:
        return [new for path in paths if (new := rule(path)) is not None]

    for key in {"entry_sites", "sites"} & part.keys():
        sites = [(_beside(site, rule), rule(site["path"])) for site in part[key]]
        result[key] = [site | {"path": path} for site, path in sites if path is not None]
    if "edges" in part:
        edges = []
        for edge in part["edges"]:
            end = "norm" if "norm" in edge else "producer"
            source, consumers = rule(edge[end]), several(edge["consumers"])
            if source is not None and consumers:
                edges.append(edge | {end: source, "consumers": consumers})
        result["edges"] = edges
    for key in {"entry", "blocks", "final_norm"} & part.keys():
        result[key] = rule(part[key])
    for key in {"modules", "experts"} & part.keys():
        result[key] = several(part[key])
    if "stream" in part:
        result["stream"] = {end: several(paths) for end, paths in part["stream"].items()}
    if "gguf" in part:
        result["gguf"] = {
            name: {new: said for path, said in table.items() if (new := rule(path)) is not None}
            for name, table in part["gguf"].items()
        }
    return {key: value for key, value in result.items() if value is not None}


def _beside(site: _Table, rule: _Rule) -> _Table:
    """A site under the new name of the module beside it; one that is left out keeps its name."""
    key = "in_blocks_with"
    return site | {key: rule(site[key]) or site[key]} if key in site else site


def _overlaid(part: _Table, own: _Table, where: str) -> _Table:
    """A part with what is said above it: members of lists and tables one by one, other keys whole.

    A site is known by its path, and an edge by where it starts. The ends of a stream are added.

    Raises:
        ModelError: What is said has not the type of what the part says.
    """
    result = {**part, **_without_keys(own, ("rename", "without"))}
    for key in {"entry_sites", "sites", "edges"} & part.keys() & own.keys():
        given: list[_Table] = own[key]
        if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
            raise ModelError(f"key {key!r} must be a list of tables", where=where)
        result[key] = _with_members(part[key], given, merged=key != "edges")
    if "fused" in part:
        result["fused"] = part["fused"] | own.get("fused", {})
    if "gguf" in part:
        above = own.get("gguf", {})
        result["gguf"] = {name: part["gguf"].get(name, {}) | above.get(name, {}) for name in _GGUF}
    stream = own.get("stream", {})
    if stream is False:
        return _without_keys(result, ("stream",))
    sound = isinstance(stream, dict) and not stream.keys() - {*_ENDS}
    if not sound or not all(isinstance(paths, list) for paths in stream.values()):
        raise ModelError(
            "stream has writers and norms, or is false where there is none", where=where
        )
    if stream or "stream" in part:
        ends = part.get("stream", {})
        result["stream"] = {end: [*ends.get(end, []), *stream.get(end, [])] for end in _ENDS}
    return result


def _with_members(under: list[_Table], own: list[_Table], *, merged: bool) -> list[_Table]:
    """A list of sites or edges with those that are said above it.

    A new one stands before the one that it is listed before, else last.

    Args:
        under: Of the part.
        own: What is said above it.
        merged: Whether keys of the part's that are not said again stay.
    """
    result, place = list(under), len(under)
    for item in reversed(own):
        known = [index for index, one in enumerate(result) if _source(one) == _source(item)]
        if known:
            place = known[0]
            result[place] = result[place] | item if merged else item
        else:
            result.insert(place, item)
    return result


def _source(item: Mapping[str, Any]) -> Any:
    """The path of a site, or the module where an edge starts."""
    return next((item[key] for key in ("path", "norm", "producer") if key in item), None)


def _without_keys(table: Mapping[str, Any], keys: Iterable[str]) -> _Table:
    return {key: value for key, value in table.items() if key not in keys}


# ----------------------------------------------------------------- what towers say of a family


def _last_edge(tower: Mapping[str, Any], head: Any) -> _Table:
    """The smooth edge from a tower's last norm to the head."""
    return {"kind": "norm", "norm": tower["final_norm"], "consumers": [head]}


def _stream(tower: Mapping[str, Any]) -> _Table:
    """The residual stream of a tower: what its blocks add and read, and its ends."""
    ends, blocks = tower["stream"], f"{tower.get('blocks')}.*."
    sites, edges = tower.get("sites", ()), tower.get("edges", ())
    added = [f"{blocks}{site.get('path')}" for site in sites if site.get("closes_stream")]
    read = [f"{blocks}{e['norm']}" for e in edges if "norm" in e and not e.get("inner")]
    return {
        "modality": tower.get("modality"),
        "writers": [*ends["writers"], *added],
        "norms": [*read, *ends["norms"]],
    }


def _fused(tower: Mapping[str, Any]) -> _Table:
    """Layers that servers make of those of a tower, by labels that some site of it has."""
    labels = {site.get("fuse") for site in tower.get("sites", ())}
    return {label: said for label, said in tower.get("fused", {}).items() if label in labels}


def _gguf_tensors(tower: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Module paths of a tower, and what llama.cpp calls their tensors."""
    gguf = tower.get("gguf", {})
    blocks = [f"{tower['blocks']}.*"] if "blocks" in tower else tower.get("modules", [])
    for path, tensors in gguf.get("block", {}).items():
        yield from ((f"{block}.{path}", tensors) for block in blocks)
    yield from gguf.get("tensors", {}).items()


def _one_of_each(tables: Iterable[Mapping[str, Any]]) -> _Table:
    """All members of several tables."""
    return {key: value for table in tables for key, value in table.items()}
