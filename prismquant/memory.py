"""Memory of the process: how much it takes, keeping it to what is alive, saying that it ran out."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil

from prismquant.errors import OutOfMemory

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# How many of the largest blocks that are not mapped may be free at the end of the heap.
_KEPT = 16
# What helps against too little memory, by the flag that does it.
_FLAGS = {
    "--memory-budget": "lets what does not fit wait on disk",
    "--batch-size": "runs fewer samples together",
    "--max-pixels": "makes pictures smaller",
    "--limit": "takes fewer samples",
}
# Libraries raise errors of their own for it, which can only be told by their words.
_RAN_OUT = re.compile(
    r"can't allocate memory|cannot allocate memory$|out of memory|bad_alloc|ALLOC_FAILED|"
    r"not enough memory|unable to allocate|failed to map segment",
    re.IGNORECASE,
)
_ASKED = re.compile(r"allocate (\d+(?=\ bytes)|[\d.]+) (bytes|[KMGTP]iB)")


@contextlib.contextmanager
def collecting_seldom() -> Iterator[None]:
    """While it lasts, the garbage collector looks a hundred times less often for circles.

    For work that makes many objects which live on, such as the plan of ten thousands of layers: the
    collector would look at all of them again and again, as long as the work itself takes.
    """
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def available_bytes() -> int:
    """Memory that processes can still get without anything being swapped out."""
    return int(psutil.virtual_memory().available)


def free_device_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where it has none of its own or does not tell."""
    if device.type != "cuda":
        return None
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def keep_heap_compact(mapped: int = 1 << 20) -> None:
    """Let the C library map every large block by itself, and unmap it when freed.

    glibc raises its limit to 32 megabytes once it has freed blocks of such size. Weights and
    statistics of many shapes that come and go then leave its heap in pieces, and the resident set
    of a run grows with the number of blocks although nothing is alive. Smaller blocks come from the
    heap and go back to it: memory that the system has handed over once, which takes longer than
    many an operation on it. :func:`give_back_freed` sees to what they leave. The setting holds for
    the whole process; it does nothing where the C library has no such call.

    Args:
        mapped: Bytes from which on a block is large.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mapped)
        mallopt(_M_TRIM_THRESHOLD, _KEPT * mapped)


def ask_for_large_pages() -> None:
    """Let torch ask the system for large pages, where the system gives them to who asks.

    Tensors of many megabytes come and go, and each time the system hands over their memory page by
    page; with pages of two megabytes in place of four kilobytes that takes a fraction of the time.
    torch reads the setting once, so this belongs before its import; a value that is set already
    stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def give_back_freed() -> None:
    """Let the C library return to the system what its heap has free between blocks that stay.

    After a step, thousands of blocks are free, and the next step's do not fit their places exactly.
    It takes milliseconds, and does nothing where the C library has no such call.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def memory_error(error: BaseException, *flags: str, where: str | None = None) -> OutOfMemory | None:
    """The error for a user where another one means that memory ran out; None if it means more.

    Args:
        error: Whatever was raised: by Python, NumPy, torch on a CPU, or a device.
        flags: Those of the command that take less memory; of what each does is told.
        where: What was at work.
    """
    if isinstance(error, OutOfMemory):
        return error
    out = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    # PrismQuantErrors say what they mean; a word of one that quotes another proves nothing.
    told = isinstance(error, RuntimeError | ImportError) and _RAN_OUT.search(str(error))
    if not out and not told:
        return None
    found = _ASKED.search(str(error))
    asked = f": {_size(found[1], found[2])} more were asked for" if found else ""
    device = "CUDA" in str(error)
    helps = ["end other programs" + (" on the device" if device else ", or raise `ulimit -v`")]
    helps += [f"{flag} {_FLAGS[flag]}" for flag in flags]
    return OutOfMemory(
        f"{'memory of the device' if device else 'memory'} ran out{asked}",
        where=where,
        remedy="; ".join(helps),
    )


def _size(number: str, unit: str) -> str:
    return readable_bytes(int(number)) if unit == "bytes" else f"{number} {unit}"


@contextlib.contextmanager
def memory_told(*flags: str) -> Iterator[None]:
    """Within the block, or the function that it decorates, tell in words that memory ran out.

    Raises:
        OutOfMemory: In place of any error that means it; see :func:`memory_error`.
    """
    try:
        yield
    except Exception as error:
        told = memory_error(error, *flags)
        if told is None or told is error:
            raise
        raise told from error


def readable_bytes(count: int) -> str:
    """A size in words, e.g. ``7.0 MiB``."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
