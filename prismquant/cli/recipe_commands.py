"""The commands about recipes: list, show, validate, convert."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prismquant.cli.options import AsJson
from prismquant.cli.output import console, say, say_json, show
from prismquant.cli.written import print_remarks
from prismquant.errors import ArgumentError
from prismquant.report.tables import as_text

if TYPE_CHECKING:
    from prismquant.recipe.exporters.foreign_recipe import ForeignRecipe
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
        typer.Argument(
            help="A preset's name, a file, or a text of this or another tool.", show_default=False
        ),
    ],
    dialect: Annotated[
        str | None,
        typer.Option("--from", help="Whose recipe it is; told by its content by default."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Whose recipe it becomes: llm-compressor, modelopt, mi-optimize or mquant; ours "
            "by default.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --to: folder of the checkpoint whose layers are named; by default names "
            "are those of all known families."
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Write the recipe to this file.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a recipe that cannot be kept as it is.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a recipe into one of ours or of another tool, and tell what became of each setting."""
    from prismquant.recipe.importers.import_recipe import import_recipe
    from prismquant.recipe.importers.imported import OWN
    from prismquant.storage import write_text

    target = None if target == OWN else target
    path = None if out is None else _recipe_file(out, recipe, target)
    if model is not None and target is None:
        raise ArgumentError("--model names the layers of another tool's recipe", remedy="give --to")
    imported = import_recipe(recipe, dialect)
    if strict:
        imported.require_exact()
    exported = None if target is None else _exported(imported, target, model)
    if strict and exported is not None:
        exported.require_exact()
    text = _written(imported) if exported is None else _their_text(imported, exported)
    if path is not None:
        write_text(path, text)
    if as_json:
        theirs = {} if exported is None else {"exported": exported.to_dict()}
        say_json(imported.to_dict() | theirs | {"out": out})
        return
    _show(imported, exported)
    if out is None:
        say(text, newline=False)
    else:
        console(stderr=True).print(as_text(f"written: {out}"), soft_wrap=True)


_FIRST_WORDS = "# Converted by prismquant recipe convert"


def _exported(imported: Imported, target: str, model: str | None) -> ForeignRecipe:
    from prismquant.arguments import as_path
    from prismquant.recipe.exporters.export_recipe import export_recipe

    return export_recipe(imported, target, None if model is None else as_path(model, "model"))


def _show(imported: Imported, exported: ForeignRecipe | None) -> None:
    """Show what became of each setting, on the way in and on the way out."""
    from prismquant.report.translations import translation_table, written_table

    screen = console(stderr=True)
    if imported.translation is not None:
        screen.print(translation_table(imported.translation))
    if exported is not None:
        screen.print(written_table(exported.heading, exported.parts))
        print_remarks(screen, [f"guessed: {one}" for one in exported.guessed])


def _recipe_file(out: str, recipe: str, target: str | None) -> Path:
    """A file that the converted recipe can be written to, as far as that is seen now.

    Raises:
        ArgumentError: No file is called so.
        StorageError: Something lies there that is not to be replaced, or it cannot be written.
    """
    from prismquant.arguments import as_path
    from prismquant.outputs import require_text_result
    from prismquant.recipe.exporters.export_recipe import WRITERS

    path = as_path(out, "out")
    read = [Path(recipe)] if os.path.exists(recipe) else []
    writer = None if target is None else WRITERS.get(target)
    first_words = writer.first_words if writer and writer.first_words else _FIRST_WORDS
    require_text_result(path, inputs=read, first_words=first_words)
    return path


def _written(imported: Imported) -> str:
    """The recipe as YAML, with what became of the source's settings in a comment."""
    from prismquant.recipe.plain_yaml import yaml_comment

    comment = [_FIRST_WORDS.removeprefix("# "), *imported.lines]
    return yaml_comment(comment) + imported.recipe.to_yaml()


def _their_text(imported: Imported, exported: ForeignRecipe) -> str:
    """Another tool's recipe, with what became of all settings in a comment if it may have one."""
    from prismquant.recipe.exporters.export_recipe import WRITERS
    from prismquant.recipe.plain_yaml import yaml_comment

    writer = WRITERS[exported.dialect]
    if writer.first_words:
        return exported.text
    comment = [_FIRST_WORDS.removeprefix("# "), f"for {writer.use}"]
    return yaml_comment([*comment, *imported.lines, *exported.lines]) + exported.text
