"""How much memory the process takes, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import sys


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_memory() -> None:
    """Return freed pages to the system.

    glibc keeps freed blocks of megabytes on its heap once it has seen some, and weights of many
    shapes
    that come and go leave it in pieces: without this, a run over 32 blocks grows by ten megabytes a
    block although nothing is alive. Does nothing where the C library has no such call.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
