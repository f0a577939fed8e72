"""Output of commands: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console

from prismquant.errors import StorageError


def prepare_streams() -> None:
    """Make the standard streams safe to write to, whoever has started the process.

    A closed one is given to the next file that is opened: whatever is printed would end up in a
    checkpoint. And a file's name need not be text that the terminal can show.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def console(*, stderr: bool = False) -> Console:
    """A console that keeps tables whole where there is no terminal to measure.

    Paths and names are text: brackets in them are no markup, and colons no emoji.
    """
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = 190
    return made


def show(*parts: Any, soft_wrap: bool = False) -> None:
    """Print tables and texts of rich to stdout.

    Raises:
        StorageError: It cannot be written to.
    """
    with _standard_output():
        console().print(*parts, soft_wrap=soft_wrap)


def say(text: str, *, newline: bool = True) -> None:
    """Print a text to stdout.

    Raises:
        StorageError: It cannot be written to.
    """
    with _standard_output():
        typer.echo(text, nl=newline)


def say_json(value: Any) -> None:
    """Print one JSON object to stdout.

    Raises:
        StorageError: It cannot be written to.
    """
    say(json.dumps(value))


@contextlib.contextmanager
def _standard_output() -> Iterator[None]:
    if sys.stdout is None:
        raise StorageError(
            "standard output is closed", remedy="redirect it, e.g. to a file or to /dev/null"
        )
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is still buffered has nowhere to go, and would fail again at exit.
        sys.stdout = None
        raise StorageError(
            f"standard output cannot be written: {error.strerror}",
            remedy="redirect it to where there is space",
        ) from error
