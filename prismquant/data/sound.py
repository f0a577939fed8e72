"""Sounds from files, as one channel of numbers at the rate that a model hears."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prismquant.data.containers import opened
from prismquant.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

_CONTAINERS = "wav,mp3,flac,ogg,mov,mp4,m4a,3gp,matroska,webm,aac,aiff,asf"
_READ = "sound files are WAV, MP3, FLAC, Ogg, Opus, M4A, AAC, AIFF or the sound of a clip"

Wave = npt.NDArray[np.float32]


def probe_sound(path: Path) -> None:
    """Make sure that a sound file can be read, without decoding it.

    Raises:
        DataError: PyAV is not installed, or the file is missing, broken or silent.
    """
    with _opened(path) as container:
        _stream(container, path)


def sound_seconds(path: Path) -> float | None:
    """Length of a sound file in seconds, from its header; None where that does not say.

    Raises:
        DataError: As for :func:`probe_sound`.
    """
    with _opened(path) as container:
        _stream(container, path)
        return None if container.duration is None else container.duration / 1e6


def read_sound(path: Path, rate: int) -> Wave:
    """All of a sound file, mixed into one channel.

    Args:
        path: The file.
        rate: Samples per second.

    Returns:
        float32 of shape ``[samples]``, from -1 to 1.

    Raises:
        DataError: As for :func:`probe_sound`; or it cannot be decoded.
    """
    import av

    with _opened(path) as container:
        stream = _stream(container, path)
        resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate)
        try:
            # Nothing, at last, asks for what the resampler still holds.
            decoded = itertools.chain(container.decode(stream), [None])
            frames = [part for frame in decoded for part in resampler.resample(frame)]
        except av.FFmpegError as error:
            raise DataError(f"sound {path} cannot be decoded: {error.strerror}") from error
    # The mean of all channels: FFmpeg's own mixing would be louder than each of two equal ones.
    parts = [frame.to_ndarray().mean(axis=0) for frame in frames]
    if not sum(map(len, parts)):
        raise DataError(f"sound {path} is empty")
    return np.concatenate(parts).astype(np.float32, copy=False)


def _opened(path: Path) -> AbstractContextManager[Any]:
    return opened(path, "sound", _CONTAINERS, read=_READ)


def _stream(container: Any, path: Path) -> Any:
    if not container.streams.audio:
        raise DataError(f"sound {path} has no sound stream")
    return container.streams.audio[0]
