"""Checks of the mappings that stand for a number format or a range rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prismquant.algorithms.methods import checked_options, refuse_idle
from prismquant.errors import PrismQuantError, suggest
from prismquant.formats.spec import NumberSpec
from prismquant.numerics.rules import RangeRule

Fields = dict[str, Any]


def range_fields(value: Any) -> Fields:
    """The fields of a range rule that is given by its kind or by fields."""
    named = {"kind": value} if isinstance(value, str) else value
    fields = known_fields(named, RangeRule, "range rule")
    try:
        rule = RangeRule(**checked_options(RangeRule, fields, "range rule"))
        # Without a kind the fields are of whichever an earlier rule has given.
        refuse_idle(rule, fields if "kind" in fields else {}, "range")
    except PrismQuantError as error:
        raise as_finding(error) from error
    return fields


def known_fields(value: Any, kind: type, what: str) -> Fields:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a name or a mapping, found {value!r}")
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    for key in value:
        if key not in known:
            raise ValueError(f"unknown key {key!r} of a {what}; {suggest(str(key), known)}")
    return dict(value)


def check_format_fields(fields: Fields) -> None:
    """Refuse what no other rule could make possible; fields left out are filled with what fits."""
    size, granularity = fields.get("group_size"), fields.get("granularity")
    if granularity is None:
        dynamic = fields.get("dynamic", False)
        granularity = "group" if size is not None else "token" if dynamic else "tensor"
    filled: Fields = {"dynamic": granularity == "token", **fields}
    if fields.get("kind", "int") == "int":
        filled = {"bits": 8, **filled}
    if granularity == "group" and size is None:
        filled["group_size"] = 128
    NumberSpec.from_dict(filled | {"granularity": granularity})


def as_finding(error: PrismQuantError) -> ValueError:
    """An error as a finding: pydantic adds the path."""
    return ValueError("; ".join(filter(None, [error.what, error.remedy])))
