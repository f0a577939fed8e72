"""The command line. Each command is a few lines over :mod:`prismquant.api`.

Exit status: 0 done, 1 failed with a message that names what, where and the remedy, 2 usage. With
``--json`` one JSON object goes to stdout, and nothing at all where a command fails; progress and
messages always go to stderr. ``--debug``, or PRISMQUANT_DEBUG=1, adds the trace of an error.
Nothing is ever read from standard input.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prismquant.cli.commands import app
from prismquant.cli.guard import guarded
from prismquant.cli.output import prepare_streams
from prismquant.memory import ask_for_large_pages
from prismquant.threads import let_waiting_threads_sleep

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line and exit with its status."""
    prepare_streams()
    ask_for_large_pages()
    let_waiting_threads_sleep()
    words, debug = _without_debug(sys.argv[1:])
    command = next((word for word in words if not word.startswith("-")), "")
    sys.exit(
        guarded(
            lambda: app(words, standalone_mode=False),
            debug=debug or os.environ.get("PRISMQUANT_DEBUG", "0") not in ("", "0"),
            run_folder=_run_folder(words) if command in ("analyze", "quantize") else None,
        )
    )


def _run_folder(words: list[str]) -> Path | None:
    """The folder of the result, as the words of a command name it."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name = following if word == "--out" else word.removeprefix("--out=")
        if name and (word == "--out" or name != word):
            return Path(name)
    return None


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """Arguments that are left for the commands: the flag may stand before or behind any of them."""
    end = words.index("--") if "--" in words else len(words)
    left = [word for word in words[:end] if word != "--debug"]
    return left + words[end:], len(left) < end
