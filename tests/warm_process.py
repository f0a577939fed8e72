"""A process that has imported everything, and forks runs of the command line that it kills.

Importing torch and transformers takes seconds, a tiny run less than one: forked from here, a run
can be killed at many moments. It is a process of its own, with one thread, so that forking is safe.

Reads one JSON object a line: ``{"run": [arguments], "at": number, "then": seconds}``. The run gets
SIGKILL right before it asks the operating system for the n-th time to make, flush, rename or delete
a file; or, with ``then``, so long after it has asked n times: how far it is by then hangs on its
own progress, not on how busy the machine is. Answers with one JSON object: ``killed``, ``status``,
``seconds``, ``events`` (how often it has asked) and ``said``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL = 0.001
_OPEN = os.open


class _Events:
    """Counts what a run asks of the file system, and ends it at one of these moments."""

    def __init__(self, at: int | None, told: int) -> None:
        self.at = at
        self.count = 0
        self.told = told

    def watch(self) -> None:
        """Count from now on. Only this process is changed, and it ends with the run."""
        for owner, name in (
            *((os, name) for name in ("open", "fsync", "write", "truncate")),
            *((Path, name) for name in ("replace", "unlink")),
        ):
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        # What is only read changes nothing that a kill could interrupt.
        def counted(*args: Any, **kwargs: Any) -> Any:
            if call is _OPEN and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return call(*args, **kwargs)
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            os.pwrite(self.told, f"{self.count:8}".encode(), 0)
            return call(*args, **kwargs)

        return counted


def _child(arguments: list[str], at: int | None, told: int, said: int) -> None:
    """Run the command line, and leave without returning to what the parent was doing."""
    from prismquant.cli import main

    os.dup2(said, 1)
    os.dup2(said, 2)
    _Events(at, told).watch()
    sys.argv = ["prismquant", *arguments]
    status = 70
    try:
        main()
    except SystemExit as leave:
        status = int(leave.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _events(told: IO[bytes]) -> int:
    return int(os.pread(told.fileno(), 8, 0) or 0)


def _run(arguments: list[str], at: int | None, then: float | None) -> dict[str, Any]:
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as said:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(arguments, at if then is None else None, told.fileno(), said.fileno())
        ended, status = 0, 0
        while not ended:
            time.sleep(_POLL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and at is not None and then is not None and _events(told) >= at:
                time.sleep(then)
                os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0)
        said.seek(0)
        return {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "status": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - started,
            "events": _events(told),
            "said": said.read().decode(),
        }


def main() -> None:
    """Import, then serve until the input ends."""
    import torch

    import prismquant.api
    import prismquant.check
    from prismquant.models.config import import_transformers

    torch.set_num_threads(1)
    prismquant.api.inspect(sys.argv[1], "w4a16")
    import_transformers()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        answer = _run(asked["run"], asked.get("at"), asked.get("then"))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
