"""Number formats as attributes of ModelOpt's quantizers.

The inverse of :mod:`prismquant.recipe.importers.quantizer_attributes`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prismquant.formats.spec import NumberSpec
from prismquant.numerics.kinds import Granularity
from prismquant.recipe.exporters.export_ledger import WorkNotes

Fields = dict[str, Any]

KEYS = {
    "weights": "weight_quantizer",
    "activations": "input_quantizer",
    "outputs": "output_quantizer",
}
_BITS: dict[str, Any] = {
    "e4m3": (4, 3),
    "e5m2": (5, 2),
    "e3m2": (3, 2),
    "e2m3": (2, 3),
    "e2m1": (2, 1),
}
# All others are known in blocks with scales of 8 bits alone.
_PLAIN = ("int", "e4m3")


def quantizer_attributes(
    notes: WorkNotes, side: str, spec: NumberSpec, static: bool = False
) -> Fields | None:
    """Attributes of a quantizer; None where it has no such numbers.

    Args:
        notes: On the layer.
        side: ``weights``, ``activations`` or ``outputs``.
        spec: The format.
        static: Whether E4M3 scales are chosen before the run, not by absmax while it runs.
    """
    if spec.scale == "float" and spec.kind not in _PLAIN:
        why = f"{spec.kind} is known in groups with scales of 8 bits alone there"
        nearest = "nvfp4" if spec.kind == "e2m1" else f"mx{spec.name.partition('-')[0]}"
        notes.dropped(side, spec.name, why, nearest)
        return None
    given, why = _nearest(spec)
    if given.dynamic and given.scale == "float" and given.granularity == Granularity.GROUP:
        given = replace(given, granularity=Granularity.TOKEN, group_size=None)
        why = "; ".join(filter(None, (why, "blocks of inputs have scales of 8 bits there")))
    fields: Fields = {"num_bits": given.bits if given.kind == "int" else _BITS[given.kind]}
    dynamic = given.dynamic or given.scale.startswith("e8m0")
    dynamic |= given.scale == "e4m3" and not static
    if given.granularity == Granularity.CHANNEL:
        fields["axis"] = 0
    elif given.granularity == Granularity.TENSOR:
        fields["axis"] = None
    elif given.granularity == Granularity.TOKEN:
        fields |= {"type": "dynamic", "block_sizes": {-1: None}}
    else:
        blocks: dict[int | str, Any] = {-1: given.group_size}
        if given.granularity == Granularity.BLOCK:
            blocks[-2] = given.group_size
        blocks["type"] = "dynamic" if dynamic else "static"
        if given.scale != "float":
            blocks["scale_bits"] = (4, 3) if given.scale == "e4m3" else (8, 0)
        fields["block_sizes"] = blocks
    notes.either(side, spec.name, f"{KEYS[side]}: {fields}", why)
    return fields


def _nearest(spec: NumberSpec) -> tuple[NumberSpec, str]:
    """The nearest format that can be said, and how it differs."""
    if spec.scale.startswith("e8m0"):
        near = replace(spec, scale="e8m0-ceil")
        return near, "" if near == spec else "scales are rounded up there"
    if spec.kind == "int" and not spec.symmetric:
        near = replace(spec, symmetric=True, narrow=True)
        return near, "there are no zero points there, of weights and inputs"
    if spec.kind == "int" and not spec.narrow:
        near = replace(spec, narrow=True)
        return near, "the scale is absmax / (2^(b-1) - 1) there, not absmax over half the codes"
    return spec, ""
