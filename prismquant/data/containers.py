"""Files of clips and sounds, opened with care: they come from strangers.

Only containers that hold their own data are opened, not playlists that name other files, and the
reader is handed an open file instead of a path. PyAV is imported only where a file needs it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from prismquant.errors import DataError
from prismquant.opening import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_OPTIONS = {"protocol_whitelist": "", "enable_drefs": "0", "use_absolute_path": "0"}


@contextlib.contextmanager
def opened(path: Path, what: str, formats: str, *, read: str, instead: str = "") -> Iterator[Any]:
    """Open a file as a container of PyAV.

    Args:
        path: The file.
        what: ``video`` or ``sound``, for messages.
        formats: Containers that may be read, as FFmpeg names them; playlists (hls, dash, concat ..)
            would open other files.
        read: Which files are read, for a message.
        instead: What helps without PyAV.

    Raises:
        DataError: PyAV is not installed, or the file is missing or broken.
    """
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"{what} file {path.name} needs PyAV, which is not installed",
            where=str(path),
            remedy=", ".join(filter(None, ["pip install 'prismquant[video]' (PyAV)", instead])),
        ) from error
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise DataError(f"{what} {path} is missing") from error
    except OSError as error:
        raise DataError(f"{what} {path} cannot be read: {error.strerror}") from error
    with file:
        options = _OPTIONS | {"format_whitelist": formats}
        try:
            container = av.open(file, container_options=options, io_open=_refuse)
        except (av.FFmpegError, ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{what} {path} cannot be read: {reason}", remedy=read) from error
        with container:
            yield container


def _refuse(url: str, *_: Any) -> None:
    raise OSError(f"it names another file, {url}")
