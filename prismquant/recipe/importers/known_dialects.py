"""The dialects of recipes, and how each is told from the others: a new one is a file and a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prismquant.recipe.importers import llm_compressor, mi_optimize, modelopt, mquant
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.source_section import Table


@dataclass(frozen=True)
class Dialect:
    """Another tool's way to write a recipe.

    Attributes:
        name: The tool's.
        known_by: By what it is recognized, in words.
        recognizes: Whether a content, as read from a file or given as text, is a recipe of it.
        read: The recipe in our grammar; takes the content and the name of its source.
        tables: All settings that it knows, by where they stand; for the page about migrating.
        notes: What else a user should know who comes from it.
        reads_text: Whether a text that is no file's name may be a recipe of it.
    """

    name: str
    known_by: str
    recognizes: Callable[[Any], bool]
    read: Callable[[Any, str], Imported]
    tables: Mapping[str, Table] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reads_text: bool = False


DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        llm_compressor.NAME,
        "stages (`.._stage`) of modifiers, or the names of modifiers",
        llm_compressor.recognizes,
        llm_compressor.read,
        llm_compressor.TABLES,
        llm_compressor.NOTES,
    ),
    Dialect(
        mi_optimize.NAME,
        "`quant_config` with `algo` or `w_dtype`, with or without that key around it",
        mi_optimize.recognizes,
        mi_optimize.read,
        mi_optimize.TABLES,
        mi_optimize.NOTES,
    ),
    Dialect(
        mquant.NAME,
        "flags such as `--quant_llm` in a text or a file, or a mapping of them",
        mquant.recognizes,
        mquant.read,
        mquant.TABLES,
        mquant.NOTES,
        reads_text=True,
    ),
    Dialect(
        modelopt.NAME,
        "`quant_cfg`, or the name of a configuration such as `INT4_AWQ_CFG`",
        modelopt.recognizes,
        modelopt.read,
        modelopt.TABLES,
        modelopt.NOTES,
        reads_text=True,
    ),
)
"""All dialects but our own."""
