"""A checkpoint that is only planned, as the rules see one: its configuration and headers to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from prismquant.check.apply_rules import apply
from prismquant.check.checkpoint import Checkpoint
from prismquant.check.findings import Finding, Severity
from prismquant.check.open_checkpoint import checked_layers
from prismquant.check.rule_table import FILE_RULES, RULES
from prismquant.check.target_reader import TargetReader
from prismquant.export.compressed_tensors.config_writer import written_config
from prismquant.export.compressed_tensors.expected import expected_tensors
from prismquant.formats.section import CONFIG_KEY, DENSE, group_in_transformers
from prismquant.formats.section_grammar import read_section
from prismquant.headers import TensorInfo
from prismquant.models.bound import BoundModel
from prismquant.models.rotated_towers import untied
from prismquant.plan.plan import Plan

KV_CACHE = "kv_cache"
"""Name under which :func:`refusals` tells of keys and values."""

# The rule on layers that vLLM takes for something else than they are.
_MISREAD = "names.vllm"
# What no header says: the file that a tensor will be in.
_NO_FILE = ""
_RULES = tuple(rule for rule in RULES if rule not in FILE_RULES)


def refusals(plan: Plan, bound: BoundModel, reader: TargetReader | str) -> dict[str, str]:
    """Layers that a reader cannot load as they are planned, or would not compute as planned.

    The rules of ``prismquant check`` are held against the configuration and the tensors that the
    plan would write, and an error of theirs is a refusal; rules about files and values see nothing.

    Args:
        plan: What would be written.
        bound: The model that it is laid over.
        reader: Who is to load it: ``vllm``, ``transformers``, ``sglang`` or ``prismquant``.

    Returns:
        Layer -> why, in words; :data:`KV_CACHE` stands for the keys and values. What is wrong with
        the checkpoint as a whole is said of every quantized layer, and of the cache.

    Raises:
        ValueError: There is no such reader.
    """
    target = TargetReader(reader)
    checkpoint = planned_checkpoint(plan, bound, target)
    found: dict[str, list[str]] = {}
    if target is not TargetReader.PRISMQUANT:
        for row in plan.quantized:
            if row.private_activations:
                what = f"no checkpoint format declares {row.config.describe()}"
                found.setdefault(row.site.name, []).append(what)
    findings = [one for one in apply(_RULES, checkpoint) if one.severity is Severity.ERROR]
    misread: set[str] = set()
    # Whoever takes a layer for something else stumbles over its tensors, too: once is enough.
    for finding in sorted(findings, key=lambda one: one.rule != _MISREAD):
        for name in _concerned(finding, plan, checkpoint):
            if name not in misread:
                found.setdefault(name, []).append(finding.what)
            if finding.rule == _MISREAD:
                misread.add(name)
    return {name: "; ".join(dict.fromkeys(reasons)) for name, reasons in found.items()}


def planned_checkpoint(plan: Plan, bound: BoundModel, target: TargetReader | None) -> Checkpoint:
    """The checkpoint that a plan would write, without values, for a reader.

    Args:
        plan: What would be written.
        bound: The model that it is laid over.
        target: The reader; None: none in particular.
    """
    config = written_config(plan, bound)
    tied = bound.tied and not untied(bound, plan.towers)
    checkpoint = Checkpoint(
        folder=bound.folder,
        target=target,
        config=config,
        section=config.get(CONFIG_KEY) or {},
        read=read_section(config),
        headers={},
        unreadable={},
        index=None,
        modelopt_file=None,
        model=replace(bound, tied=tied),
        model_fault="",
        model_known=True,
    )
    checkpoint = replace(checkpoint, layers=tuple(checked_layers(checkpoint, bound)))
    return replace(checkpoint, headers={_NO_FILE: dict(_headers(checkpoint, plan, bound))})


def _headers(
    checkpoint: Checkpoint, plan: Plan, bound: BoundModel
) -> Iterator[tuple[str, TensorInfo]]:
    """Tensors to be, by their names on disk, with dtypes and shapes."""
    coded = {row.site.name: row for row in plan.quantized if row.layout != DENSE}
    for layer in checkpoint.layers:
        row = coded.get(layer.name)
        group = group_in_transformers(layer.called, checkpoint.read)
        if row is None or group is None:
            continue
        for suffix, one in expected_tensors(group, layer.out_features, layer.in_features).items():
            dtype = row.site.dtype if row.site.dtype in one.dtypes else one.dtypes[0]
            yield f"{layer.disk}.{suffix}", TensorInfo(dtype, one.shapes[0], _NO_FILE)
    own = {site.name: site.dtype for site in bound.sites}
    tied = {f"{bound.arch.head}.weight"} if bound.tied else set()
    for name, shape in bound.shapes.items():
        layer_name = name.removesuffix(".weight")
        if layer_name not in coded and name not in tied:
            dtype = own.get(layer_name, bound.dtype)
            yield bound.names.to_disk(name), TensorInfo(dtype, shape, _NO_FILE)
    yield from _cache_headers(plan, bound)


def _cache_headers(plan: Plan, bound: BoundModel) -> Iterator[tuple[str, TensorInfo]]:
    if plan.kv_cache is None:
        return
    for layer in plan.kv_cache.layers:
        shape = plan.kv_cache.spec.scale_shape(layer.kv_heads)
        for name in layer.tensors:
            yield bound.names.to_disk(name), TensorInfo(layer.key.dtype, shape, _NO_FILE)


def _concerned(finding: Finding, plan: Plan, checkpoint: Checkpoint) -> list[str]:
    """Layers that a finding is about."""
    if finding.rule.startswith("kv."):
        return [KV_CACHE]
    named = _by_every_name(checkpoint)
    found = [name for place in finding.where for name in _named(place, named, checkpoint)]
    if found:
        return list(dict.fromkeys(found))
    cache = [KV_CACHE] if plan.kv_cache is not None else []
    return [*(row.site.name for row in plan.quantized), *cache]


def _by_every_name(checkpoint: Checkpoint) -> Mapping[str, str]:
    return {
        said: layer.name
        for layer in checkpoint.layers
        for said in (layer.name, layer.called, layer.disk)
    }


def _named(place: str, named: Mapping[str, str], checkpoint: Checkpoint) -> list[str]:
    """Layers that a place means: a layer, a tensor of one, or a group of the configuration."""
    for said in (place, place.partition(" ")[0], place.rpartition(".")[0]):
        if said in named:
            return [named[said]]
    words = place.split(".")
    return [
        named[target]
        for group in checkpoint.groups
        if group.name in words
        for target in group.targets
        if target in named
    ]
