"""Recipes of any dialect: told apart by their content, and turned into our own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prismquant.errors import RecipeError, shortened, suggest
from prismquant.recipe.importers import known_dialects
from prismquant.recipe.importers.imported import OWN, Imported
from prismquant.recipe.importers.known_dialects import Dialect
from prismquant.recipe.importers.ledger import shown
from prismquant.recipe.presets import NAMED
from prismquant.recipe.recipe_file import read_recipe_file
from prismquant.recipe.schema import Recipe, load_recipe, parse_recipe

RecipeSource = str | Path | Mapping[str, Any] | list[Any] | Recipe | Imported
"""All that stands for a recipe: a preset's name, a file, a content, or another tool's text."""

_LONGEST_NAME = 60


def import_recipe(source: RecipeSource, dialect: str | None = None) -> Imported:
    """A recipe of this or another tool, with what became of each of its settings.

    Args:
        source: A preset's name; a file of YAML, JSON or one Python literal; a dictionary; a list or
            a text of a tool that has such; or a recipe.
        dialect: Whose recipe it is; None: it is told by its content.

    Raises:
        RecipeError: It cannot be read, is nobody's, or not valid; lists everything that is wrong.
    """
    if isinstance(source, Imported):
        return source
    if isinstance(source, Recipe):
        return Imported(OWN, source)
    if dialect not in (None, OWN):
        meant = _named(str(dialect))
        if not isinstance(source, str | Path | Mapping | list):
            raise RecipeError(f"a recipe is a file, a text or a dictionary, not {shown(source)}")
        if not (meant.reads_text or isinstance(source, Mapping | list) or os.path.exists(source)):
            raise RecipeError(f"no file is called {shortened(str(source))}")
        content, name = _content(source)
        return meant.read(content, name)
    is_preset = isinstance(source, str) and source in NAMED
    if dialect == OWN or is_preset or not _readable(source):
        return _own(source)
    content, name = _content(source)
    for one in known_dialects.DIALECTS:
        if one.recognizes(content):
            return one.read(content, name)
    if not isinstance(source, str | Path) or not isinstance(content, Mapping):
        return _own(source)
    return Imported(OWN, parse_recipe({"name": Path(source).stem, **content}, source=name))


def _own(source: str | Path | Mapping[str, Any] | list[Any]) -> Imported:
    if isinstance(source, list):
        raise RecipeError("only a list of llm-compressor's modifiers is a recipe, and this is none")
    return Imported(OWN, load_recipe(source))


def dialect_names() -> tuple[str, ...]:
    """Names of all dialects, our own first."""
    return (OWN, *(one.name for one in known_dialects.DIALECTS))


def _named(name: str) -> Dialect:
    for one in known_dialects.DIALECTS:
        if one.name == name:
            return one
    raise RecipeError(f"there is no dialect {name!r}", remedy=suggest(name, dialect_names()))


def _readable(source: Any) -> bool:
    """Whether there is a content to look at; else :func:`load_recipe` says what is wrong."""
    if isinstance(source, Mapping | list):
        return True
    if not isinstance(source, str | Path):
        return False
    return os.path.exists(source) or _is_text(source)


def _is_text(source: str | Path) -> bool:
    return isinstance(source, str) and any(
        one.recognizes(source) for one in known_dialects.DIALECTS
    )


def _content(source: str | Path | Mapping[str, Any] | list[Any]) -> tuple[Any, str]:
    """The content of a file, or a content itself; and what it is called."""
    if isinstance(source, Mapping | list):
        return source, "recipe"
    if isinstance(source, Path) or os.path.exists(source):
        return read_recipe_file(Path(source)), str(source)
    name = source if len(source) <= _LONGEST_NAME else f"{source[:_LONGEST_NAME]}.."
    return source, name
