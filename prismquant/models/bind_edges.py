"""Binding smooth edges: between which tensors of a concrete model scale can move."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prismquant.errors import ModelError
from prismquant.models.arch import ArchSpec, Edge, EdgeKind, Tower
from prismquant.models.bind_experts import edges_of_experts
from prismquant.models.bound import BoundEdge, BoundStep, LeftAlone
from prismquant.models.config import config_value
from prismquant.models.misfits import Misfits, kind_of
from prismquant.models.norm_probe import NormProbe


def bind_edges(
    arch: ArchSpec,
    config: Any,
    modules: Mapping[str, nn.Module],
    steps: tuple[BoundStep, ...],
    left_alone: Sequence[LeftAlone],
    probe: NormProbe,
    misfits: Misfits,
) -> tuple[BoundEdge, ...]:
    """All edges of a model; those that do not hold there are told to ``misfits``.

    Args:
        arch: Describes them.
        config: Native config of the model.
        modules: All its modules by path.
        steps: Its steps.
        left_alone: Layers that are left alone, in which edges can end, too.
        probe: Knows norms.
        misfits: Takes what does not fit.
    """
    owner = {site.name: step.index for step in steps for site in step.sites}
    apart = frozenset(item.name for item in left_alone)
    binder = _EdgeBinder(arch, modules, owner, apart, probe, misfits)
    result: list[BoundEdge] = []
    for tower in arch.towers:
        heads = kv_heads = 0
        if any(edge.kind == "value" for edge in tower.edges):
            try:
                heads = int(config_value(config, tower.heads)) if tower.heads else 0
                kv_heads = int(config_value(config, tower.kv_heads)) if tower.kv_heads else heads
            except ModelError as error:
                misfits.add(error.what)
                continue
        for step in steps:
            if step.kind in ("block", "projector") and tower.runs(step.name):
                for edge in _present(tower, step.name, modules):
                    for one in edges_of_experts(edge, step.name, modules):
                        result.extend(binder.bind(one, f"{step.name}.", heads, kv_heads))
        misfits.add_all(_unheard_of(tower, steps, modules))
    for edge in arch.edges:
        result.extend(binder.bind(edge))
    return tuple(result)


def _present(tower: Tower, block: str, modules: Mapping[str, nn.Module]) -> Iterator[Edge]:
    """Edges of a block, each with the ends that the block has; not those that lack one end."""
    sites = {site.path: site for site in tower.sites}
    for edge in tower.edges:
        consumers = tuple(
            path
            for path in edge.consumers
            if (
                sites[path].is_in(block, modules) if path in sites else f"{block}.{path}" in modules
            )
        )
        producer = None if edge.producer is None else sites.get(edge.producer)
        absent = producer is not None and not producer.is_in(block, modules)
        if not absent and any(path in sites for path in consumers):
            yield dataclasses.replace(edge, consumers=consumers)


def _unheard_of(
    tower: Tower, steps: Sequence[BoundStep], modules: Mapping[str, nn.Module]
) -> Iterator[str]:
    """Findings on ends of edges that are no sites, and that no block of the tower has."""
    blocks = [s.name for s in steps if s.kind == "block" and tower.runs(s.name)]
    ends = {path for edge in tower.edges for path in edge.consumers}
    for path in sorted(ends - {site.path for site in tower.sites}):
        if blocks and not any(f"{block}.{path}" in modules for block in blocks):
            yield f"{tower.blocks}.*.{path}: an edge ends here, but no block has it"


@dataclass(frozen=True)
class _EdgeBinder:
    """Looks up the ends of edges.

    Attributes:
        arch: The architecture.
        modules: All modules by path.
        owner: Site name -> index of its step.
        left_alone: Paths of modules that are left alone.
        probe: Knows norms.
        misfits: Takes what does not fit.
    """

    arch: ArchSpec
    modules: Mapping[str, nn.Module]
    owner: Mapping[str, int]
    left_alone: frozenset[str]
    probe: NormProbe
    misfits: Misfits

    def bind(
        self, edge: Edge, prefix: str = "", heads: int = 0, kv_heads: int = 0
    ) -> Iterator[BoundEdge]:
        """The edge below a path; nothing where it does not hold."""
        name = prefix + edge.source
        source = self.modules.get(name)
        readers = tuple(prefix + path for path in edge.consumers)
        weight = getattr(source, "weight", None)
        if not isinstance(weight, torch.Tensor):
            self.misfits.add(f"{name}: an edge starts here, found {kind_of(source)}")
            return
        gain = self._gain(name, source) if edge.kind is EdgeKind.NORM else "weight"
        if gain is None:
            return
        widths = {_width(self.modules.get(path)) for path in readers}
        consumers = tuple(path for path in readers if path in self.owner)
        others = tuple(path for path in readers if path not in self.owner)
        if 0 in widths or not all(path in self.left_alone for path in others):
            self.misfits.add(f"{name}: an edge ends in something that is no site")
            return
        rows = weight.shape[0]
        size = rows // {"v": 3, "up": 2}.get(edge.part or "", 1)
        is_value = edge.kind is EdgeKind.VALUE
        if is_value and (not kv_heads or size % kv_heads):
            self.misfits.add(f"{name}: {size} value channels do not fit {kv_heads} heads")
            return
        # Grouped heads: several heads read a value channel, so the input is wider by their ratio.
        width = size if not is_value else size * heads // kv_heads
        if not width or len(widths) != 1 or max(widths) % width:
            self.misfits.add(f"{name}: {size} channels do not divide the inputs of {list(readers)}")
            return
        yield BoundEdge(
            kind=edge.kind,
            norm=name if edge.norm else None,
            producer=name if edge.producer else None,
            consumers=consumers,
            size=size,
            first_row=rows - size,
            tile=max(widths) // width,
            heads=heads if is_value else 0,
            kv_heads=kv_heads if is_value else 0,
            step=self.owner[consumers[0]],
            others=others,
            from_one=gain == "1 + weight",
            inner=edge.inner,
            gated=edge.gated,
        )

    def _gain(self, name: str, module: nn.Module | None) -> str | None:
        """Factor of a norm, weight or one more; None where scale cannot move into its weight."""
        behaviour = self.probe.behaviour(module)
        if behaviour is not None:
            return behaviour.gain
        self.misfits.add(
            f"{name}: an edge starts at this {kind_of(module)}, but its output does not scale with "
            "its weight",
            f"leave this edge, and the residual stream that is read through the norm, out of "
            f"{self.arch.name}.toml: its layers are then quantized without smoothing or rotation",
        )
        return None


def _width(module: nn.Module | None) -> int:
    """Columns of a layer's matrix; 0 for what has none."""
    weight = getattr(module, "weight", None)
    return weight.shape[1] if isinstance(weight, torch.Tensor) and weight.dim() == 2 else 0
