"""The number of threads to compute with: measured, not assumed.

By default torch takes as many threads as there are cores. Where cores are shared, with other
processes or as halves of one physical core, its threads wait for one another more than they work,
and half as many can be several times faster. Some work on each number of threads tells in less than
a second; where a run then takes far longer than it computes, :class:`Pace` looks again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, MutableMapping

_ROUNDS = 3
# A larger number must be worth its cores.
_GAIN = 0.9
# One large product takes as long as so many layers of a small model, on one thread.
_LARGE = 1024
_TOKENS, _WIDTH, _LAYERS = 256, 256, 6
# A step is slow if it takes so many times what it computes, or what the fastest of its kind took.
_TIMES_CPU, _TIMES_FASTEST = 2.0, 3.0
# Looking may take a twentieth of the time, and begins after so many seconds.
_PART, _PATIENCE = 20, 5.0
_SAID_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_waiting_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads of OpenMP sleep while they wait for work, in a process that has no torch yet.

    By default they spin for a while, which takes the cores from those that work. The variable is
    the standard's: GNU's runtime, which torch's wheels for Linux bring along, LLVM's and Intel's
    all read it when they are loaded. Who has said how threads wait is not overruled.
    """
    if not any(name in environment for name in _SAID_BY_USER):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def use_threads(count: int | None, earlier: int | None = None) -> Pace | None:
    """Let torch compute with so many threads in this process; by default the fastest number.

    Args:
        count: What the user wants; None leaves it to be measured.
        earlier: What a run that is resumed has last computed with.

    Returns:
        What looks again while the run goes on; None where the user has decided, by ``count`` or by
        ``OMP_NUM_THREADS``, or where there is nothing to choose.
    """
    import torch

    most = torch.get_num_threads()
    free = count is None and most > 1 and "OMP_NUM_THREADS" not in os.environ
    pace = Pace(most) if free else None
    if count or earlier:
        torch.set_num_threads(count or earlier or most)
    elif pace is not None:
        pace.look()
    return pace


def thread_count(most: int, probe: Callable[[int], float] | None = None) -> int:
    """The number of threads that computes fastest.

    Args:
        most: No more than these.
        probe: Gives the seconds of a piece of work on so many threads; by default of a product of
            two large matrices and of some layers of a small model.

    Returns:
        1 or more. A power of two, or ``most``.
    """
    measure = probe or _seconds
    counts = [*(1 << n for n in range((most - 1).bit_length())), most]
    # By turns, so that what else the machine does falls on all. First of all threads are started.
    rounds = [[measure(count) for count in counts] for _ in range(1 + _ROUNDS)][1:]
    seconds = [sum(turns) for turns in zip(*rounds, strict=True)]
    best = 0
    for index, one in enumerate(seconds):
        if one < _GAIN * seconds[best]:
            best = index
    return counts[best]


class Pace:
    """Watches the clock between steps, and looks for a better number of threads where they drag.

    Threads that wait sleep: a step whose seconds are many times those of its processor has waited,
    for other processes or for a disk.

    Args:
        most: Threads that torch takes by itself.
        choose: Finds a number up to ``most``; by default :func:`thread_count`.
    """

    def __init__(self, most: int, choose: Callable[[int], int] = thread_count) -> None:
        self._most, self._choose = most, choose
        self._fastest: dict[Hashable, float] = {}
        self._cost = self._waited = 0.0
        self._mark()

    def after(self, step: str, kind: Hashable, seconds: float) -> str | None:
        """Take note that a step has ended, and change the number of threads if that helps.

        Args:
            step: Its name.
            kind: The same for steps that take equally long.
            seconds: What it took, in this run or in an earlier one that has done it already.

        Returns:
            What has changed, and why; None: nothing.
        """
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        fastest = self._fastest[kind] = min(seconds, self._fastest.get(kind, seconds))
        self._waited += wall
        slow = wall > min(_TIMES_CPU * cpu, _TIMES_FASTEST * fastest)
        due = self._waited > max(_PART * self._cost, _PATIENCE)
        changed = self.look() if slow and due else None
        self._mark()
        return changed and f"{step} took {wall:.0f} s, {cpu:.0f} s of them on the CPU: {changed}"

    def look(self) -> str | None:
        """Measure, and let torch take what was found; returns what has changed, or None."""
        import torch

        before, started = torch.get_num_threads(), time.perf_counter()
        found = self._choose(self._most)
        self._cost, self._waited = time.perf_counter() - started, 0.0
        if found == before:
            return None
        torch.set_num_threads(found)
        # What is fast has changed with it.
        self._fastest.clear()
        return f"{found} instead of {before} threads from here on"

    def _mark(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def _seconds(threads: int) -> float:
    """Seconds of both pieces of work on so many threads; torch is left as it was."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    started = time.perf_counter()
    try:
        _small_layers()
        torch.mm(torch.ones(_LARGE, _LARGE), torch.ones(_LARGE, _LARGE))
    finally:
        torch.set_num_threads(before)
    return time.perf_counter() - started


def _small_layers() -> None:
    """Products and element-wise operations, each so short that starting threads counts."""
    import torch

    x, up = torch.ones(_TOKENS, _WIDTH), torch.ones(_WIDTH, 4 * _WIDTH)
    for _ in range(_LAYERS):
        hidden = torch.nn.functional.silu(x @ up)
        x = torch.nn.functional.layer_norm(x + hidden @ up.T, (_WIDTH,))
