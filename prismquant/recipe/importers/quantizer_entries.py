"""Entries of ModelOpt's ``quant_cfg``, of whichever of its forms: a list, or a dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prismquant.recipe.importers.ledger import Ledger, joined, quoted
from prismquant.recipe.importers.modelopt_imports import ImportedEntries
from prismquant.recipe.importers.source_section import Setting, SourceSection, Table

ENTRY: Table = (
    Setting("quantizer_name", "", "match.name", "a glob of quantizers becomes one of layers"),
    Setting("parent_class", "null", "match", "nn.Linear, nn.Conv2d, nn.Conv3d; others dropped"),
    Setting("cfg", "null", "weights, activations, outputs"),
    Setting("enable", "true", "skip, activations: none, outputs: none"),
)
# Keys of an entry of the newer form, none of which is a glob.
_BESIDE_A_NAME = {"cfg", "enable", "parent_class"}


@dataclass(frozen=True)
class QuantizerEntry:
    """One entry of ``quant_cfg``.

    Attributes:
        place: Within the source.
        pattern: Glob of quantizers.
        parent: Class of their layers; empty: any.
        cfg: Attributes; None: as they are.
        enable: Whether they are on.
    """

    place: str
    pattern: str
    parent: str
    cfg: Any
    enable: bool


def entries_of(ledger: Ledger, place: str, value: Any) -> list[QuantizerEntry]:
    """Entries in their order, of whichever of the forms they were given in."""
    if isinstance(value, Mapping):
        pairs = [(joined(place, str(key)), key, one) for key, one in value.items()]
        default = [pair for pair in pairs if pair[1] == "default"]
        if default and pairs[0][1] != "default":
            ledger.changed(default[0][0], default[0][2], "the first rule", "before all others")
        pairs = [*default, *(pair for pair in pairs if pair[1] != "default")]
        return [one for pair in pairs for one in _pair(ledger, *pair)]
    if not isinstance(value, Sequence) or isinstance(value, str):
        ledger.wrong(place, f"a list or a mapping of entries, not {quoted(value)}")
        return []
    found: list[QuantizerEntry] = []
    for number, one in enumerate(value):
        where = f"{place}[{number}]"
        if isinstance(one, ImportedEntries):
            found += entries_of(ledger, where, list(one))
        elif isinstance(one, Mapping) and "quantizer_name" in one:
            found += _listed(ledger, where, one)
        elif isinstance(one, Mapping) and {*one} & _BESIDE_A_NAME:
            known = [setting.name for setting in ENTRY]
            ledger.refuse_unknown(where, ledger.mapping(where, one), known)
            ledger.wrong(where, "it needs quantizer_name")
        elif isinstance(one, Mapping) and one:
            for key, inner in one.items():
                found += _pair(ledger, joined(where, str(key)), key, inner)
        else:
            ledger.wrong(where, f"it needs quantizer_name, with cfg or enable, not {quoted(one)}")
    return found


def _listed(ledger: Ledger, place: str, content: Mapping[str, Any]) -> list[QuantizerEntry]:
    own = SourceSection(ledger, place, content, ENTRY)
    pattern, parent = own.content.get("quantizer_name"), own.content.get("parent_class")
    if not isinstance(pattern, str) or not isinstance(parent, str | None):
        ledger.wrong(place, "quantizer_name and parent_class are words")
        return []
    if own.content.get("cfg") is None and own.content.get("enable") is None:
        ledger.wrong(place, "it needs cfg or enable")
    enable = own.flag("enable", True)
    return [QuantizerEntry(place, pattern, parent or "", own.content.get("cfg"), enable)]


def _pair(ledger: Ledger, place: str, key: Any, value: Any) -> list[QuantizerEntry]:
    """Entries of one key and value of the older form."""
    if not isinstance(key, str):
        ledger.wrong(place, f"a key is a word, not {quoted(key)}")
        return []
    if key.startswith("nn."):
        inner = ledger.mapping(place, value)
        return [_made(ledger, joined(place, name), name, key, one) for name, one in inner.items()]
    return [_made(ledger, place, "*" if key == "default" else key, "", value)]


def _made(ledger: Ledger, place: str, pattern: str, parent: str, value: Any) -> QuantizerEntry:
    if isinstance(value, Mapping):
        enable = value.get("enable", True)
        if not isinstance(enable, bool):
            ledger.wrong(joined(place, "enable"), f"true or false, not {quoted(enable)}")
        cfg = {name: one for name, one in value.items() if name != "enable"} or None
        if cfg is None and "enable" not in value:
            ledger.wrong(place, "it says nothing")
        return QuantizerEntry(place, pattern, parent, cfg, enable is not False)
    return QuantizerEntry(place, pattern, parent, value, True)


def is_base(entry: QuantizerEntry) -> bool:
    """Whether an entry turns all quantizers off."""
    return entry.pattern == "*" and not entry.parent and not entry.enable
