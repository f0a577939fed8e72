"""Binding smooth edges: between which tensors of a concrete model scale can move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prismquant.errors import ModelError
from prismquant.models.arch import ArchSpec, Edge, EdgeKind
from prismquant.models.bound import BoundEdge, BoundStep
from prismquant.models.config import config_value

if TYPE_CHECKING:
    from collections.abc import Mapping


def bind_edges(
    arch: ArchSpec,
    config: Any,
    modules: Mapping[str, nn.Module],
    steps: tuple[BoundStep, ...],
    findings: list[str],
) -> tuple[BoundEdge, ...]:
    result: list[BoundEdge] = []
    owner = {site.name: step.index for step in steps for site in step.sites}
    for tower in arch.towers:
        try:
            heads = int(config_value(config, tower.heads)) if tower.heads else 0
            kv_heads = int(config_value(config, tower.kv_heads)) if tower.kv_heads else heads
        except ModelError as error:
            findings.append(error.what)
            continue
        for step in steps:
            if step.modality is tower.modality and step.kind in ("block", "projector"):
                for edge in tower.edges:
                    bound = _bind_edge(edge, step.name, heads, kv_heads, modules, owner, findings)
                    result.extend(bound)
    for edge in arch.edges:
        result.extend(_bind_edge(edge, "", 0, 0, modules, owner, findings))
    return tuple(result)


def _bind_edge(
    edge: Edge,
    parent: str,
    heads: int,
    kv_heads: int,
    modules: Mapping[str, nn.Module],
    owner: Mapping[str, int],
    findings: list[str],
) -> list[BoundEdge]:
    prefix = f"{parent}." if parent else ""
    source = modules.get(prefix + edge.source)
    consumers = tuple(prefix + path for path in edge.consumers)
    weight = getattr(source, "weight", None)
    if not isinstance(weight, torch.Tensor):
        findings.append(f"{prefix + edge.source}: an edge starts here, found {kind_of(source)}")
        return []
    linears = [module for path in consumers if isinstance(module := modules.get(path), nn.Linear)]
    if len(linears) != len(consumers) or any(path not in owner for path in consumers):
        findings.append(f"{prefix + edge.source}: an edge ends in something that is no site")
        return []
    rows = weight.shape[0]
    size = rows // 3 if edge.part == "v" else rows
    is_value = edge.kind is EdgeKind.VALUE
    if is_value and (not kv_heads or size % kv_heads):
        findings.append(
            f"{prefix + edge.source}: {size} value channels do not fit {kv_heads} heads"
        )
        return []
    # Grouped heads: a value channel is read by several heads, so the input is wider by their ratio.
    width = size if not is_value else size * heads // kv_heads
    if not width or any(linear.in_features % width for linear in linears):
        findings.append(
            f"{prefix + edge.source}: {size} channels do not divide the inputs of {list(consumers)}"
        )
        return []
    return [
        BoundEdge(
            kind=edge.kind,
            norm=prefix + edge.norm if edge.norm else None,
            producer=prefix + edge.producer if edge.producer else None,
            consumers=consumers,
            size=size,
            first_row=rows - size,
            tile=linears[0].in_features // width,
            heads=heads if is_value else 0,
            kv_heads=kv_heads if is_value else 0,
            step=owner[consumers[0]],
        )
    ]


def kind_of(module: nn.Module | None) -> str:
    """Name of a module's class, or 'nothing'."""
    return "nothing" if module is None else type(module).__name__
