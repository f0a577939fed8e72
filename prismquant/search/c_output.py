"""Keeping what C code prints off standard output, which belongs to the results of commands."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def c_output_dropped() -> Iterator[None]:
    """Within, what C and C++ code of this process prints to standard output is dropped.

    Some releases of HiGHS print lines of their own, whatever they are told.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    _flush()
    try:
        kept = os.dup(1)
    except OSError:
        yield  # it is closed
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Write out what C's own buffers hold."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)
