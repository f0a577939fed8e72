"""Compiling functions for the processor at hand, with numba.

Compiled code is kept in numba's cache: beside the source, or in the user's folder for caches. Where
numba finds neither, every process compiles anew. Code is compiled for the types that are named and
when it is decorated, so that no call compiles anything, and lets other threads run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core.errors import NumbaError


def compiled(*signatures: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: compiled for these types now, or as an earlier process has left it.

    Division by zero gives what IEEE 754 says, and nothing is reordered.

    Args:
        signatures: numba's, all to be compiled.

    Returns:
        The decorator; it raises ImportError where numba cannot compile the function.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return _compile(function, signatures, cache=True)
        except (RuntimeError, OSError):
            # There is no place for a cache, or it cannot be written.
            return _compile(function, signatures, cache=False)

    return decorate


def _compile(
    function: Callable[..., Any], signatures: tuple[Any, ...], *, cache: bool
) -> Callable[..., Any]:
    try:
        decorator = numba.njit(list(signatures), cache=cache, nogil=True, error_model="numpy")
        found: Callable[..., Any] = decorator(function)
    except NumbaError as error:
        raise ImportError(f"numba cannot compile {function.__name__}: {error}") from error
    return found
