"""One dispatcher: which code runs an operation.

:func:`use` asks for one backend, in tests and where results of two are compared; it counts for all
kernels of this folder. Sums, pivots, ranges and the column loop of GPTQ each have one compiled twin
of their torch code, which they ask :func:`compiled_loops` for.

An operation has a reference in torch, which takes every case, and faster twins of it, its backends.
Each backend is a module with two functions: ``refusal(*case)`` says in a few words why it does not
take a case, or returns None, and ``run(*case)`` computes it. A module is imported when an operation
asks for it first; one that cannot be imported, for a package is missing or broken, takes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from prismquant.errors import NumericsError, suggest

REFERENCE = "torch"
_WANTED: ContextVar[str | None] = ContextVar("wanted", default=None)


@dataclass(frozen=True)
class BackendChoice:
    """A backend that was chosen for a case.

    Attributes:
        backend: Its name.
        run: Computes the case.
        refusals: What the backends before it said, by their names.
    """

    backend: str
    run: Callable[..., Any]
    refusals: Mapping[str, str]


@dataclass(frozen=True)
class Op:
    """An operation, and the code that runs it.

    Attributes:
        name: For people.
        homes: Module of each backend, by its name, in the order of preference; the reference last.
    """

    name: str
    homes: Mapping[str, str]

    def choose(self, *case: Any) -> BackendChoice:
        """The first backend that takes a case, or the one that :func:`use` names.

        Args:
            case: The arguments of the operation.

        Raises:
            NumericsError: The backend that was asked for does not take it.
        """
        wanted = _WANTED.get()
        refusals: dict[str, str] = {}
        for backend in self.homes if wanted is None or wanted not in self.homes else (wanted,):
            home = imported(self.homes[backend])
            refusal = home if isinstance(home, str) else home.refusal(*case)
            if refusal is None:
                return BackendChoice(backend, home.run, MappingProxyType(refusals))
            refusals[backend] = refusal
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in refusals.items())
        raise NumericsError(f"{self.name} cannot be run as asked: {reasons}")

    def __call__(self, *case: Any) -> Any:
        """Run a case by the backend that :meth:`choose` finds."""
        return self.choose(*case).run(*case)


PACKED_LINEAR = Op(
    "the product with a weight in codes",
    MappingProxyType(
        {
            "numba": "prismquant.kernels.packed_numba",
            "tiles": "prismquant.kernels.packed_tiles",
            REFERENCE: "prismquant.kernels.packed_torch",
        }
    ),
)
OPS: tuple[Op, ...] = (PACKED_LINEAR,)


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Within the block, operations that have a backend of this name run by it, or fail.

    Args:
        backend: Its name.

    Raises:
        NumericsError: No operation has one of this name.
    """
    known = sorted({name for op in OPS for name in op.homes})
    if backend not in known:
        raise NumericsError(f"there is no backend {backend!r}", remedy=suggest(backend, known))
    token = _WANTED.set(backend)
    try:
        yield
    finally:
        _WANTED.reset(token)


def allows(backend: str) -> bool:
    """Whether a backend may run: none or this one was asked for."""
    return _WANTED.get() in (None, backend)


def compiled_loops(name: str) -> Any | None:
    """A module of loops that numba compiles when it is imported.

    Args:
        name: Of the file in this folder.

    Returns:
        None where there is no numba that works, or another backend was asked for: the caller goes
        on in torch.
    """
    home = imported(f"prismquant.kernels.{name}") if allows("numba") else ""
    return None if isinstance(home, str) else home


@functools.cache
def imported(home: str) -> Any:
    """A module; where it cannot be imported, a few words on why. Found out once for a process."""
    try:
        return importlib.import_module(home)
    except Exception as error:  # a broken package can raise anything, which is as good as none
        return f"{type(error).__name__}: {error}"
