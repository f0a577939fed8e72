"""Differences of two runs, in words."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prismquant.errors import PrismQuantError
from prismquant.formats.spec import NumberSpec
from prismquant.run.identity import FileStamp, Identity

# What describes the model, where no file of the package does.
ARCHITECTURE = "architecture file"
_SHOWN = 5
_LONGEST = 60
# What follows from other fields of a plan, or is only said for people.
_DERIVED = {"stored_bytes", "float_bytes", "other_bytes", "total_bytes", "totals"}
_SPOKEN = {"recipe", "remarks", "note"}
# Told as a whole, in the words of tables.
_FORMATS = {"weights", "activations", "outputs"}


def differences(
    earlier: Identity, now: Identity, earlier_plan: Any, plan: Mapping[str, Any]
) -> list[str]:
    """In what two runs differ, one line each; empty if they would end with the same bytes.

    Args:
        earlier: The run that is to be resumed.
        now: What is asked for now.
        earlier_plan: The content of the earlier run's plan.json; None if it cannot be read.
        plan: The plan now, as JSON types.
    """
    found = []
    if earlier.plan != now.plan:
        found += _shortened("recipe", plan_differences(earlier_plan, plan))
    found += _shortened("model", _file_differences(earlier.files, now.files))
    found += _sample_differences(earlier, now, explained=bool(found))
    if earlier.arithmetic != now.arithmetic:
        found.append(f"arithmetic: {earlier.arithmetic} -> {now.arithmetic}")
    return found + _version_differences(earlier.versions, now.versions)


def plan_differences(earlier: Any, now: Mapping[str, Any]) -> list[str]:
    """In what two plans differ, layers with the same change together.

    Args:
        earlier: The content of an earlier plan.json; anything else if it cannot be read.
        now: The plan as JSON types.
    """
    if not isinstance(earlier, Mapping):
        return ["it gives another plan; plan.json of the earlier run cannot be read"]
    before, after = _flat(earlier), _flat(now)
    alike: dict[str, list[str]] = {}
    for part in dict.fromkeys([*after, *before]):
        old, new = before.get(part), after.get(part)
        if old is None or new is None:
            change = "not there before" if old is None else "no longer there"
        else:
            keys = [key for key in dict.fromkeys([*new, *old]) if old.get(key) != new.get(key)]
            change = ", ".join(f"{k} {_brief(old.get(k))} -> {_brief(new.get(k))}" for k in keys)
        if change:
            alike.setdefault(change, []).append(part)
    return [f"{_and_others(parts)}: {change}" for change, parts in alike.items()] or [
        "it gives another plan, in ways that its rows do not show"
    ]


def _flat(plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A plan as parts (a layer, an edge, a setting) with the plain values of each."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in plan.items():
        if key in _DERIVED | _SPOKEN or value is None:
            continue
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            for item in value:
                title = _title(item) if key == "rows" else f"{key} {_title(item)}"
                parts[title] = _leaves(item)
        else:
            parts[key] = _leaves(value)
    return parts


def _title(part: Mapping[str, Any]) -> str:
    """Name of a layer, of an edge, or of a rotation."""
    for key in ("site", "edge"):
        if isinstance(part.get(key), Mapping):
            part = part[key]
    names = (part.get(key) for key in ("name", "norm", "producer", "modality"))
    return str(next((name for name in names if name), None))


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        if key not in _DERIVED | _SPOKEN:
            # The settings of a layer are told as a recipe has them.
            inside = f"{path}.{key}" if path else str(key)
            if inside in _FORMATS:
                leaves[key] = _format(inner)
            else:
                leaves |= _leaves(inner, "" if inside == "config" else inside)
    return leaves


def _format(fields: Any) -> Any:
    """A number format in a few words; None where there is none."""
    try:
        return None if fields is None else NumberSpec.from_dict(fields).describe()
    except (PrismQuantError, TypeError, AttributeError):
        return fields


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if value is None:
        text = "none"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]}.."


def _and_others(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {len(names) - 1} other{'s' if len(names) > 2 else ''}"


def _shortened(title: str, lines: Sequence[str]) -> list[str]:
    more = [f"{title}: and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [f"{title}: {line}" for line in lines[:_SHOWN]] + more


def _file_differences(earlier: Mapping[str, FileStamp], now: Mapping[str, FileStamp]) -> list[str]:
    lines = []
    for name in sorted({*earlier, *now}):
        old, new = earlier.get(name), now.get(name)
        kind = "shard " if name.endswith(".safetensors") else ""
        if old is None or new is None:
            lines.append(f"{kind}{name} {'is new' if old is None else 'is gone'}")
        elif old.digest != new.digest:
            sizes = f" ({old.size} -> {new.size} bytes)" if old.size != new.size else ""
            lines.append(f"{kind}{name} has changed{sizes}")
        elif old.inode == new.inode and old.modified != new.modified:
            # Its digest may have missed what was written: it looks at large files in places.
            lines.append(
                f"{kind}{name} was written to at {_moment(new.modified)}, after the run began"
            )
    return lines


def _moment(nanoseconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(nanoseconds / 1e9))


def _sample_differences(earlier: Identity, now: Identity, *, explained: bool) -> list[str]:
    if earlier.samples == now.samples:
        if earlier.inputs == now.inputs or explained:
            return []
        return [
            "calibration: the same samples become other tokens or pixels: --max-pixels, "
            "--max-frames or --max-length differ, or a library that the processor uses has changed"
        ]
    before, after = len(earlier.samples), len(now.samples)
    kept = (Counter(earlier.samples) & Counter(now.samples)).total()
    if before != after:
        return [f"calibration: {after} samples instead of {before}, {after - kept} of them new"]
    if kept == after:
        return [f"calibration: the same {after} samples in another order"]
    return [f"calibration: {after - kept} of {after} samples differ"]


def _version_differences(earlier: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    lines = [
        f"{'' if name == ARCHITECTURE else 'code version: '}{name} "
        f"{earlier.get(name, 'unknown')} -> {now.get(name, 'unknown')}"
        for name in dict.fromkeys([*earlier, *now])
        if name != "sources" and earlier.get(name) != now.get(name)
    ]
    if not lines and earlier.get("sources") != now.get("sources"):
        return ["code version: the sources of prismquant were edited"]
    return lines
