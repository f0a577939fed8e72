"""The dialects of recipes, and how each is told from the others: a new one is a file and a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prismquant.recipe.importers.imported import Imported


@dataclass(frozen=True)
class Dialect:
    """Another tool's way to write a recipe.

    Attributes:
        name: The tool's.
        known_by: By what it is recognized, in words.
        recognizes: Whether a content, as read from a file or given as text, is a recipe of it.
        read: The recipe in our grammar; takes the content and the name of its source.
    """

    name: str
    known_by: str
    recognizes: Callable[[Any], bool]
    read: Callable[[Any, str], Imported]


DIALECTS: tuple[Dialect, ...] = ()
"""All dialects but our own."""
