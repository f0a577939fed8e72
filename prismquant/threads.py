"""How many threads to compute with: measured, not assumed.

By default torch takes as many threads as there are cores. Where cores are shared, with other
processes or as halves of one physical core, its threads wait for one another more than they work,
and half as many can be several times faster. A product of two matrices on each number of threads
tells in a fraction of a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

_SIZE = 1024
_ROUNDS = 3
# A larger number must be worth its cores.
_GAIN = 0.9


def use_threads(count: int | None) -> None:
    """Let torch compute with so many threads in this process; by default the fastest number."""
    torch.set_num_threads(count or thread_count())


def thread_count(*, probe: Callable[[int], float] | None = None) -> int:
    """The number of threads that computes fastest.

    Who has set ``OMP_NUM_THREADS`` has decided, and is not overruled.

    Args:
        probe: Gives the seconds of a piece of work on so many threads; by default a product of two
            matrices of 1024 x 1024 in float32.

    Returns:
        1 or more, and no more than torch would take.
    """
    most = torch.get_num_threads()
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return most
    measure = probe or _seconds
    best, least = 1, measure(1)
    count = 2
    while count <= most:
        seconds = measure(count)
        if seconds < _GAIN * least:
            best, least = count, seconds
        # Powers of two, and all there are.
        count = most if count < most < 2 * count else 2 * count
    return best


def _seconds(threads: int) -> float:
    before = torch.get_num_threads()
    matrix = torch.ones(_SIZE, _SIZE)
    torch.set_num_threads(threads)
    try:
        torch.mm(matrix, matrix)
        return min(_once(matrix) for _ in range(_ROUNDS))
    finally:
        torch.set_num_threads(before)


def _once(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(matrix, matrix)
    return time.perf_counter() - started
