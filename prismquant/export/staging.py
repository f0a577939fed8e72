"""A result that is put into its folder only when it is whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from prismquant.errors import StorageError
from prismquant.outputs import require_empty
from prismquant.run.lock import locked
from prismquant.storage import storage_error

_NAME = ".prismquant-export"
_LAST = "config.json"


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to write a result into; its files get their places when the block ends well.

    It lies in the output folder, so that nothing moves between disks, and its name is ours alone:
    what a killed export left there is deleted by the next one. A block that fails leaves nothing.

    Args:
        out: The result's folder; must not exist or be empty.

    Raises:
        StorageError: It holds files, another process is writing to it, or it cannot be written.
    """
    place = out / _NAME
    # Nothing is put into a folder that is not ours, not even for a moment.
    _require_free(out)
    with locked(out / "prismquant" / "lock") as _:
        _require_free(out)
        try:
            _discard(place)
            place.mkdir()
            yield place
            _put(place, out)
        except OSError as error:
            raise storage_error(error, out) from error
        except StorageError as error:
            raise _told(error, place, out) from error
        finally:
            with contextlib.suppress(OSError):
                _discard(place)


def _require_free(out: Path) -> None:
    """Refuse a folder that holds anything but what a killed export left."""
    place, lock = out / _NAME, out / "prismquant" / "lock"
    left = place.is_dir() and not place.is_symlink()
    require_empty(
        out,
        ours=lambda path: path == lock or (left and place in path.parents),
        remedy="delete it, or choose another --out: an export was cut off while it put its files "
        "there"
        if left
        else None,
    )


def _discard(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)


def _put(place: Path, out: Path) -> None:
    """Move everything to where it belongs, what makes readers see a model last."""
    files = sorted(path for path in place.rglob("*") if not path.is_dir())
    for path in sorted(files, key=lambda path: path.relative_to(place) == Path(_LAST)):
        target = out / path.relative_to(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def _told(error: StorageError, place: Path, out: Path) -> StorageError:
    """An error in words of the output folder, and how much of the result there was."""
    if error.where is None or not Path(error.where).is_relative_to(place):
        return error
    written = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    what = f"{error.what}; {written / 2**20:.1f} MiB of the result were written before"
    return StorageError(what, where=str(out), remedy=error.remedy)
