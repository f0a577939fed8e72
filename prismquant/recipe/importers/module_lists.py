"""Lists of modules as llm-compressor's recipes give them, within the bounds of our grammar.

A name of theirs is a regular expression of ours, and of these a recipe has a bounded number; so the
names of a long list are joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prismquant.recipe.importers.ledger import Ledger
from prismquant.recipe.importers.module_names import CONVOLUTION, NamedModules, named_modules
from prismquant.recipe.importers.source_section import SourceSection
from prismquant.recipe.joined_names import LONGEST, join_names
from prismquant.recipe.match import MAX_EXPRESSIONS

MAX_NAMES = 20_000
"""Most entries of one list."""
FEW = 200
"""Most entries that are told, and kept as expressions, one by one."""


def listed_modules(
    section: SourceSection, key: str, default: Iterable[str], ours: str
) -> tuple[NamedModules, ...]:
    """The modules of a list, each noted as what it is for with us."""
    found = []
    entries = section.words(key, default)
    if too_many(entries):
        section.wrong(key, too_many(entries))
        return ()
    if len(entries) > FEW:
        why = f"{len(entries)} entries, whose names are joined; a name means all below it, too"
        section.changed(key, ours, why)
    for number, entry in enumerate(entries):
        one = _named(section.ledger, f"{section.at(key)}[{number}]", entry)
        if one is None:
            continue
        if key in section and (len(entries) <= FEW or one.kind in ("class", "nothing")):
            _note(section.ledger, f"{section.at(key)}[{number}]", one, ours)
        if one.kind == "class" and ours != "match":
            section.wrong(key, f"{entry} would leave nothing to quantize: name modules")
        elif one.kind != "nothing":
            found.append(one)
    return tuple(found)


def _named(ledger: Ledger, place: str, entry: str) -> NamedModules | None:
    try:
        return named_modules(entry)
    except ValueError as error:
        ledger.wrong(place, str(error))
        return None


def _note(ledger: Ledger, place: str, one: NamedModules, ours: str) -> None:
    if one.kind == "nothing":
        ledger.dropped(
            place,
            one.entry,
            "a class means modules of that class alone, and this one has no weight to quantize",
            "a name or an expression, such as re:.*visual.*",
        )
    elif one.kind == "class":
        which = "patch embedding" if one.pattern == CONVOLUTION else "all but the patch embedding"
        ledger.honoured(place, one.entry, ours, f"every layer of this class: {which}")
    elif one.why:
        ledger.changed(place, one.entry, f"{ours}, name: {one.pattern}", one.why)
    else:
        ledger.honoured(place, one.entry, f"{ours}, name: {one.pattern}")


def too_many(entries: Sequence[str]) -> str:
    """Words on a list that is too long to be read; empty where it is not."""
    if len(entries) > MAX_NAMES:
        return f"{len(entries)} names, more than {MAX_NAMES}: use expressions, such as re:.*experts"
    count = sum(entry.startswith("re:") for entry in entries)
    if count > MAX_EXPRESSIONS:
        return f"{count} expressions (re:), more than {MAX_EXPRESSIONS}: join them with |"
    return ""


def together(patterns: Sequence[str]) -> list[str]:
    """Patterns that mean the same as many patterns do, names joined as far as bounds allow.

    Args:
        patterns: As of :class:`NamedModules`; few stay as they are.
    """
    return list(patterns) if len(patterns) <= FEW else join_names(patterns)


def too_long_together(patterns: Sequence[str]) -> str:
    """Words on layers that are too many to leave out of one rule alone; empty where they fit."""
    if sum(len(one) + 6 for one in patterns) <= LONGEST:
        return ""
    return (
        f"{len(patterns)} entries that this modifier alone ignores are too long together: use a "
        "few expressions (re:), or ignore the same in every modifier"
    )
