"""A draft's edges and streams, tried on the small model; what does not hold is taken out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from prismquant.data.batches import Batch
from prismquant.errors import ModelError
from prismquant.families.arch_text import arch_text
from prismquant.families.small_batches import run_specimen
from prismquant.families.specimen_run import TOLERANCE, SpecimenRun
from prismquant.families.tried_rotations import rotated_parts
from prismquant.families.tried_scales import scale_differences
from prismquant.models.arch import ArchSpec, Edge, EdgeKind, Modality
from prismquant.models.arch_files import BESIDE
from prismquant.models.bind import bind
from prismquant.storage import write_text

__all__ = ["tried_draft"]

_Notes = dict[str, list[str]]
_NUMBER = re.compile(r"\.\d+(?=\.)")


def tried_draft(
    arch: ArchSpec, notes: _Notes, specimen: Path, batches: Mapping[str, Batch]
) -> tuple[ArchSpec, _Notes]:
    """The draft without edges and streams that change what the model computes.

    Args:
        arch: The draft.
        notes: Its comments.
        specimen: Folder of the small model.
        batches: For it.

    Returns:
        The draft, and comments that name what was taken out.
    """
    findings: list[str] = []
    for without in (_as_it_is, _without_text_stream, _without_streams, _without_edges):
        arch, said = without(arch)
        write_text(specimen / BESIDE, arch_text(arch, {}))
        try:
            bound = bind(specimen)
        except ModelError as error:
            findings = [*error.findings] or [str(error.what)]
            continue
        if said:
            lines = (f"- {line}" for line in findings)
            notes["streams"] += [f"{said}, as these do not fit:", *lines]
        run, _ = run_specimen(bound, batches)
        # One batch of all kinds shows as much as all batches.
        whole = max(run.batches, key=lambda kind: kind.count(" and "))
        run = replace(run, batches={whole: run.batches[whole]})
        arch, notes = _with_true_edges(arch, notes, run)
        return _with_true_streams(arch, notes, specimen, run)
    notes["top"] += ["DRAFT: it does not fit the model yet:", *(f"- {line}" for line in findings)]
    return arch, notes


def _as_it_is(arch: ArchSpec) -> tuple[ArchSpec, str]:
    return arch, ""


def _without_text_stream(arch: ArchSpec) -> tuple[ArchSpec, str]:
    streams = tuple(one for one in arch.streams if one.modality is not Modality.LLM)
    return replace(arch, streams=streams), "DRAFT: without the language model's residual stream"


def _without_streams(arch: ArchSpec) -> tuple[ArchSpec, str]:
    return replace(arch, streams=()), "DRAFT: without residual streams"


def _without_edges(arch: ArchSpec) -> tuple[ArchSpec, str]:
    towers = tuple(replace(tower, edges=()) for tower in arch.towers)
    return replace(arch, towers=towers, edges=()), "DRAFT: without edges and residual streams"


def _with_true_edges(arch: ArchSpec, notes: _Notes, run: SpecimenRun) -> tuple[ArchSpec, _Notes]:
    """The draft with those edges along which a random scale changes nothing, in every block."""
    still: dict[tuple[str, str], bool] = {}
    passed: set[tuple[str, str]] = set()
    for edge in run.bound.edges:
        moved, alone = scale_differences(run, edge)
        key = (str(edge.kind), _NUMBER.sub(".*", edge.source))
        still[key] = still.get(key, True) and moved <= TOLERANCE
        passed |= {key} if alone > TOLERANCE else set()
    refused: list[str] = []

    def true(edges: Sequence[Edge], parents: Sequence[str]) -> tuple[Edge, ...]:
        kept = []
        for edge in edges:
            sources = [_NUMBER.sub(".*", f"{parent}{edge.source}") for parent in parents]
            keys = [(str(edge.kind), source) for source in sources]
            if all(key in passed and still[key] for key in keys if key in still):
                kept.append(edge)
            else:
                refused.append(f"{sources[0]} to {', '.join(edge.consumers)}")
        return tuple(kept)

    towers = []
    for tower in arch.towers:
        parents = [f"{tower.blocks}.0."] if tower.blocks else [f"{one}." for one in tower.modules]
        towers.append(replace(tower, edges=true(tower.edges, parents)))
    found = replace(arch, towers=tuple(towers), edges=true(arch.edges, [""]))
    lines = [f"no edge, a scale that moves along it changes the model: {one}" for one in refused]
    return _with_sound_streams(found), notes | {"end": [*lines, *notes["end"]]}


def _with_sound_streams(arch: ArchSpec) -> ArchSpec:
    """The draft with those streams whose norms all start an edge."""
    sources = {edge.norm for edge in arch.edges}
    for tower in arch.towers:
        parents = [f"{tower.blocks}.*"] if tower.blocks else tower.modules
        sources |= {f"{parent}.{edge.norm}" for parent in parents for edge in tower.edges}
    return replace(
        arch, streams=tuple(one for one in arch.streams if sources.issuperset(one.norms))
    )


def _with_true_streams(
    arch: ArchSpec, notes: _Notes, specimen: Path, run: SpecimenRun
) -> tuple[ArchSpec, _Notes]:
    """The draft with what rotations have shown of streams, values and inputs of last MLP layers."""
    write_text(specimen / BESIDE, arch_text(arch, {}))
    try:
        bound = bind(specimen)
    except ModelError as error:
        why = [f"DRAFT: no residual streams: {line}" for line in error.findings[:2]]
        return replace(arch, streams=()), notes | {"streams": [*notes["streams"], *why]}
    run = SpecimenRun.of(bound, run.model, run.batches)
    lines: list[str] = []
    towers = list(arch.towers)
    streams = arch.streams
    for modality, part, claim in rotated_parts(run):
        if claim.holds:
            continue
        [place] = [i for i, one in enumerate(towers) if one.modality == modality and one.blocks]
        lines.append(f"{claim.what}: no ({claim.said})")
        if part == "residual":
            streams = tuple(one for one in streams if one.modality != modality)
        elif part == "values":
            towers[place] = replace(towers[place], edges=_gated(towers[place].edges))
        else:
            sites = (replace(site, online_rotation=False) for site in towers[place].sites)
            towers[place] = replace(towers[place], sites=tuple(sites))
    arch = replace(arch, towers=tuple(towers), streams=streams)
    return arch, notes | {"end": [*lines, *notes["end"]]}


def _gated(edges: Sequence[Edge]) -> tuple[Edge, ...]:
    """Edges of values through which scale passes, and no rotation."""
    return tuple(replace(e, gated=True) if e.kind is EdgeKind.VALUE else e for e in edges)
