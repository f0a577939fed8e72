"""Other tools' words for what a rule can say, turned into its own fields.

``w_has_zero`` and ``a_has_zero`` (MI-optimize) are the symmetry of the formats. ``w_unsign`` and
``a_unsign`` have no counterpart: codes with a zero point are the same numbers either way, and codes
without one are signed. ``quantization_type`` says whether activations are static. A floating-point
dtype as a format means that the weight, or the input, is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prismquant.errors import PrismQuantError
from prismquant.formats.spec import spec

Fields = dict[str, Any]

_FLOATS = ("float16", "bfloat16", "float32")
_FIELDS = {"w": "weights", "a": "activations"}
_WHAT = ("has_zero", "unsign")
_TYPES: Mapping[str, Fields] = {
    "static": {"granularity": "tensor", "dynamic": False},
    "dynamic": {"granularity": "token", "dynamic": True},
}
_NAMES = ("quantization_type", *(f"{side}_{what}" for side in _FIELDS for what in _WHAT))


def translated(content: Mapping[str, Any]) -> Fields:
    """A rule's content with only the rule's own fields.

    Raises:
        ValueError: A value means nothing.
    """
    rule = {key: value for key, value in content.items() if key not in _NAMES}
    if isinstance(rule.get("weights"), str) and rule["weights"] in _FLOATS:
        del rule["weights"]
        rule["skip"] = True
    if isinstance(rule.get("activations"), str) and rule["activations"] in _FLOATS:
        rule["activations"] = "none"
    for side, field in _FIELDS.items():
        changes = _symmetry(content, side)
        if side == "a" and "quantization_type" in content:
            changes |= _type(content["quantization_type"])
        if changes:
            rule[field] = _named_fields(rule.get(field) or {}) | changes
    return rule


def _symmetry(content: Mapping[str, Any], side: str) -> Fields:
    for what in _WHAT:
        value = content.get(f"{side}_{what}")
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{side}_{what} is true or false, not {value!r}")
    zero = content.get(f"{side}_has_zero")
    if content.get(f"{side}_unsign") and not zero:
        raise ValueError(
            f"{side}_unsign without {side}_has_zero would hold positive numbers only; "
            f"set {side}_has_zero: true"
        )
    return {} if zero is None else {"symmetric": not zero}


def _type(name: Any) -> Fields:
    if not isinstance(name, str) or name not in _TYPES:
        raise ValueError(f"quantization_type is one of {', '.join(_TYPES)}, not {name!r}")
    return dict(_TYPES[name])


def _named_fields(said: Any) -> Fields:
    try:
        return spec(said).to_dict() if isinstance(said, str) else dict(said)
    except (PrismQuantError, TypeError) as error:
        raise ValueError(str(error)) from error
