"""Number formats, and how ranges are observed, in the words of compressed-tensors.

The inverse of :mod:`prismquant.recipe.importers.scheme_arguments`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from prismquant.formats.spec import NumberSpec
from prismquant.numerics.kinds import Granularity, ScaleKind
from prismquant.numerics.rules import RangeRule
from prismquant.recipe.exporters.export_ledger import WorkNotes

Fields = dict[str, Any]

_KEYS = {
    "weights": "weights",
    "activations": "input_activations",
    "outputs": "output_activations",
}
_UNKNOWN = ("e5m2", "e3m2")


def arguments_of(notes: WorkNotes, side: str, spec: NumberSpec) -> Fields | None:
    """Arguments of a number format; None where its numbers are not known there.

    Args:
        notes: On the layer.
        side: ``weights``, ``activations`` or ``outputs``.
        spec: The format.
    """
    key = _KEYS[side]
    if spec.kind in _UNKNOWN:
        nearest = {"e5m2": "fp8 of E4M3", "e3m2": "mxfp6 of E2M3"}[spec.kind]
        notes.dropped(side, spec.name, "float is E4M3, E2M3 or E2M1 there", nearest)
        return None
    if spec.kind == "e2m3":
        notes.guessed("compressed-tensors 0.19 refuses numbers of 6 bits: a later one is needed")
    given, why = _nearest(spec, side)
    fields: Fields = {
        "num_bits": given.bits,
        "type": "int" if given.kind == "int" else "float",
        "symmetric": given.symmetric,
    }
    if given.scale == "e4m3":
        fields |= {"strategy": "tensor_group", "group_size": given.group_size}
        dynamic: bool | str = "local" if given.dynamic else False
    else:
        fields["strategy"] = given.granularity.value
        dynamic = given.dynamic
    if given.granularity == Granularity.BLOCK:
        fields["block_structure"] = list(given.block_structure or ())
    elif given.granularity == Granularity.GROUP:
        fields["group_size"] = given.group_size
    fields["dynamic"] = dynamic
    if given.scale.startswith("e8m0"):
        fields["scale_dtype"] = "torch.uint8"
    notes.either(side, spec.name, f"{key}: {_words(fields)}", why)
    return fields


def _nearest(spec: NumberSpec, side: str) -> tuple[NumberSpec, str]:
    """The nearest format that can be said, and how it differs."""
    if spec.kind == "int" and spec.scale != "float":
        near = replace(spec, scale="float", narrow=False)
        return near, "integers have no scales of 8 bits there"
    if spec.scale.startswith("e8m0"):
        ceil = side != "weights" and spec.kind == "e4m3"
        theirs: ScaleKind = "e8m0-ceil" if ceil else "e8m0"
        near = replace(spec, scale=theirs)
        how = "up" if ceil else "to nearest"
        return near, "" if near == spec else f"scales are rounded {how} there"
    if spec.narrow:
        near = replace(spec, narrow=False)
        return near, "the full grid is used there, with a scale of absmax over half its codes"
    return spec, ""


def observer_of(notes: WorkNotes, side: str, rule: RangeRule, weighting: str = "none") -> Fields:
    """Arguments that choose the ranges of a side.

    Args:
        notes: On the layer.
        side: ``weights``; or ``activations``, of inputs and outputs whose scales are static.
        rule: The range rule.
        weighting: Importance of columns in the search of a weight's range.
    """
    name = "weight_range" if side == "weights" else "activation_range"
    search = {key: getattr(rule, key) for key in ("max_shrink", "steps", "norm")}
    if rule.kind == "minmax":
        observer = "memoryless_minmax" if side == "weights" else "static_minmax"
        notes.written(name, "minmax", f"observer: {observer}")
        return {"observer": observer}
    if rule.kind == "ema":
        notes.written(name, "ema", "observer: minmax")
        return {"observer": "minmax", "observer_kwargs": {"averaging_constant": rule.momentum}}
    if rule.kind == "sweep" and side == "weights" and not rule.signed_scale:
        notes.written(name, "sweep", "observer: nvfp4_expanded_mse")
        return {"observer": "nvfp4_expanded_mse"}
    observer = "memoryless_mse" if side == "weights" else "mse"
    if weighting != "none" and side == "weights":
        observer = "imatrix_mse"
    why = ""
    if rule.kind != "mse":
        why = f"there is no {rule.kind}; errors are searched"
    elif side == "weights" and rule.signed_scale:
        why = "scales have no sign there"
    kwargs, cut = _search_arguments(rule if rule.kind == "mse" else RangeRule("mse"))
    value = {"kind": rule.kind} | (search if rule.kind == "mse" else {})
    notes.either(name, value, f"observer: {observer} {_words(kwargs)}", why or cut)
    return {"observer": observer, "observer_kwargs": kwargs}


_MOST_SHRINK, _FINEST = 0.99, 10_000


def _search_arguments(rule: RangeRule) -> tuple[Fields, str]:
    """Arguments that come to the rule's number of steps, and how they differ from it."""
    shrink = min(rule.max_shrink, _MOST_SHRINK)
    grid: float = math.ceil(rule.steps / shrink) if shrink else _FINEST
    if int(shrink * grid) != rule.steps and shrink:
        grid = (rule.steps + 0.5) / shrink
    why = "" if shrink == rule.max_shrink else f"ranges shrink by {_MOST_SHRINK} at most there"
    if grid > _FINEST or not shrink:
        grid, why = _FINEST, why or "its steps are fewer there"
    return {"maxshrink": shrink, "grid": grid, "norm": rule.norm}, why


def _words(fields: Fields) -> str:
    return "{" + ", ".join(f"{key}: {_shown(value)}" for key, value in fields.items()) + "}"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
