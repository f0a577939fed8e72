"""Binding residual streams: what writes to them, and the norms through which they are read."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from prismquant.models.arch import ArchSpec, Stream
from prismquant.models.bind_edges import kind_of
from prismquant.models.bound import BoundEdge, BoundStream

if TYPE_CHECKING:
    from collections.abc import Mapping

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def bind_streams(
    arch: ArchSpec,
    modules: Mapping[str, nn.Module],
    edges: tuple[BoundEdge, ...],
    findings: list[str],
) -> tuple[BoundStream, ...]:
    streams = [_bind_stream(stream, modules, findings) for stream in arch.streams]
    bound = tuple(stream for stream in streams if stream is not None)
    if len(bound) != len(arch.streams):
        return bound
    known = Counter(name for stream in bound for name in stream.norms)
    sources = {edge.norm for edge in edges if edge.norm is not None}
    findings.extend(
        f"{name}: read from {known[name] or 'no'} residual streams"
        for name in sorted(sources | known.keys())
        if bound and known[name] != 1
    )
    findings.extend(
        f"{name}: no edge starts at this norm of a residual stream"
        for name in sorted(known.keys() - sources)
    )
    return bound


def _bind_stream(
    stream: Stream, modules: Mapping[str, nn.Module], findings: list[str]
) -> BoundStream | None:
    writers = _matches(stream.writers, modules, findings)
    norms = _matches(stream.norms, modules, findings)
    widths = Counter(
        width for name in writers if (width := _written(name, modules, findings)) is not None
    )
    if not widths or not norms or widths.total() != len(writers):
        return None
    width = widths.most_common(1)[0][0]
    if len(widths) > 1:
        findings.append(f"the writers of the {stream.modality} stream differ in width: {[*widths]}")
    centred = {name: _is_centred(modules[name]) for name in norms}
    for name, kind in centred.items():
        weight = getattr(modules[name], "weight", None)
        if kind is None or not isinstance(weight, torch.Tensor) or weight.numel() % width:
            findings.append(
                f"{name}: expected a norm of {width} channels, found {kind_of(modules[name])}"
            )
    return BoundStream(
        modality=stream.modality,
        width=width,
        writers=tuple(name for name in writers if not isinstance(modules[name], nn.Embedding)),
        embeddings=tuple(name for name in writers if isinstance(modules[name], nn.Embedding)),
        norms=norms,
        centred=any(centred.values()),
    )


def _matches(
    patterns: tuple[str, ...], modules: Mapping[str, nn.Module], findings: list[str]
) -> tuple[str, ...]:
    result: list[str] = []
    for pattern in patterns:
        regex = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        found = [name for name in modules if regex.fullmatch(name)]
        members = modules.get(pattern.partition(".*")[0])
        if not found and not (isinstance(members, nn.ModuleList) and len(members) == 0):
            findings.append(f"{pattern}: a residual stream names it, but no module has this path")
        result.extend(found)
    return tuple(result)


def _written(name: str, modules: Mapping[str, nn.Module], findings: list[str]) -> int | None:
    """Channels that a module adds to the stream."""
    module = modules[name]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return int(module.weight.shape[0])
    findings.append(f"{name}: expected a writer of a residual stream, found {kind_of(module)}")
    return None


def _is_centred(module: nn.Module) -> bool | None:
    """Whether a norm subtracts the mean; None for a module that is no norm."""
    if isinstance(module, nn.LayerNorm):
        return True
    return False if kind_of(module).endswith("RMSNorm") else None
