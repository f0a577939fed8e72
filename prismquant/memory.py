"""How much memory the process takes, and keeping it to what is alive."""

from __future__ import annotations

import ctypes
import os
import sys

import psutil

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# How many of the largest blocks that are not mapped may be free at the end of the heap.
_KEPT = 16


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
