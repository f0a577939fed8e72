"""Binding smooth edges: between which tensors of a concrete model scale can move."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prismquant.errors import ModelError
from prismquant.models.arch import ArchSpec, Edge, EdgeKind
from prismquant.models.bind_experts import edges_of_experts
from prismquant.models.bound import BoundEdge, BoundStep
from prismquant.models.config import config_value
from prismquant.models.misfits import Misfits, kind_of
from prismquant.models.norm_probe import NormProbe


def bind_edges(
    arch: ArchSpec,
    config: Any,
    modules: Mapping[str, nn.Module],
    steps: tuple[BoundStep, ...],
    probe: NormProbe,
    misfits: Misfits,
) -> tuple[BoundEdge, ...]:
    """All edges of a model; those that do not hold there are told to ``misfits``."""
    owner = {site.name: step.index for step in steps for site in step.sites}
    binder = _EdgeBinder(arch, modules, owner, probe, misfits)
    result: list[BoundEdge] = []
    for tower in arch.towers:
        try:
            heads = int(config_value(config, tower.heads)) if tower.heads else 0
            kv_heads = int(config_value(config, tower.kv_heads)) if tower.kv_heads else heads
        except ModelError as error:
            misfits.add(error.what)
            continue
        for step in steps:
            if step.modality is tower.modality and step.kind in ("block", "projector"):
                lacking = {s.path for s in tower.sites if not s.is_in(step.name, modules)}
                for edge in (kept for e in tower.edges if (kept := _without(e, lacking))):
                    for one in edges_of_experts(edge, step.name, modules):
                        result.extend(binder.bind(one, f"{step.name}.", heads, kv_heads))
    for edge in arch.edges:
        result.extend(binder.bind(edge))
    return tuple(result)


def _without(edge: Edge, lacking: set[str]) -> Edge | None:
    """The edge in a block that lacks some sites; None where one of its ends is missing."""
    consumers = tuple(path for path in edge.consumers if path not in lacking)
    if not consumers or edge.producer in lacking:
        return None
    return dataclasses.replace(edge, consumers=consumers)


@dataclass(frozen=True)
class _EdgeBinder:
    """Looks up the ends of edges.

    Attributes:
        arch: The architecture.
        modules: All modules by path.
        owner: Site name -> index of its step.
        probe: Knows norms.
        misfits: Takes what does not fit.
    """

    arch: ArchSpec
    modules: Mapping[str, nn.Module]
    owner: Mapping[str, int]
    probe: NormProbe
    misfits: Misfits

    def bind(
        self, edge: Edge, prefix: str = "", heads: int = 0, kv_heads: int = 0
    ) -> Iterator[BoundEdge]:
        """The edge below a path; nothing where it does not hold."""
        name = prefix + edge.source
        source = self.modules.get(name)
        consumers = tuple(prefix + path for path in edge.consumers)
        weight = getattr(source, "weight", None)
        if not isinstance(weight, torch.Tensor):
            self.misfits.add(f"{name}: an edge starts here, found {kind_of(source)}")
            return
        if edge.kind is EdgeKind.NORM and not self._is_plain_norm(name, source):
            return
        found = [self.modules.get(path) for path in consumers]
        linears = [module for module in found if isinstance(module, nn.Linear)]
        if len(linears) != len(consumers) or any(path not in self.owner for path in consumers):
            self.misfits.add(f"{name}: an edge ends in something that is no site")
            return
        rows = weight.shape[0]
        size = rows // 3 if edge.part == "v" else rows
        is_value = edge.kind is EdgeKind.VALUE
        if is_value and (not kv_heads or size % kv_heads):
            self.misfits.add(f"{name}: {size} value channels do not fit {kv_heads} heads")
            return
        # Grouped heads: several heads read a value channel, so the input is wider by their ratio.
        width = size if not is_value else size * heads // kv_heads
        if not width or any(linear.in_features % width for linear in linears):
            self.misfits.add(
                f"{name}: {size} channels do not divide the inputs of {list(consumers)}"
            )
            return
        yield BoundEdge(
            kind=edge.kind,
            norm=name if edge.norm else None,
            producer=name if edge.producer else None,
            consumers=consumers,
            size=size,
            first_row=rows - size,
            tile=linears[0].in_features // width,
            heads=heads if is_value else 0,
            kv_heads=kv_heads if is_value else 0,
            step=self.owner[consumers[0]],
        )

    def _is_plain_norm(self, name: str, module: nn.Module | None) -> bool:
        """Whether scale can move into a norm's weight as it stands."""
        behaviour = self.probe.behaviour(module)
        if behaviour is not None and behaviour.gain == "weight":
            return True
        why = "its output does not scale with its weight"
        if behaviour is not None:
            why = f"it multiplies by {behaviour.gain}, and scale can only move into a plain weight"
        self.misfits.add(
            f"{name}: an edge starts at this {kind_of(module)}, but {why}",
            f"leave this edge, and the residual stream that is read through the norm, out of "
            f"{self.arch.name}.toml: its layers are then quantized without smoothing or rotation",
        )
        return False
