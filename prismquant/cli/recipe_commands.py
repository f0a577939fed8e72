"""The commands about recipes: list, show, validate."""

from __future__ import annotations

from typing import Annotated

import typer

from prismquant.cli.options import AsJson
from prismquant.cli.output import say, say_json, show
from prismquant.report.tables import as_text

recipes = typer.Typer(no_args_is_help=True, help="List, show and check recipes.")


@recipes.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """Name the presets."""
    from prismquant.recipe.presets import NAMED

    if as_json:
        say_json(sorted(NAMED))
    else:
        say("\n".join(NAMED))


@recipes.command("show")
def show_recipe(recipe: Annotated[str, typer.Argument(help="A preset's name or a file.")]) -> None:
    """Print a recipe as YAML, e.g. to start one of your own from a preset."""
    from prismquant.recipe.presets import NAMED, preset_yaml

    if recipe in NAMED:
        say(preset_yaml(recipe), newline=False)
        return
    from prismquant.recipe.schema import load_recipe

    say(load_recipe(recipe).to_yaml(), newline=False)


@recipes.command("validate")
def validate_recipe(
    recipe: Annotated[str, typer.Argument(help="A preset's name or a file.")],
) -> None:
    """Check a recipe against the grammar."""
    from prismquant.recipe.schema import load_recipe

    loaded = load_recipe(recipe)
    show(as_text(f"{loaded.name}: {len(loaded.rules)} rules, valid"), soft_wrap=True)
