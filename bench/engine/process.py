"""A command in a process of its own: seconds, seconds of CPU, and the largest resident set.

A process can be asked for the peak of its children only all together, so each command gets a small
parent of its own, which does nothing else. The peak is that of the largest process below it, pages
of mapped files included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_RUNNER = """
import json, resource, subprocess, sys, time
with open(sys.argv[1], "wb") as log:
    started = time.perf_counter()
    code = subprocess.run(sys.argv[2:], stdout=log, stderr=subprocess.STDOUT).returncode
    seconds = time.perf_counter() - started
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""


@dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes:
        code: Its exit status.
        seconds: From start to end, by the clock.
        cpu_seconds: Of all its processes, in all threads.
        peak: Bytes of the largest resident set of any of its processes.
        tail: The last line of its output that holds letters, which tells why it failed.
    """

    code: int
    seconds: float
    cpu_seconds: float
    peak: int
    tail: str = ""


def thread_environment(threads: int) -> dict[str, str]:
    """This environment with a number of threads for every library that takes one.

    Idle threads sleep: on shared cores, threads that spin in wait slow each other down tenfold.
    """
    count = str(threads)
    libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    waiting = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    return {**os.environ, **dict.fromkeys(libraries, count), **waiting}


def measure(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    folder: Path | None = None,
) -> Measured:
    """Run a command and measure it.

    Args:
        command: The program and its arguments.
        log: Takes all that it prints.
        environment: Of the program.
        folder: Where it runs; here by default.
    """
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER, str(log), *command],
        check=True,
        capture_output=True,
        text=True,
        env=dict(environment),
        cwd=folder,
    )
    code, seconds, cpu_seconds, peak = json.loads(done.stdout)
    return Measured(code, seconds, cpu_seconds, peak, last_words(log) if code else "")


def last_words(log: Path) -> str:
    """The last line with a letter in it; errors of Python name themselves there."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = (line.strip() for line in reversed(lines))
    return next((line for line in told if any(c.isalpha() for c in line)), "")
