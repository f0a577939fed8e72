"""Arguments of callers, checked and turned into what the work below takes; torch's modes around it.

The command line and the Python functions take the same words and refuse the same ones, because both
come here: sizes such as ``4GiB``, names of dtypes and devices, paths as text. Whatever is refused
is refused before any work. The work itself finds torch as it is by default, whatever a caller has
switched on.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismquant.errors import ArgumentError, PrismQuantError, suggest

if TYPE_CHECKING:
    import torch
    from pydantic import ConfigDict

EXACT: ConfigDict = {"extra": "forbid"}
"""How dataclasses of a record are read back: no field more."""

_AUTOCAST = ("cpu", "cuda")
FLOATS = ("float32", "bfloat16", "float16")
MAX_SAMPLES = 1_000_000
MAX_BATCH = 65_536
_MAX_BYTES = 1 << 60
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmgt]?)(i?)b?")
# File systems hold no longer names.
_LONGEST_NAME = 255
# Where the option is not the argument's name with hyphens.
_OPTIONS = {"calibration": "--calib", "reader": "--for"} | dict.fromkeys(
    ("model", "folder", "sensitivity"), ""
)


def as_path(value: Any, name: str) -> Path:
    """A path that is given as text or as a path.

    Args:
        value: What was given.
        name: The argument's.

    Raises:
        ArgumentError: It is none, or no file could be called so.
    """
    if not isinstance(value, str | os.PathLike):
        raise _refused(name, f"{_shown(value)} is not a path")
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise _refused(name, f"{_shown(text)} is not the name of a file or folder")
    if text == "-":
        raise _refused(
            name,
            "'-' stands for no file: nothing is read from standard input or written to standard "
            "output by that name",
            "name a file or folder, ./- if it is called so; --json prints results",
        )
    try:
        longest = max((len(os.fsencode(part)) for part in Path(text).parts), default=0)
    except UnicodeEncodeError:
        raise _refused(name, f"{_shown(text)} is not the name of a file or folder") from None
    if longest > _LONGEST_NAME:
        raise _refused(
            name, f"a name of {longest} bytes is too long: file systems take {_LONGEST_NAME}"
        )
    return Path(text)


def as_source(value: Any, name: str) -> str | Path:
    """A source of data: a file, or the name of a data set.

    Raises:
        ArgumentError: It is neither.
    """
    path = as_path(value, name)
    return value if isinstance(value, str) else path


def as_count(value: Any, name: str, *, least: int = 1, most: int = MAX_SAMPLES) -> int:
    """A whole number within bounds.

    Raises:
        ArgumentError: It is none, or is out of bounds; true and false are no numbers.
    """
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or not least <= count <= most:
        raise _refused(name, f"{_shown(value)} is not a whole number from {least} to {most}")
    return count


def as_flag(value: Any, name: str) -> bool:
    """True or false.

    Raises:
        ArgumentError: It is neither.
    """
    if not isinstance(value, bool):
        raise _refused(name, f"{_shown(value)} is neither true nor false")
    return value


def as_choice(value: Any, name: str, known: Iterable[str]) -> str:
    """One of some words.

    Raises:
        ArgumentError: It is none of them.
    """
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise _refused(name, f"there is no {name} {_shown(value)}", suggest(str(value), known))
    return value


def as_bytes(value: Any, name: str) -> int:
    """A number of bytes: a whole number, or a size such as ``4GiB``, ``4G`` or ``500 MB``.

    Raises:
        ArgumentError: It is neither, or no memory has that size.
    """
    if not isinstance(value, str):
        return as_count(value, name, most=_MAX_BYTES)
    text = value.strip().lower()
    found = _SIZE.fullmatch(text)
    if found is None:
        raise _refused(name, f"{_shown(value)} is no size such as 4GiB")
    number, prefix, binary = found.groups()
    # A bare letter is meant as memory is counted.
    unit = 1000 if text.endswith("b") and prefix and not binary else 1024
    size = float(number) * unit ** " kmgt".index(prefix or " ")
    if not 1 <= size <= _MAX_BYTES or math.isinf(size):
        raise _refused(name, f"{_shown(value)} is no size that memory has")
    return int(size)


def as_dtype(value: Any, name: str = "dtype", known: Iterable[str] = FLOATS) -> torch.dtype:
    """A floating-point dtype, by its name or itself.

    Raises:
        ArgumentError: It is none of ``known``.
    """
    import torch

    word = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    found: torch.dtype = getattr(torch, as_choice(word, name, known))
    return found


def as_arithmetic(value: Any) -> torch.dtype | Any:
    """In what a run computes: a dtype, or ``mixed``.

    Raises:
        ArgumentError: It is neither.
    """
    return value if value == "mixed" else as_dtype(value, known=(*FLOATS, "mixed"))


def as_device(value: Any) -> torch.device:
    """A device that computes, by its name or itself.

    Raises:
        ArgumentError: It is no such thing.
        PrismQuantError: The device is not there, or computes nothing.
    """
    import torch

    if not isinstance(value, str | torch.device):
        raise _refused("device", f"{_shown(value)} is not a device")
    try:
        device = torch.device(value)
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PrismQuantError(
            f"device {_shown(str(value))} cannot be used: {reason}", remedy="use --device cpu"
        ) from error
    return device


@contextlib.contextmanager
def default_modes() -> Iterator[None]:
    """Within the block, or the function that it decorates, this thread has torch's default modes.

    Gradients, inference mode, autocast and the default device belong to a thread, so they are set
    for the length of a call and nobody else notices. The default dtype belongs to the whole
    process: other threads would notice, so another one than float32 is refused.

    Raises:
        PrismQuantError: The default dtype is not float32.
    """
    import torch

    dtype = torch.get_default_dtype()
    if dtype != torch.float32:
        raise PrismQuantError(
            f"torch's default dtype is {dtype}, in which models would be built and sums formed",
            remedy="call torch.set_default_dtype(torch.float32) before; the argument `dtype` says "
            "in what a model computes",
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # Entered only where it changes something: it slows every call of torch.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _refused(name: str, what: str, remedy: str | None = None) -> ArgumentError:
    option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
    return ArgumentError(
        what, where=f"{name} ({option})" if option else f"argument {name}", remedy=remedy
    )


def _shown(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:78]}.."


def refuse_idle(given: Mapping[str, Any], of: str) -> None:
    """Refuse arguments of a part of the work that was not asked for.

    Args:
        given: The arguments, None where they were left out.
        of: What asks for the part, e.g. ``--verify``.

    Raises:
        ArgumentError: One is given.
    """
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(
                f"{name} does nothing without {of}",
                where=f"{name} ({_OPTIONS.get(name) or f'--{name}'})",
                remedy=f"leave it out, or give {of}",
            )


def as_items(value: Any) -> list[Any]:
    """Items of an argument that may be one or many; what is no list of any kind is one item."""
    if value is None:
        return []
    alone = isinstance(value, str | bytes) or not isinstance(value, Iterable)
    return [value] if alone else list(value)
