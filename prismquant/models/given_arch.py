"""An architecture file that a caller gives, beside the folders that it describes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from prismquant.arguments import as_path
from prismquant.errors import ModelError
from prismquant.models.arch_files import BESIDE, load_arch

__all__ = ["described_by", "own_arch_file"]

# Of the call that is under way, and of no other thread's.
_GIVEN: ContextVar[Path | None] = ContextVar("_GIVEN", default=None)


@contextlib.contextmanager
def described_by(file: str | Path | None) -> Iterator[None]:
    """While it lasts, an architecture file describes all folders of its model types.

    It comes before files beside checkpoints and those of the package.

    Args:
        file: An architecture file; None changes nothing.

    Raises:
        ModelError: The file is malformed.
    """
    if file is None:
        yield
        return
    path = as_path(file, "arch")
    load_arch(path)
    before = _GIVEN.set(path)
    try:
        yield
    finally:
        _GIVEN.reset(before)


def own_arch_file(folder: Path, model_type: object) -> Path | None:
    """The file that describes a folder in place of the package's; None where there is none.

    Args:
        folder: The checkpoint.
        model_type: By its config.json.

    Raises:
        ModelError: A file that was given, or lies there, is malformed or describes other models.
    """
    given, beside = _GIVEN.get(), folder / BESIDE
    path = given or (beside if beside.is_file() else None)
    if path is None:
        return None
    types = load_arch(path).model_types
    if model_type not in types:
        raise ModelError(
            f"{path.name} describes {', '.join(types)}, but the checkpoint's model_type is "
            f"{model_type!r}",
            where=str(folder),
            remedy=f"correct {path.name}, or take it away",
        )
    return path
