"""The commands about families of models: list, draft, check."""

from __future__ import annotations

from typing import Annotated

import typer

from prismquant.cli.options import AsJson
from prismquant.cli.output import say, say_json, show
from prismquant.report.tables import as_text

archs = typer.Typer(no_args_is_help=True, help="List, draft and check descriptions of families.")


@archs.command("list")
def list_archs(as_json: AsJson = False) -> None:
    """Name the families that are described, with the model types that each is of."""
    from prismquant.models.arch_files import known_archs
    from prismquant.report.family_claims_table import families_table

    rows = [
        {"name": arch.name, "title": arch.title, "model_types": list(arch.model_types)}
        for arch in known_archs().values()
    ]
    if as_json:
        say_json(rows)
    else:
        show(families_table(rows))


@archs.command("draft")
def draft_arch(
    model: Annotated[
        str, typer.Argument(help="Folder with config.json and the files of the processor.")
    ],
) -> None:
    """Print an architecture file for a model, made of one run of a small random one.

    No weights are read. What a run cannot show is marked DRAFT. The draft is tried as `prismquant
    arch check` tries it: if a claim is wrong, it is printed, and the command fails.
    """
    from prismquant.families.draft_family import draft_family
    from prismquant.families.sound_draft import require_sound_draft
    from prismquant.threads import use_threads

    use_threads(None)
    text = draft_family(model)
    say(text, newline=False)
    require_sound_draft(model, text)


@archs.command("check")
def check_arch(
    model: Annotated[
        str, typer.Argument(help="Folder with config.json and the files of the processor.")
    ],
    arch: Annotated[
        str | None,
        typer.Option("--arch", help="An architecture file; default: the one for the model."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try what an architecture file says on a small random model. No weights are read."""
    from prismquant.families.check_family import check_family
    from prismquant.report.family_claims_table import claims_table, verdict
    from prismquant.threads import use_threads

    use_threads(None)
    result = check_family(model, arch).to_dict()
    if as_json:
        say_json(result)
    else:
        show(claims_table(result))
        for note in result["notes"]:
            show(as_text(f"note: {note}", "yellow"), soft_wrap=True)
        show(as_text(verdict(result)), soft_wrap=True)
    if not result["sound"]:
        raise typer.Exit(1)
