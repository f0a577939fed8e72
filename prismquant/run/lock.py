"""One run at a time in an output folder.

Two runs that write to one folder would mix their files and their records. The lock is the
kernel's, on a small file in the folder: it is gone with the process that held it, however that
ended, so there is never a stale lock to remove by hand. The file says who holds it, for the message
that the other run ends with, and is deleted when the lock is given back.

What lies in the file's place may be somebody else's: a link to a file elsewhere, or another file of
this name. It is opened without following a link, and written to only if it is a lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from prismquant.errors import StorageError
from prismquant.storage import make_folder, storage_error

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# What a file system answers that has no locks, as some network file systems.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
# What opening a link, a folder or a socket answers.
_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO}
_HELD = {errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN, errno.EDEADLK}
# Windows locks bytes of a file for readers too: one far behind what the file says of its holder.
_LOCKED_BYTE = 1 << 30
# A lock that a run has written, or begun to, begins like this; its holder has no longer name.
_BEGINNING, _LONGEST = b'{"pid": ', 1 << 10
# A link is an error, and a named pipe is not waited for.
_OPENED = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
# The file, or its folder, may be deleted between making and locking it, by a run that ends.
_TRIES = 100


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock for the length of a block.

    Folders that are missing are made, and deleted again if they are still empty at the end.

    Args:
        path: The file to lock, one level below the output folder.

    Yields:
        Whether there is a lock; False on a file system that has none.

    Raises:
        StorageError: Another process, or another thread, holds it; or the file is no lock, or
            cannot be written.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        handle, held = _take(path)
        try:
            yield held
        finally:
            _give_back(path, handle)
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _take(path: Path) -> tuple[int, bool]:
    """Open and lock the file, and write into it who holds it."""
    made = False
    for _ in range(_TRIES):
        try:
            if path.parent.is_symlink():
                raise _no_lock(path.parent)
            make_folder(path.parent)
            made = True
            handle = os.open(path, _OPENED, 0o666)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno in _NO_FILE:
                raise _no_lock(path) from error
            raise storage_error(error, path) from error
        try:
            if not _is_lock(handle):
                raise _no_lock(path)
            held = _lock(handle, path)
            if _is_at(path, handle):
                os.truncate(handle, 0)
                os.write(handle, json.dumps(_holder()).encode())
                return handle, held
        except OSError as error:
            os.close(handle)
            raise storage_error(error, path) from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    raise StorageError(
        "the output folder is deleted again and again"
        if made
        else "the output folder cannot be created there",
        where=str(path.parent.parent),
        remedy="choose another --out",
    )


def _lock(handle: int, path: Path) -> bool:
    """Lock an open file without waiting; False where the file system has no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise StorageError(
                f"another run is writing to the output folder{_told(path)}",
                where=str(path.parent.parent),
                remedy="wait until it has ended, or choose another --out",
            ) from error
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is_lock(handle: int) -> bool:
    """Whether an open file is a lock, or new: nothing else is ever written over."""
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size > _LONGEST:
        return False
    content = os.read(handle, _LONGEST)
    os.lseek(handle, 0, os.SEEK_SET)
    return content.startswith(_BEGINNING) or _BEGINNING.startswith(content)


def _no_lock(path: Path) -> StorageError:
    return StorageError(
        f"{path.name} in the output folder is not a run's",
        where=str(path),
        remedy="delete it or move it away, or choose another --out: it is neither followed, if it "
        "is a link, nor written over",
    )


def _is_at(path: Path, handle: int) -> bool:
    """Whether an open file still has its name: the run that held it may have deleted it."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _holder() -> dict[str, str | int]:
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"pid": os.getpid(), "host": platform.node(), "since": since}


def _told(path: Path) -> str:
    """Holder of the lock, as far as the file tells by now."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f": process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _give_back(path: Path, handle: int) -> None:
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            # An open file cannot be deleted there.
            os.close(handle)
            path.unlink(missing_ok=True)
        else:
            # Deleted while it is held: whoever opened it meanwhile sees that its name is gone.
            try:
                path.unlink(missing_ok=True)
            finally:
                os.close(handle)
