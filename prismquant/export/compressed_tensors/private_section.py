"""Our own section of ``config.json``: formats of inputs that the configuration has no words for.

Some formats of inputs cannot be declared (E5M2, inputs of layers that are stored dequantized), and
some lose a detail (how an E8M0 scale is rounded, that integers are narrow). They stand at the top,
and other readers pass over them:

    "prismquant": {"activations": {"model.layers.0.mlp.up_proj": {"input": {...}}}}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from prismquant.errors import FormatError, shortened
from prismquant.formats.section import PRIVATE_KEY
from prismquant.formats.spec import NumberSpec

INPUT, OUTPUT = "input", "output"
_MOST_SHOWN = 5


def read_private(
    config: Mapping[str, Any], layers: Collection[str]
) -> dict[str, tuple[NumberSpec | None, NumberSpec | None]]:
    """Formats of inputs and outputs that only our section declares, by the layer's name.

    Args:
        config: The content of ``config.json``.
        layers: What the configuration calls the model's layers.

    Raises:
        FormatError: Lists the entries that are no number format or are about no layer.
    """
    faults: list[str] = []
    found: dict[str, tuple[NumberSpec | None, NumberSpec | None]] = {}
    section = _object(config.get(PRIVATE_KEY), PRIVATE_KEY, ("activations",), faults)
    entries = _object(section.get("activations"), "activations", None, faults)
    for name, raw in entries.items():
        entry = _object(raw, name, (INPUT, OUTPUT), faults)
        if name not in layers:
            faults.append(f"there is no layer {shortened(name)}")
        try:
            found[name] = (_format(entry.get(INPUT)), _format(entry.get(OUTPUT)))
        except FormatError as error:
            faults.append(f"{name}: {error.what}")
    if faults:
        shown = faults[:_MOST_SHOWN] + [f"and {len(faults) - _MOST_SHOWN} more"] * (
            len(faults) > _MOST_SHOWN
        )
        raise FormatError(
            f"our own section of config.json cannot be read: {'; '.join(shown)}",
            where=PRIVATE_KEY,
            remedy="restore the file from the finished run, or delete the section: inputs and "
            "outputs that it is about are then in floating point",
        )
    return found


def _object(
    raw: Any, name: str, known: tuple[str, ...] | None, faults: list[str]
) -> Mapping[str, Any]:
    """An object with these keys; an empty one where it is none, or null."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        faults.append(f"{name} is no object")
        return {}
    if known is not None and (unknown := sorted(set(raw) - set(known))):
        faults.append(f"{name} has the unknown key {shortened(unknown[0])}")
    return raw


def _format(raw: Any) -> NumberSpec | None:
    if raw is not None and not isinstance(raw, Mapping):
        raise FormatError(f"{shortened(str(raw))} is no number format")
    return None if raw is None else NumberSpec.from_dict(raw)
