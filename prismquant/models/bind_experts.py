"""Binding experts: the sites, edges and stored matrices of each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from prismquant.models.arch import ArchSpec, Edge, Site
from prismquant.models.bound import ExpertPlace
from prismquant.models.fused_tensors import fused_views
from prismquant.models.misfits import Misfits, kind_of
from prismquant.shards import NO_VIEWS, infos_with_views

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prismquant.headers import TensorInfo
    from prismquant.models.names import NameMap
    from prismquant.shards import TensorView

# Stands for the number of an expert in the middle of a path.
_EACH = ".*."


def sites_of_experts(
    site: Site, parent: str, modules: Mapping[str, nn.Module], misfits: Misfits
) -> Iterator[tuple[Site, ExpertPlace | None]]:
    """The site; where its path has a ``*``, that of each expert, with an input of its own.

    Args:
        site: A site of a step.
        parent: Path of the step's module.
        modules: All modules by path.
        misfits: Takes experts that are none.
    """
    holder, star, _ = site.path.partition(_EACH)
    if not star:
        yield site, None
        return
    module = f"{parent}.{holder}"
    experts = modules.get(module)
    if not isinstance(experts, nn.ModuleList):
        misfits.add(f"{module}: expected experts, found {kind_of(experts)}")
        return
    for number in range(len(experts)):
        own = replace(
            site,
            path=_of_expert(site.path, number),
            input=f"{site.input}.{number}",
            fuse=f"{site.fuse}.{number}" if site.fuse else None,
        )
        yield own, ExpertPlace(module, number, dealt=getattr(experts, "dealt", False))


def edges_of_experts(edge: Edge, parent: str, modules: Mapping[str, nn.Module]) -> Iterator[Edge]:
    """The edge; where its producer's path has a ``*``, that of each expert.

    A norm before the experts, whose path has none, has the layers of all of them as consumers.

    Args:
        edge: An edge of a step.
        parent: Path of the step's module.
        modules: All modules by path.
    """

    def count(path: str) -> int:
        experts = modules.get(f"{parent}.{path.partition(_EACH)[0]}")
        return len(experts) if isinstance(experts, nn.ModuleList) else 0

    if _EACH not in edge.source:
        readers: list[str] = []
        for path in edge.consumers:
            several = [_of_expert(path, number) for number in range(count(path))]
            readers += several if _EACH in path else [path]
        yield replace(edge, consumers=tuple(readers))
        return
    for number in range(count(edge.source)):
        consumers = tuple(_of_expert(path, number) for path in edge.consumers)
        yield replace(edge, producer=_of_expert(edge.source, number), consumers=consumers)


def _of_expert(path: str, number: int) -> str:
    return path.replace(_EACH, f".{number}.")


def shown_tensors(
    arch: ArchSpec,
    model: nn.Module,
    names: NameMap,
    infos: Mapping[str, TensorInfo],
) -> tuple[Mapping[str, TensorView], Mapping[str, TensorInfo]]:
    """Matrices that lie within stored tensors, by their own names; and headers that show them.

    Args:
        arch: Says which modules hold experts, and which tensors are joined on disk.
        model: Without weights.
        names: Its names on disk.
        infos: Headers of all stored tensors.
    """
    views: dict[str, TensorView] = {}
    if arch.experts:
        from prismquant.models.experts import expert_views  # of few models

        views |= expert_views(model, names, infos)
    for layout in arch.layouts:
        if layout.joined and layout.name == names.layout:
            views |= fused_views(layout, infos)
    return (views, infos_with_views(infos, views)) if views else (NO_VIEWS, infos)
