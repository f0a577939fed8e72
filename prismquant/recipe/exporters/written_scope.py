"""Layers that a recipe is written out for: those of one model, or of every known family.

Other tools know layers by their names, our recipes by what they do. Without a model the names are
those of all families at once, which differ from one another wherever their layers do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prismquant.models.arch import ArchSpec, EdgeKind, Modality, Site, Tower
from prismquant.models.arch_files import known_archs

ANY_DEPTH = 128
"""Blocks of a tower whose depth is not known, where a recipe names single ones."""
_HEAD, _PATCH = "lm_head", "patch_embed"


@dataclass(frozen=True)
class WrittenLayer:
    """A layer by all that a rule can ask for, and by how its name is made.

    Attributes:
        name: Module path.
        modality: Of its tower.
        role: Its role.
        path: The module path with ``*`` for the number of a block.
        block: The number of the block; None where it is in none.
        reads_pixels: Whether it is a patch embedding.
    """

    name: str
    modality: str
    role: str
    path: str
    block: int | None = None
    reads_pixels: bool = False


@dataclass(frozen=True)
class WrittenEdge:
    """A smooth edge, its ends with ``*`` for the number of a block.

    Attributes:
        source: Norm or layer that produces.
        consumers: Layers that read it.
        modality: Of the layers.
        kind: Form of the producer.
        fused: Whether the producer is but a part of the layer.
    """

    source: str
    consumers: tuple[str, ...]
    modality: str
    kind: EdgeKind
    fused: bool = False


@dataclass(frozen=True)
class WrittenScope:
    """All layers and edges that a recipe may mean.

    Attributes:
        layers: Each once.
        edges: Each once.
        told: Whose layers they are, in words.
        exact: Whether they are of one model.
        families: Names of the architectures.
    """

    layers: tuple[WrittenLayer, ...]
    edges: tuple[WrittenEdge, ...]
    told: str
    exact: bool
    families: tuple[str, ...]


def family_scope(blocks: int) -> WrittenScope:
    """Layers of all known families, of so many blocks a tower."""
    archs = known_archs()
    paths = dict.fromkeys(path for arch in archs.values() for path in _paths(arch))
    layers = [layer for path in paths for layer in _members(path, blocks)]
    edges = dict.fromkeys(edge for arch in archs.values() for edge in _edges(arch))
    return WrittenScope(tuple(layers), tuple(edges), "any known family", False, tuple(archs))


def model_scope(folder: Path) -> WrittenScope:
    """Layers of a model.

    Raises:
        ModelError: It is none of a known family.
    """
    # A model is built, empty, to find its layers: torch is loaded for this alone.
    from prismquant.models.bind import bind

    bound = bind(folder, headers_required=False, quantized=True)
    known = [(_expression(path.path), path) for path in _paths(bound.arch)]
    layers = []
    for site in bound.sites:
        pattern, path = next(one for one in known if one[0].fullmatch(site.name))
        found = pattern.fullmatch(site.name)
        block = int(found.group(1)) if found and found.groups() else None
        layers.append(
            WrittenLayer(
                site.name, site.modality.value, site.role, path.path, block, path.reads_pixels
            )
        )
    edges = tuple(dict.fromkeys(_edges(bound.arch)))
    return WrittenScope(tuple(layers), edges, str(folder), True, (bound.arch.name,))


def _members(layer: WrittenLayer, blocks: int) -> Iterator[WrittenLayer]:
    if "*" not in layer.path:
        yield layer
        return
    for number in range(blocks):
        name = layer.path.replace("*", str(number))
        yield WrittenLayer(name, layer.modality, layer.role, layer.path, number, layer.reads_pixels)


def _paths(arch: ArchSpec) -> tuple[WrittenLayer, ...]:
    """Layers of an architecture, each under its path."""
    found = []
    for tower in arch.towers:
        for step, sites in _steps(tower):
            for site in sites:
                # A step may be a layer itself, as a patch embedding is in Pixtral.
                path = f"{step}.{site.path}".removesuffix(".")
                patch = site.role == _PATCH
                found.append(WrittenLayer(path, tower.modality.value, site.role, path, None, patch))
    return (*found, WrittenLayer(arch.head, Modality.LLM.value, _HEAD, arch.head))


def _steps(tower: Tower) -> Iterable[tuple[str, tuple[Site, ...]]]:
    if tower.entry is not None:
        yield tower.entry, tower.entry_sites
    if tower.blocks is not None:
        yield f"{tower.blocks}.*", tower.sites
    for module in tower.modules:
        yield module, tower.sites


def _edges(arch: ArchSpec) -> Iterator[WrittenEdge]:
    for tower in arch.towers:
        for step, _ in _steps(tower):
            if step == tower.entry:
                continue
            for edge in tower.edges:
                ends = tuple(f"{step}.{one}" for one in edge.consumers)
                source = f"{step}.{edge.source}"
                modality = tower.modality.value
                yield WrittenEdge(source, ends, modality, edge.kind, edge.part is not None)
    for edge in arch.edges:
        heads = {path.path: path.modality for path in _paths(arch)}
        modality = heads.get(edge.consumers[0], Modality.LLM.value)
        yield WrittenEdge(edge.source, edge.consumers, modality, edge.kind, edge.part is not None)


def _expression(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(r"\*", r"(\d+)"))
