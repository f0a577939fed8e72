"""Recipes of ours as configurations of ModelOpt: an ordered list of quantizers, and algorithms.

The text is one Python assignment, ``QUANT_CFG = {..}``. All quantizers are turned off first, so
that nothing is quantized that the recipe leaves alone; then come the formats, single blocks last,
because the last entry that means a quantizer counts.
"""

from __future__ import annotations

import pprint
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prismquant.errors import RecipeError
from prismquant.recipe.exporters.export_ledger import note_fallback
from prismquant.recipe.exporters.export_task import ExportTask, note_alike, note_calibration
from prismquant.recipe.exporters.layer_work import LayerWork
from prismquant.recipe.exporters.written_algorithms import algorithms_of
from prismquant.recipe.exporters.written_globs import LayerGlobs, layer_globs_of
from prismquant.recipe.exporters.written_quantizers import KEYS, quantizer_attributes

Fields = dict[str, Any]

_WIDTH = 100


@dataclass(frozen=True)
class _Quantizers:
    """Attributes of a layer's quantizers, as text that can be compared; empty: off."""

    weights: str
    activations: str = ""
    outputs: str = ""


def write(task: ExportTask) -> str:
    """A recipe as a Python assignment of a configuration that ModelOpt takes.

    Raises:
        RecipeError: Nothing of it can be said there.
    """
    algorithm, searched = algorithms_of(task)
    attributes: dict[str, Fields] = {}
    written = {
        work: _written(task, work, searched, attributes)
        for work in dict.fromkeys(work for work in task.work.values() if work.quantized)
    }
    settings = {layer: written.get(work) for layer, work in task.work.items()}
    entries = _entries(layer_globs_of(settings), attributes)
    cache = _cache_entry(task)
    if not entries and cache is None:
        raise RecipeError(
            "nothing of the recipe can be said in the words of modelopt",
            where=task.recipe.name,
            remedy="formats there are integers, E4M3, and groups with scales of 8 bits: NVFP4, MX",
        )
    note_alike(task)
    _note_calibration(task, algorithm)
    base = [{"quantizer_name": "*", "enable": False}]
    listed = [*base, *entries, *([cache] if cache else [])]
    body = {"quant_cfg": listed, "algorithm": algorithm if entries else "max"}
    return f"QUANT_CFG = {pprint.pformat(body, width=_WIDTH, sort_dicts=False)}\n"


def _entries(
    groups: Sequence[LayerGlobs[_Quantizers | None]], attributes: Mapping[str, Fields]
) -> list[Fields]:
    """Entries of all groups: those of all blocks, then those of single ones."""
    wide = [group.setting for group in groups if group.setting and group.all_blocks]
    # All is off already; single blocks must turn off what all blocks have.
    off = {side for side in KEYS if any(getattr(one, side) for one in wide)}
    entries: list[Fields] = []
    for group in groups:
        if group.setting is not None:
            entries += _listed(group.all_blocks, group.setting, attributes, set())
    for group in groups:
        own = group.setting or _Quantizers("")
        entries += _listed(group.single_blocks, own, attributes, off)
    return entries


def _listed(
    globs: Iterable[str], setting: _Quantizers, attributes: Mapping[str, Fields], off: set[str]
) -> list[Fields]:
    """Entries of one group, and of those quantizers that it must turn off."""
    entries: list[Fields] = []
    for glob in globs:
        for side, kind in KEYS.items():
            text = getattr(setting, side)
            name = f"{glob}{kind}" if glob.endswith("*") else f"{glob}.{kind}"
            if text:
                entries.append({"quantizer_name": name, "cfg": attributes[text]})
            elif side in off:
                entries.append({"quantizer_name": name, "enable": False})
    return entries


def _written(
    task: ExportTask, work: LayerWork, searched: bool, attributes: dict[str, Fields]
) -> _Quantizers | None:
    """A layer's quantizers; None where its weights cannot be said."""
    notes, config = task.notes(work), work.config
    assert config.weights is not None
    six = config.weight_range.kind == "four_over_six"
    found: dict[str, str] = {}
    for side in KEYS:
        spec = getattr(config, side)
        if spec is None:
            if notes.said(side):
                notes.written(side, "none", f"{KEYS[side]}: off")
            continue
        fields = quantizer_attributes(notes, side, spec, static=searched and side == "weights")
        if fields is None and side == "weights":
            return None
        if fields is None:
            continue
        if six and side == "weights":
            fields["block_sizes"]["four_over_six"] = True
        if side != "weights" and spec.calibrated:
            _note_range(task, work)
        found[side] = repr(fields)
        attributes[found[side]] = fields
    note_fallback(notes, "a group that does not fit is an error there, or padded")
    return _Quantizers(**found)


def _note_range(task: ExportTask, work: LayerWork) -> None:
    """Note how a static range is found."""
    rule = work.config.activation_range
    # A histogram needs a method for its clip, which no configuration says.
    why = "" if rule.kind == "minmax" else "the range holds every value there"
    task.notes(work).either("activation_range", rule.kind, "calibrator: max", why)


def _cache_entry(task: ExportTask) -> Fields | None:
    if task.recipe.kv_cache is None:
        return None
    spec, rule = task.recipe.kv_cache_settings
    bits: Any = (4, 3) if spec.format == "fp8" else spec.number.bits
    told = f"*[kv]_bmm_quantizer: num_bits {bits}"
    why = "one scale for all heads there" if spec.per_head else ""
    if why:
        task.ledger.changed("kv_cache", spec.name, told, why)
    else:
        task.ledger.written("kv_cache", spec.name, told)
    if spec.rotated:
        task.ledger.dropped("kv_cache.rotated", True, "keys are not rotated there")
    if rule.kind != "minmax":
        task.ledger.changed("kv_cache.range", rule.kind, told, "the range holds every value there")
    cfg = {"num_bits": bits, "axis": None}
    return {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": cfg}


def _note_calibration(task: ExportTask, algorithm: Any) -> None:
    theirs = {"layer_sequential": False, "block_sequential": False, "quantized_inputs": False}
    calibration = task.recipe.calibration
    told = {
        "samples": f"forward_loop over {calibration.samples} samples",
        "batch_size": "forward_loop",
        "seed": "forward_loop",
    }
    note_calibration(task, theirs, told)
