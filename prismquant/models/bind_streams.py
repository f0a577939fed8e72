"""Binding residual streams: what writes to them, and the norms through which they are read."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor, nn

from prismquant.models.arch import ArchSpec, Modality, Stream
from prismquant.models.bound import BoundEdge, BoundStep, BoundStream
from prismquant.models.claims import CONVOLUTIONS
from prismquant.models.misfits import Misfits, kind_of
from prismquant.models.norm_probe import NormProbe

if TYPE_CHECKING:
    from collections.abc import Mapping


def bind_streams(
    arch: ArchSpec,
    modules: Mapping[str, nn.Module],
    steps: tuple[BoundStep, ...],
    edges: tuple[BoundEdge, ...],
    probe: NormProbe,
    misfits: Misfits,
) -> tuple[BoundStream, ...]:
    """The residual streams of a model; what is wrong with them is told to ``misfits``.

    A tower need not have one. Norms of projectors read the vision tower's.
    """
    # Layers of some blocks, of which a model may have none; no matrix is lost by that.
    absent = {
        f"{tower.blocks}.*.{site.path}"
        for tower in arch.towers
        for site in tower.sites
        if site.in_blocks_with is not None
    }
    absent = {path for path in absent if not _found(path, modules)}
    streams = [_bind_stream(stream, absent, modules, probe, misfits) for stream in arch.streams]
    bound = tuple(stream for stream in streams if stream is not None)
    if len(bound) != len(arch.streams):
        return bound
    known = Counter(name for stream in bound for name in stream.norms)
    described = {stream.modality for stream in bound}
    if Modality.VISION in described:
        described.add(Modality.PROJECTOR)
    sources = {
        edge.norm
        for edge in edges
        if edge.norm is not None and not edge.inner and steps[edge.step].modality in described
    }
    misfits.add_all(
        f"{name}: read from {known[name] or 'no'} residual streams"
        for name in sorted(sources | known.keys())
        if bound and known[name] != 1
    )
    misfits.add_all(
        f"{name}: no edge starts at this norm of a residual stream"
        for name in sorted(known.keys() - sources)
    )
    return bound


def _bind_stream(
    stream: Stream,
    absent: set[str],
    modules: Mapping[str, nn.Module],
    probe: NormProbe,
    misfits: Misfits,
) -> BoundStream | None:
    there = tuple(path for path in stream.writers if path not in absent)
    writers = _matches(there, modules, misfits)
    norms = _matches(stream.norms, modules, misfits)
    widths = Counter(
        width for name in writers if (width := _written(name, modules, misfits)) is not None
    )
    if not widths or not norms or widths.total() != len(writers):
        return None
    width = widths.most_common(1)[0][0]
    if len(widths) > 1:
        misfits.add(f"the writers of the {stream.modality} stream differ in width: {[*widths]}")
    centred = False
    for name in norms:
        behaviour = probe.behaviour(modules[name])
        known = behaviour is not None and behaviour.centred is not None
        weight = modules[name].weight if known else None
        if not isinstance(weight, Tensor) or weight.numel() % width:
            misfits.add(
                f"{name}: expected a norm of {width} channels, found {kind_of(modules[name])}"
            )
        centred |= behaviour is not None and bool(behaviour.centred)
    return BoundStream(
        modality=stream.modality,
        width=width,
        writers=tuple(name for name in writers if not isinstance(modules[name], nn.Embedding)),
        embeddings=tuple(name for name in writers if isinstance(modules[name], nn.Embedding)),
        norms=norms,
        centred=centred,
    )


def _matches(
    patterns: tuple[str, ...], modules: Mapping[str, nn.Module], misfits: Misfits
) -> tuple[str, ...]:
    result: list[str] = []
    for pattern in patterns:
        found = _found(pattern, modules)
        members = modules.get(pattern.partition(".*")[0])
        if not found and not (isinstance(members, nn.ModuleList) and len(members) == 0):
            misfits.add(f"{pattern}: a residual stream names it, but no module has this path")
        result.extend(found)
    return tuple(result)


def _found(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules whose paths a pattern of a stream fits."""
    regex = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    return [name for name in modules if regex.fullmatch(name)]


def _written(name: str, modules: Mapping[str, nn.Module], misfits: Misfits) -> int | None:
    """Channels that a module adds to the stream."""
    module = modules[name]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return int(module.weight.shape[0])
    misfits.add(f"{name}: expected a writer of a residual stream, found {kind_of(module)}")
    return None
