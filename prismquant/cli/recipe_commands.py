"""The commands about recipes: list, show, validate, convert."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prismquant.cli.options import AsJson
from prismquant.cli.output import console, say, say_json, show
from prismquant.cli.written import print_remarks
from prismquant.report.tables import as_text

if TYPE_CHECKING:
    from prismquant.recipe.importers.imported import Imported

recipes = typer.Typer(no_args_is_help=True, help="List, show, check and convert recipes.")

_Source = Annotated[str, typer.Argument(help="A preset's name or a file, of this or another tool.")]


@recipes.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """Name the presets."""
    from prismquant.recipe.presets import NAMED

    if as_json:
        say_json(sorted(NAMED))
    else:
        say("\n".join(NAMED))


@recipes.command("show")
def show_recipe(recipe: _Source) -> None:
    """Print a recipe as YAML, e.g. to start one of your own from a preset."""
    from prismquant.recipe.importers.import_recipe import import_recipe
    from prismquant.recipe.presets import NAMED, preset_yaml

    if recipe in NAMED:
        say(preset_yaml(recipe), newline=False)
        return
    imported = import_recipe(recipe)
    print_remarks(console(stderr=True), imported.lines)
    say(imported.recipe.to_yaml(), newline=False)


@recipes.command("validate")
def validate_recipe(recipe: _Source) -> None:
    """Check a recipe against the grammar."""
    from prismquant.recipe.importers.import_recipe import import_recipe

    imported = import_recipe(recipe)
    print_remarks(console(stderr=True), imported.lines)
    loaded = imported.recipe
    show(as_text(f"{loaded.name}: {len(loaded.rules)} rules, valid"), soft_wrap=True)


# Words of other tools begin with hyphens.
@recipes.command("convert", context_settings={"ignore_unknown_options": True})
def convert_recipe(
    recipe: Annotated[
        str,
        typer.Argument(help="A file or a text of this or another tool.", show_default=False),
    ],
    dialect: Annotated[
        str | None,
        typer.Option("--from", help="Whose recipe it is; told by its content by default."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Write the recipe to this file.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a recipe that cannot be kept as it is.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn another tool's recipe into one of ours, and tell what became of each setting."""
    from prismquant.recipe.importers.import_recipe import import_recipe
    from prismquant.report.translations import translation_table
    from prismquant.storage import write_text

    target = None if out is None else _recipe_file(out, recipe)
    imported = import_recipe(recipe, dialect)
    if strict:
        imported.require_exact()
    text = _written(imported)
    if target is not None:
        write_text(target, text)
    if as_json:
        say_json(imported.to_dict() | {"out": out})
        return
    screen = console(stderr=True)
    if imported.translation is not None:
        screen.print(translation_table(imported.translation))
    if out is None:
        say(text, newline=False)
    else:
        screen.print(as_text(f"written: {out}"), soft_wrap=True)


_FIRST_WORDS = "# Converted by prismquant recipe convert"


def _recipe_file(out: str, recipe: str) -> Path:
    """A file that the converted recipe can be written to, as far as that is seen now.

    Raises:
        ArgumentError: No file is called so.
        StorageError: Something lies there that is not to be replaced, or it cannot be written.
    """
    from prismquant.arguments import as_path
    from prismquant.outputs import require_text_result

    path = as_path(out, "out")
    read = [Path(recipe)] if os.path.exists(recipe) else []
    require_text_result(path, inputs=read, first_words=_FIRST_WORDS)
    return path


def _written(imported: Imported) -> str:
    """The recipe as YAML, with what became of the source's settings in a comment."""
    from prismquant.recipe.plain_yaml import yaml_comment

    comment = [_FIRST_WORDS.removeprefix("# "), *imported.lines]
    return yaml_comment(comment) + imported.recipe.to_yaml()
