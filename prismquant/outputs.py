"""Files that may lie where a result is to be written.

A folder is empty, or an earlier run has left it: then all that belongs to that run is in regular
files. A single file does not exist, or an earlier run of the same command wrote it. A link would
lead writing and deleting to another place, and a named pipe waits for ever, so neither is ever
followed or opened. Nothing of a user's is deleted or replaced.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from prismquant.errors import StorageError
from prismquant.opening import open_regular, read_json, require_regular
from prismquant.storage import is_temporary, storage_error

_SHOWN = 3
# What names of files end with that are written into a result: no folder may have such a name.
_WRITTEN = frozenset(
    [
        ".safetensors",
        ".gguf",
        ".json",
        ".yaml",
        ".jinja",
        ".txt",
        ".model",
        ".tiktoken",
        ".toml",
        ".py",
    ]
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


def require_result_file(path: Path, *, inputs: Iterable[Path], keys: Collection[str]) -> None:
    """Refuse a file that is not free for the result of a command, before any of its work.

    Args:
        path: Where the result goes. What an earlier run of the command wrote there is replaced.
        inputs: Files and folders that the command reads, as far as they exist.
        keys: Of the JSON object that the command writes; by them an earlier result is known.

    Raises:
        StorageError: It lies in no folder that can be written, or within an input; or something
            else than an earlier result is there.
    """
    _require_free(path, inputs, lambda: _has_keys(path, keys))


def require_text_result(path: Path, *, inputs: Iterable[Path], first_words: str) -> None:
    """Refuse a file that is not free for a text, as :func:`require_result_file` does.

    Args:
        path: Where the text goes.
        inputs: Files and folders that the command reads, as far as they exist.
        first_words: Of the text; by them an earlier result is known.

    Raises:
        StorageError: As there.
    """
    _require_free(path, inputs, lambda: _begins_with(path, first_words))


def _require_free(path: Path, inputs: Iterable[Path], is_ours: Callable[[], bool]) -> None:
    try:
        _require_outside(path, inputs)
        if os.path.lexists(path):
            _require_earlier_result(path, is_ours)
    except OSError as error:
        raise storage_error(error, path) from error
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise StorageError(
            "the folder for the result is not there, or cannot be written",
            where=str(path.parent),
            remedy="make it, or choose another --out",
        )


def _require_outside(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse a result that would lie in the place of an input, or within it."""
    place = path.resolve()
    for one in inputs:
        if place.is_relative_to(one.resolve()):
            within = "a file in" if one.is_dir() else "the place of"
            raise StorageError(
                f"the result would be {within} what the command reads: {one}",
                where=str(path),
                remedy="choose another --out, outside of model and data",
            )


def _require_earlier_result(path: Path, is_ours: Callable[[], bool]) -> None:
    """Refuse what exists and is not a result of the same command."""
    status = os.lstat(path)
    if stat.S_ISDIR(status.st_mode):
        raise StorageError(
            "the result is a file, but this is a folder",
            where=str(path),
            remedy="name a file in it, e.g. result.json",
        )
    try:
        require_regular(status, path)
    except OSError as error:
        raise StorageError(
            f"the result cannot be written there: {error.strerror}",
            where=str(path),
            remedy="choose another --out; --json prints the result",
        ) from error
    if not is_ours():
        raise StorageError(
            "the file exists, and is not an earlier result of this command",
            where=str(path),
            remedy="choose another --out, or move the file away",
        )


def _has_keys(path: Path, keys: Collection[str]) -> bool:
    try:
        content = read_json(path)
    except StorageError:
        return False
    return isinstance(content, dict) and content.keys() >= set(keys)


def _begins_with(path: Path, words: str) -> bool:
    with open_regular(path) as file:
        return file.read(len(words.encode())) == words.encode()


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
