"""How much memory the process takes, and keeping it to what is alive."""

from __future__ import annotations

import ctypes
import sys

import psutil

_M_MMAP_THRESHOLD = -3


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


def keep_heap_compact() -> None:
    """Let the C library map every block of a megabyte or more by itself, and unmap it when freed.

    glibc raises that limit to 32 megabytes once it has freed blocks of such size. Weights and
    statistics of many shapes that come and go then leave its heap in pieces, and the resident set
    of a run grows with the number of blocks although nothing is alive. The setting holds for the
    whole process; it does nothing where the C library has no such call.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def give_back_freed() -> None:
    """Let the C library return to the system what its heap has free between blocks that stay.

    Blocks below a megabyte come from the heap; after a step, thousands of them are free, and the
    next step's do not fit their places exactly. It takes milliseconds, and does nothing where the C
    library has no such call.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
