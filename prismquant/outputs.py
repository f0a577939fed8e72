"""What an output folder may hold before anything is written into it.

A result is written into a folder that is empty, or that an earlier run has left: then all that
belongs to that run is in regular files. A link would lead writing and deleting to another place,
and a named pipe waits for ever, so neither is ever followed or opened. Nothing of a user's is
deleted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from prismquant.errors import StorageError
from prismquant.storage import is_temporary, storage_error

_SHOWN = 3
# What names of files end with that are written into a result: no folder may have such a name.
_WRITTEN = frozenset(
    [".safetensors", ".gguf", ".json", ".yaml", ".jinja", ".txt", ".model", ".tiktoken", ".py"]
)


def require_empty(
    folder: Path, *, ours: Callable[[Path], bool] = is_temporary, remedy: str | None = None
) -> None:
    """Refuse a folder that holds files, or a file in its place.

    Args:
        folder: Need not exist. It may be a link to a folder, which a user has made on purpose.
        ours: Says of a regular file whether an earlier run may have left it, so that it does not
            count.
        remedy: What else a user can do but choose another folder.

    Raises:
        StorageError: It holds something, is no folder, or cannot be looked at.
    """
    remedy = remedy or "choose another --out, or delete it"
    try:
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            what = "the output folder exists, but is no folder"
        else:
            held = [
                f"{name} ({kind})" if kind else name
                for name, kind in _entries(folder)
                if kind or not ours(folder / name)
            ]
            if not held:
                return
            more = f" and {len(held) - _SHOWN} more" if len(held) > _SHOWN else ""
            what = "the output folder exists and is not empty: it holds "
            what += ", ".join(held[:_SHOWN]) + more
    except OSError as error:
        raise storage_error(error, folder) from error
    raise StorageError(what, where=str(folder), remedy=remedy)


def require_regular_files(folder: Path) -> None:
    """Refuse a folder in which anything is neither a regular file nor a folder.

    Raises:
        StorageError: There is a link, a named pipe, or a folder in a file's place; names it.
    """
    try:
        odd = [f"{name} ({kind})" for name, kind in _entries(folder) if kind]
    except OSError as error:
        raise storage_error(error, folder) from error
    if odd:
        raise StorageError(
            f"the output folder holds what no run has written: {', '.join(odd[:_SHOWN])}",
            where=str(folder),
            remedy="delete it: only regular files are read and written there, and no link is "
            "followed",
        )


def _entries(folder: Path) -> Iterator[tuple[str, str]]:
    """All in a folder and below it but folders: the name from there, and what it is if no file.

    A folder is told only where a file belongs. One that may not be looked into is passed over, as
    nothing can be written there.
    """
    left = [""]
    while left:
        inside = left.pop()
        try:
            with os.scandir(folder / inside) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except PermissionError:
            if inside:
                continue
            raise
        for entry in found:
            name = f"{inside}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                left.append(f"{name}/")
                if Path(name).suffix in _WRITTEN:
                    yield name, "a folder"
            elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                yield name, ""
            else:
                yield name, "a link" if entry.is_symlink() else "no regular file"
