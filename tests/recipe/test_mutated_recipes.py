"""Recipes of other tools with one thing wrong: read, or refused in words that say what is meant."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from documented_recipes import EXAMPLES
from mutations import mutations

from prismquant.errors import PrismQuantError
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.importers.known_dialects import DIALECTS
from prismquant.recipe.importers.modelopt_presets import PRESETS

CONTENTS: dict[str, Any] = {
    name: PRESETS.get(content, content) if isinstance(content, str) else content
    for name, (_, content) in EXAMPLES.items()
}
MAPPINGS = [name for name, content in CONTENTS.items() if isinstance(content, dict)]
COMMANDS = [name for name, content in CONTENTS.items() if isinstance(content, str)]
KNOWN = {
    dialect.name: {setting.name for table in dialect.tables.values() for setting in table}
    for dialect in DIALECTS
}
KNOWN["llm-compressor"] |= {"GPTQModifier", "QuantizationModifier", "SmoothQuantModifier"}
# Whatever the tools call so: names of one's own, and the key by which a search is told.
FREE = {"quantization_formats"}


def fault(name: str, content: Any) -> str:
    """Why a recipe is refused as its tool's; empty where it is read, and its notes can be shown."""
    try:
        imported = import_recipe(content, name.partition(":")[0])
    except PrismQuantError as error:
        return str(error)
    assert imported.lines
    assert imported.to_dict()["dialect"] == imported.dialect
    return ""


@pytest.mark.parametrize("name", MAPPINGS)
def test_whatever_is_changed_it_is_read_or_refused_in_words(name: str) -> None:
    found = {what: fault(name, content) for what, content in mutations(CONTENTS[name], name, 200)}
    assert any(found.values())
    assert all("strange" in why for what, why in found.items() if what.startswith("add"))


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all keys that are words."""
    members = value.items() if isinstance(value, dict) else []
    if isinstance(value, list | tuple):
        members = enumerate(value)
    for key, member in members:
        if isinstance(key, str):
            yield (*path, key)
        yield from keys(member, (*path, key))


def misspelt(content: Any, path: tuple[Any, ...], at: int) -> Any:
    """The content with a letter less in a key, which stays in its place."""
    made = copy.deepcopy(content)
    inner, key = made, path[-1]
    for part in path[:-1]:
        inner = inner[part]
    members = [(f"{k[:at]}{k[at + 1 :]}" if k == key else k, v) for k, v in inner.items()]
    inner.clear()
    inner.update(members)
    return made


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_slip_in_a_key_is_an_error_that_says_what_was_meant(name: str) -> None:
    content, known = CONTENTS[name], KNOWN[name.partition(":")[0]] - FREE
    for path in keys(content):
        key = path[-1]
        if key not in known or len(key) < 5:
            continue
        for at in (1, len(key) // 2, len(key) - 2):
            why = fault(name, misspelt(content, path, at))
            assert f"did you mean {key!r}" in why, (path, at)


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_is_changed_in_a_command_it_is_read_or_refused_in_words(name: str) -> None:
    words = CONTENTS[name].split()
    for at, word in enumerate(words):
        for other in ("", word[:-1], f"{word}x", "--", "-1", "nan", "'", '"', "\0", "--quant=no"):
            why = fault(name, " ".join([*words[:at], other, *words[at + 1 :]]))
            if word.startswith("--") and other == f"{word}x":
                assert f"did you mean {word.removeprefix('--')!r}" in why
