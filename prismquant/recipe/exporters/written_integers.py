"""Number formats in the words of MI-optimize: dtypes, ``qtype``, group sizes, zero points.

The inverse of :mod:`prismquant.recipe.importers.integer_formats`.
"""

from __future__ import annotations

from typing import Any

from prismquant.formats.spec import NumberSpec
from prismquant.numerics.kinds import Granularity
from prismquant.recipe.exporters.export_ledger import WorkNotes

Fields = dict[str, Any]

_NARROW = "codes are -(2^(b-1) - 1) to 2^(b-1) - 1 there, with scales of absmax over the latter"
_ABSENT = "documented there, and not reachable in the released code"


def weight_arguments(notes: WorkNotes, spec: NumberSpec, algo: str) -> Fields | None:
    """Arguments of the weights' format; None where its numbers are not known there."""
    if not _known(notes, "weights", spec):
        return None
    unit, size = spec.granularity, spec.group_size
    whys = []
    if unit == Granularity.BLOCK:
        unit = Granularity.GROUP
        whys.append("groups of columns there, not blocks")
    solved = algo.endswith("gptq")
    if solved and unit == Granularity.TENSOR:
        unit = Granularity.CHANNEL
        whys.append("GPTQ has a scale a row or group there")
    fields: Fields = {"w_dtype": f"int{spec.bits}" if spec.kind == "int" else _FLOATS[spec.kind]}
    fields["w_qtype"] = f"per_{unit.value}"
    fields["w_groupsize"] = size if unit == Granularity.GROUP else -1
    if spec.kind == "int":
        fields["w_has_zero"] = not spec.symmetric
        whys += _zero_whys(spec, algo)
    else:
        whys.append(_ABSENT)
    notes.either("weights", spec.name, _words(fields), "; ".join(whys))
    return fields


def _zero_whys(spec: NumberSpec, algo: str) -> list[str]:
    whys = [_NARROW] if spec.symmetric and not spec.narrow else []
    if algo.endswith("gptq") and spec.symmetric:
        whys = ["GPTQ has zero points always there"]
    elif algo == "smoothquant" and not spec.symmetric:
        whys.append("smoothquant has no zero points there")
    return whys


def input_arguments(notes: WorkNotes, spec: NumberSpec | None, algo: str) -> Fields:
    """Arguments of the inputs' format."""
    floating: Fields = {"a_dtype": "float16"}
    if spec is None:
        if notes.said("activations"):
            notes.written("activations", "none", "a_dtype: float16")
        return floating
    if not _known(notes, "activations", spec):
        return floating
    if algo == "awq" or (algo.endswith("gptq") and not algo.startswith("smoothquant")):
        nearest = "rtn, smoothquant, smoothquant+gptq"
        notes.dropped("activations", spec.name, f"{algo} is for weights alone there", nearest)
        return floating
    fields: Fields = {"a_dtype": f"int{spec.bits}" if spec.kind == "int" else _FLOATS[spec.kind]}
    fields["a_qtype"] = f"per_{spec.granularity.value}"
    if spec.granularity == Granularity.GROUP:
        fields["a_groupsize"] = spec.group_size
    fields["quantization_type"] = "dynamic" if spec.dynamic else "static"
    whys = []
    if spec.kind == "int":
        fields["a_has_zero"] = not spec.symmetric
        if spec.symmetric and not spec.narrow:
            whys.append(_NARROW)
        if not spec.symmetric and algo == "smoothquant":
            whys.append("smoothquant has no zero points there")
    else:
        whys.append(_ABSENT)
    notes.either("activations", spec.name, _words(fields), "; ".join(whys))
    return fields


_FLOATS = {"e4m3": "fp8", "e2m1": "fp4"}


def _known(notes: WorkNotes, side: str, spec: NumberSpec) -> bool:
    if spec.scale == "float" and (spec.kind == "int" or spec.kind in _FLOATS):
        return True
    nearest = f"int{spec.bits}" if spec.bits > 4 else "int4, w_groupsize: 16 or 32"
    notes.dropped(side, spec.name, "numbers there are integers, with scales of 16 bits", nearest)
    return False


def _words(fields: Fields) -> str:
    return ", ".join(f"{key}: {value}" for key, value in fields.items())
