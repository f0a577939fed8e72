"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

# Not typer's paths: an empty word is no folder, and must not become the current one.
Model = Annotated[str, typer.Argument(help="Folder of a checkpoint.", show_default=False)]
RecipeOption = Annotated[str, typer.Option("--recipe", help="A preset's name or a YAML file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies in the checkpoint's folder.")
]
Fallback = Annotated[
    bool,
    typer.Option("--fallback", help="Where a format cannot hold a layer, take the nearest."),
]
OnFailure = Annotated[
    str | None,
    typer.Option("--on-failure", help="Where a solver fails: stop, or rtn to round to nearest."),
]
Shards = Annotated[
    int | None,
    typer.Option("--tensor-parallel", min=1, help="Devices that will share each layer."),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels", min=1, help="Of a picture or a frame; by default what its processor allows."
    ),
]
MaxFrames = Annotated[
    int | None, typer.Option("--max-frames", min=1, help="Of a clip; 64 of a file by default.")
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=1, help="Cut samples to so many tokens, and say which."),
]
KVCache = Annotated[str | None, typer.Option("--kv-cache", help="fp8, fp8-head, int8 .., or none.")]
