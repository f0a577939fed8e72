"""Errors of a command become one screen and an exit status."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from prismquant.cli.output import console
from prismquant.errors import ArgumentError, PrismQuantError, StorageError
from prismquant.memory import memory_error
from prismquant.opening import MAX_JSON_BYTES, parse_json, read_bounded
from prismquant.report.tables import as_text

# Newer versions of typer swallow Ctrl-C and return this; older ones raise Abort.
_TYPERS_INTERRUPT = 130
_PACKAGE = Path(__file__).parent.parent
_LONGEST = 2000
_DEBUG = "run again with --debug for the trace"
# What the system's refusals mean, and what helps.
_FULL = ("the disk is full", "free space, or write to another folder")
_SYSTEM = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: ("permission is denied", "give access to it, or name another"),
    errno.EPERM: ("permission is denied", "give access to it, or name another"),
    errno.EROFS: ("the file system is read-only", "write to another folder"),
    errno.ENOENT: ("there is no such file or folder", "check the name"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EMFILE: ("too many files are open", "raise `ulimit -n`"),
}


def guarded(
    command: Callable[[], Any], *, debug: bool = False, run_folder: Path | None = None
) -> int:
    """Run a command to its exit status; whatever it raises is shown on one screen.

    Args:
        command: What to run; it may return a status.
        debug: Show the trace of an error, too.
        run_folder: Where a command writes that can go on after it was stopped.
    """
    try:
        status = _run(command)
    except (KeyboardInterrupt, typer.Abort):
        _tell("stopped" if run_folder is None else f"stopped; {_kept(run_folder)}")
        return 1
    except typer.Exit as leave:
        return leave.exit_code
    except BrokenPipeError:
        # `| head` has read enough. What is still buffered has nowhere to go.
        sys.stdout = None
        return 1
    except SystemExit:
        raise
    except BaseException as error:
        # typer reports wrong flags and arguments through its parser's own exceptions.
        show = getattr(error, "show", None)
        if show is not None:
            show()
            return 2
        if debug:
            _tell("".join(traceback.format_exception(error)))
        shown = in_words(error)
        _tell(str(shown), heading="error: ")
        _tell_findings(shown, debug=debug)
        return 2 if isinstance(shown, ArgumentError) else 1
    return status if isinstance(status, int) else 0


def in_words(error: BaseException) -> PrismQuantError:
    """The words for an error: itself, where it was raised on purpose."""
    if isinstance(error, PrismQuantError):
        return error
    memory = memory_error(error)
    if memory is not None:
        return memory
    if isinstance(error, OSError) and error.errno is not None:
        what, remedy = _SYSTEM.get(error.errno, (str(error.strerror), _DEBUG))
        return StorageError(what, where=str(error.filename or _place(error)), remedy=remedy)
    text = str(error).strip()
    shortened = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} .."
    return PrismQuantError(
        ": ".join(filter(None, [type(error).__name__, shortened])),
        where=_place(error),
        remedy=f"this should have been told in words: {_DEBUG}, and please report it",
    )


def _tell_findings(error: PrismQuantError, *, debug: bool) -> None:
    """Rest of an error that is too long for a screen, or the way to see it."""
    if all(finding in error.what for finding in error.findings):
        return
    if debug:
        _tell("".join(f"\n  - {line}" for line in error.findings), heading="all that was found:")
    else:
        _tell("  all that was found: run again with --debug")


def _kept(folder: Path) -> str:
    """Words on what a run that was stopped has left to go on with."""
    # An analysis has a file as its result, and its finished units beside it.
    if units := len(list(folder.with_name(f"{folder.name}.partial").glob("unit-*.json"))):
        return f"{units} finished units are kept, `--resume` goes on after them"
    path = folder / "prismquant" / "record.json"
    if _entries(path, "steps"):
        return "finished steps are kept, `--resume` goes on after the last one"
    if trials := len(_entries(folder / "prismquant" / "choice" / "trials.json", "trials")):
        return f"trials that are finished ({trials}) are kept, `--resume` goes on after them"
    return "no step was finished" if path.exists() else "nothing was written"


def _entries(path: Path, key: str) -> Sequence[Any]:
    """A list in a JSON file; empty where there is none."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        found = parse_json(read_bounded(path, MAX_JSON_BYTES))[key]
        return found if isinstance(found, list) else ()
    return ()


def _place(error: BaseException) -> str:
    """The place in this package where an error came up."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    if not own:
        return "outside of prismquant"
    file = Path(own[-1].filename).relative_to(_PACKAGE.parent)
    return f"{file}, line {own[-1].lineno}, in {own[-1].name}"


def _tell(text: str, *, heading: str = "") -> None:
    # Standard error may be full or closed as well; the status is left to tell then.
    with contextlib.suppress(OSError):
        screen = console(stderr=True)
        screen.print(heading, style="bold red", end="")
        # Not wrapped: a path that is broken over two lines cannot be copied.
        screen.print(as_text(text), soft_wrap=True)


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Within, SIGTERM ends the command as Ctrl-C does; yields what tells that either has come.

    C code that calls Python, as torch does, may turn the exception that a signal raises into one of
    its own; the event still tells what it was.
    """
    stopped = threading.Event()

    def stop(*_: Any) -> None:
        stopped.set()
        raise KeyboardInterrupt

    # What a shell has told its background children to ignore stays ignored.
    caught = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, stop) for number in caught}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _no_input() -> Iterator[None]:
    """Within, whoever asks a question on standard input gets an error instead of an answer."""
    before = sys.stdin
    sys.stdin = None
    try:
        yield
    finally:
        sys.stdin = before


def _run(command: Callable[[], Any]) -> Any:
    """Call a command; a signal that ends it is a KeyboardInterrupt, whatever it is turned into."""
    with _signals() as stopped, _no_input():
        try:
            status = command()
        except Exception as error:
            if stopped.is_set():
                raise KeyboardInterrupt from error
            raise
    if status == _TYPERS_INTERRUPT:
        raise KeyboardInterrupt
    return status
