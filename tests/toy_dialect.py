"""A made-up dialect of recipes, of three words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prismquant.recipe.importers import known_dialects
from prismquant.recipe.importers.known_dialects import Dialect
from prismquant.recipe.importers.ledger import Ledger, shown

if TYPE_CHECKING:
    import pytest

    from prismquant.recipe.importers.imported import Imported

TOY = {"toy_bits": 8, "toy_speed": "fast", "toy_order": True}


def read_toy(content: Any, source: str) -> Imported:
    """A dialect of three words, or of a number of bits behind a hyphen."""
    ledger = Ledger("toy", source)
    said = {"toy_bits": int(content[1:])} if isinstance(content, str) else content
    said = ledger.mapping("", said)
    ledger.refuse_unknown("", said, ("toy_bits", "toy_speed", "toy_order"))
    bits = said.get("toy_bits", 4)
    if bits not in (4, 8):
        ledger.wrong("toy_bits", f"4 or 8, not {shown(bits)}")
    if "toy_bits" in said:
        ledger.honoured("toy_bits", bits, f"rules[0].weights: int{bits}-channel")
    if "toy_speed" in said:
        ledger.dropped("toy_speed", said["toy_speed"], "nothing here is slow", "solver: rtn")
    if "toy_order" in said:
        ledger.changed("toy_order", said["toy_order"], "rules[0].solver: rtn", "no order is kept")
    rule = {"weights": f"int{bits}-channel", "solver": "rtn", "match": {"modality": "llm"}}
    head = {"match": {"role": ["lm_head"], "name": ["*nothing*"]}, "skip": True, "optional": True}
    return ledger.finish({"name": "toy", "rules": [rule, head]})


def recognizes(content: Any) -> bool:
    """Whether a content is in this dialect."""
    if isinstance(content, str):
        return content.startswith("-") and content[1:].isdigit()
    return isinstance(content, dict) and any(str(key).startswith("toy_") for key in content)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the dialect before all others."""
    dialect = Dialect("toy", "keys that begin with toy_", recognizes, read_toy, reads_text=True)
    monkeypatch.setattr(known_dialects, "DIALECTS", (dialect, *known_dialects.DIALECTS))
