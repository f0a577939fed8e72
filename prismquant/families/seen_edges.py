"""Smooth edges and residual streams that a watched run makes likely; they are tried later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from prismquant.families.seen_towers import SeenModel, is_below
from prismquant.models.arch import Edge, EdgeKind, Modality, Stream, Tower
from prismquant.models.config import config_value
from prismquant.models.norm_probe import NormProbe

__all__ = ["outer_edges", "seen_streams", "with_edges"]


def with_edges(tower: Tower, seen: SeenModel) -> Tower:
    """A tower with likely edges: norm to readers, values to what reads heads, linear to linear."""
    parents = list(_parents(tower, seen))
    found: dict[tuple[str, str], Edge] = {}
    for parent in parents:
        here = [site for site in tower.sites if _join(parent, site.path) in seen.run.order]
        for edge in (*_norm_edges(parent, tower, seen), *_inner_edges(parent, here, seen, tower)):
            known = found.setdefault((edge.kind, edge.source), edge)
            # Another kind of block may have other layers behind a norm.
            ends = dict.fromkeys((*known.consumers, *edge.consumers))
            found[edge.kind, edge.source] = replace(known, consumers=tuple(ends))
    for path in tower.experts:
        up, down = f"{path}.*.up_proj", f"{path}.*.down_proj"
        found[EdgeKind.LINEAR, up] = Edge(EdgeKind.LINEAR, None, up, (down,))
    order = [site.path for site in tower.sites]
    edges = sorted(
        found.values(),
        key=lambda edge: min(order.index(one) for one in edge.consumers if one in order),
    )
    return replace(tower, edges=tuple(edges))


def outer_edges(towers: Sequence[Tower], seen: SeenModel) -> Iterator[Edge]:
    """Likely edges between units: from norms outside of blocks to layers that read them."""
    units = [parent for tower in towers for parent in _parents(tower, seen)]
    sites = {
        _join(parent, site.path)
        for tower in towers
        for parent in _parents(tower, seen)
        for site in tower.sites
    } | {seen.head}
    for path in _norms(seen):
        readers = [one for one in seen.run.readers(path) if one in sites]
        if not readers and _is_last(path, towers, seen):
            readers = [*_first_projected(towers, seen)]
        unit = next((one for one in units if is_below(path, one)), None)
        if readers and not any(unit is not None and is_below(one, unit) for one in readers):
            yield Edge(EdgeKind.NORM, path, None, tuple(readers))


def _is_last(path: str, towers: Sequence[Tower], seen: SeenModel) -> bool:
    """Whether a norm of the vision tower runs behind its blocks."""
    vision = towers[0]
    if vision.modality is not Modality.VISION or not is_below(path, vision.root):
        return False
    outside = not is_below(path, vision.blocks or "")
    return outside and seen.run.order[path] > seen.run.order[f"{vision.blocks}.0"]


def _first_projected(towers: Sequence[Tower], seen: SeenModel) -> Iterator[str]:
    """The layers that projectors begin with, between which and the tower more may lie."""
    for tower in towers:
        if tower.modality is Modality.PROJECTOR:
            first = [site.path for site in tower.sites if site.stage == 0]
            for parent in _parents(tower, seen):
                yield from (_join(parent, path) for path in first)


def seen_streams(
    towers: Sequence[Tower], outer: Sequence[Edge], seen: SeenModel
) -> Iterator[Stream]:
    """Likely residual streams of towers with blocks."""
    for tower in towers:
        if tower.blocks is None:
            continue
        members = f"{tower.blocks}.*"
        added = [f"{members}.{site.path}" for site in tower.sites if site.closes_stream]
        read = [f"{members}.{edge.norm}" for edge in tower.edges if edge.norm and not edge.inner]
        if tower.modality is Modality.LLM:
            projected = [
                _join(path, tower.sites[-1].path)
                for tower in towers
                if tower.modality is Modality.PROJECTOR
                for path in tower.modules
            ]
            enters = [seen.embeddings, *projected]
            reads = [edge.norm for edge in outer if seen.head in edge.consumers and edge.norm]
        else:
            enters = list(_first_writers(tower, seen))
            reads = [
                _join(path, edge.norm)
                for other in towers
                if other.modality is Modality.PROJECTOR
                for path in other.modules
                for edge in other.edges
                if edge.norm is not None
            ]
            reads += [e.norm for e in outer if e.norm and is_below(e.norm, tower.root)]
        writers, norms = (*enters, *added), (*read, *reads)
        if added and norms:
            yield Stream(tower.modality, tuple(dict.fromkeys(writers)), tuple(dict.fromkeys(norms)))


def _first_writers(tower: Tower, seen: SeenModel) -> Iterator[str]:
    """The layer that cuts patches, and tables that are looked up before the blocks run."""
    for site in tower.entry_sites:
        yield _join(tower.entry or "", site.path)
    for path, module in seen.modules.items():
        outside = not is_below(path, tower.blocks or "")
        if isinstance(module, nn.Embedding) and is_below(path, tower.root) and outside:
            yield path


def _parents(tower: Tower, seen: SeenModel) -> Iterator[str]:
    """Blocks or modules of a tower that ran."""
    for pattern in (f"{tower.blocks}.*",) if tower.blocks else tower.modules:
        base = pattern.removesuffix(".*")
        count = len(seen.modules[base]) if pattern != base else 0  # type: ignore[arg-type]
        paths = [f"{base}.{index}" for index in range(count)] or [pattern]
        yield from (path for path in paths if path in seen.run.order)


def _norms(seen: SeenModel) -> list[str]:
    """Norms through which scale can pass, in the order of their calls."""
    probe = NormProbe()
    return [path for path in seen.run.order if probe.behaviour(seen.modules[path]) is not None]


def _norm_edges(parent: str, tower: Tower, seen: SeenModel) -> Iterator[Edge]:
    paths: dict[str, tuple[str, ...]] = {
        _join(parent, site.path): (site.path,) for site in tower.sites
    }
    for path in tower.experts:
        paths[f"{parent}.{path}"] = f"{path}.*.gate_proj", f"{path}.*.up_proj"
    width = _width(parent, seen)
    for norm in _norms(seen):
        found = [one for one in seen.run.readers(norm) if is_below(one, parent)]
        found.sort(key=lambda one: one not in paths)
        # Routers and narrow gates, which are left alone, read it, too.
        readers = [
            paths.get(one) or (one[len(parent) + 1 :],)
            for one in found
            if one in paths or _is_matrix(seen.modules[one])
        ]
        if not any(one in paths for one in found):
            continue
        if norm != parent and is_below(norm, parent):
            inner = tower.blocks is not None and seen.run.widths.get(norm) != width
            ends = tuple(path for paths_of_one in readers for path in paths_of_one)
            yield Edge(EdgeKind.NORM, norm[len(parent) + 1 :], None, ends, inner=inner)


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight of its own."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2


def _width(block: str, seen: SeenModel) -> int | None:
    """Channels of what a block is given."""
    return seen.run.widths.get(block)


def _inner_edges(
    parent: str, sites: Sequence[object], seen: SeenModel, tower: Tower
) -> Iterator[Edge]:
    """Values to what reads heads; the layer before the last of an MLP to the last."""
    roles = {site.role: site.path for site in tower.sites if site in sites}
    out, down = roles.get("attn.out"), roles.get("mlp.down")
    if out is not None and _fits(parent, roles, out, seen, tower):
        if (values := roles.get("attn.qkv.v")) is not None:
            yield Edge(EdgeKind.VALUE, None, values, (out,))
        elif (fused := roles.get("attn.qkv")) is not None:
            yield Edge(EdgeKind.VALUE, None, fused, (out,), part="v")
    if down is not None and (up := roles.get("mlp.up")) is not None:
        yield Edge(EdgeKind.LINEAR, None, up, (down,))


def _fits(parent: str, roles: dict[str, str], out: str, seen: SeenModel, tower: Tower) -> bool:
    """Whether as many channels of values as the heads have are read."""
    source = roles.get("attn.qkv.v") or roles.get("attn.qkv")
    if source is None or tower.heads is None:
        return False
    producer, consumer = (seen.modules[_join(parent, path)] for path in (source, out))
    if not isinstance(producer, nn.Linear) or not isinstance(consumer, nn.Linear):
        return False
    rows, columns = producer.out_features, consumer.in_features
    heads = int(config_value(seen.config, tower.heads))
    kv_heads = int(config_value(seen.config, tower.kv_heads)) if tower.kv_heads else heads
    if "attn.qkv.v" not in roles:
        if rows % 3 or heads != kv_heads:
            return False
        rows //= 3
    return bool(kv_heads) and rows % kv_heads == 0 and columns == rows * heads // kv_heads


def _join(parent: str, path: str) -> str:
    return f"{parent}.{path}" if path else parent
