"""Clips from files, as arrays.

A clip is a list of frame pictures or a video file. Either way the result is one uint8 array with
the times of its frames, so that the processors of all families get clips in one form and never
sample again by rules of their own. Frames are chosen here: evenly spaced, about ``Sampling.fps`` of
them for each second of a file, or as the clip's item in the data says. PyAV is needed for video
files only and is imported only then.

"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from prismquant.data.containers import opened
from prismquant.data.frame_sampling import Sampling, chosen_frames, spread_frames
from prismquant.data.pictures import MAX_PIXELS, Source, read_picture
from prismquant.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from prismquant.data.sizes import Size

# Of the frames before they are made: (height, width) and number of frames; gives another height and
# width.
Scaling = Callable[["Size", int], "Size"]
Frames = npt.NDArray[np.uint8]

# As FFmpeg names what reads them.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,gif,ogg,asf"
_INSTEAD = "or give the clip as a list of frame pictures"
_READ = (
    "video files are MP4, MOV, MKV, WebM, AVI, MPEG, FLV, Ogg, WMV or GIF; "
    "playlists and streams are not followed"
)


@dataclass(frozen=True)
class Clip:
    """Frames and their times.

    Attributes:
        frames: uint8 of shape [frames, height, width, 3].
        indices: Number of each frame in its source; its time is ``index / fps`` seconds.
        fps: Frames per second of the source.
        total: Number of frames of the source.
    """

    frames: Frames
    indices: tuple[int, ...]
    fps: float
    total: int

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of a sampled clip, as the processors of transformers want it."""
        height, width = self.frames.shape[1:3]
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "width": width,
            "height": height,
            "duration": self.total / self.fps,
            "video_backend": "pyav",
            "frames_indices": list(self.indices),
        }

    def lengthened(self, multiple: int) -> Clip:
        """The clip with its last frame repeated until ``multiple`` frames are there at least."""
        missing = multiple - len(self.frames)
        if missing <= 0:
            return self
        frames = np.concatenate([self.frames, np.repeat(self.frames[-1:], missing, axis=0)])
        return Clip(frames, self.indices + self.indices[-1:] * missing, self.fps, self.total)


@dataclass(frozen=True)
class Outline:
    """Header of a clip, which may be wrong.

    Attributes:
        size: Height and width of its frames.
        frames: How many frames would be kept.
    """

    size: Size
    frames: int


def read_frames(
    sources: Sequence[Source],
    options: Mapping[str, Any],
    sampling: Sampling,
    scaling: Scaling | None = None,
) -> Clip:
    """A clip from pictures of equal size.

    Args:
        sources: The pictures, in order.
        options: Of the clip's item; ``fps`` is the rate at which the pictures were taken.
        sampling: Gives the rate of clips without one, and a limit.
        scaling: Gives the size of the frames; by default they stay as they are.

    Raises:
        DataError: A frame is missing or broken, or the sizes differ.
    """
    fps = float(options.get("fps", sampling.fps))
    total = len(sources)
    indices = spread_frames(total, min(total, sampling.limit or total))
    frames = _Stack(len(indices), scaling)
    for number in indices:
        frames.add(np.asarray(read_picture(sources[number]), dtype=np.uint8))
    return Clip(frames.array, indices, fps, total)


def probe_video(path: Path) -> None:
    """Make sure that a video file can be read, without decoding it.

    Raises:
        DataError: PyAV is not installed, or the file is missing, broken or without pictures.
    """
    with _opened(path) as container:
        _stream(container, path)


def outline_video(path: Path, options: Mapping[str, Any], sampling: Sampling) -> Outline:
    """Size of a file's frames and how many would be kept, without decoding any.

    Args:
        path: The file.
        options: Of the clip's item.
        sampling: How frames are chosen.

    Raises:
        DataError: PyAV is not installed, or the file is missing, broken or without pictures.
    """
    with _opened(path) as container:
        stream = _stream(container, path)
        rate = float(stream.average_rate or stream.guessed_rate or sampling.fps)
        total = stream.frames or round((container.duration or 0) / 1e6 * rate)
        context = stream.codec_context
        size = context.height or 0, context.width or 0
    with contextlib.suppress(DataError):
        if total:
            return Outline(size, len(chosen_frames(total, rate, options, sampling)))
    return Outline(size, sampling.limit or max(options.get("nframes", 0), sampling.max_frames))


def read_video(
    path: Path,
    sampling: Sampling,
    options: Mapping[str, Any] | None = None,
    scaling: Scaling | None = None,
) -> Clip:
    """Chosen frames of a video file, upright. Only the frames that are kept are held in memory.

    Args:
        path: The file.
        sampling: How frames are chosen.
        options: Of the clip's item, which may say other.
        scaling: Gives the size of the frames; by default they stay as they are.

    Raises:
        DataError: PyAV is not installed, or the file is missing, broken or without pictures.
    """
    total, rate = _count_frames(path)
    indices = chosen_frames(total, float(rate), options or {}, sampling)
    kept = set(indices)
    frames = _Stack(len(indices), scaling)
    with _opened(path) as container:
        stream = _stream(container, path)
        for number, frame in enumerate(_decode(container, stream, path)):
            if number in kept:
                frames.add(_upright(frame, path))
            if number == indices[-1]:
                break
    return Clip(frames.array, indices, float(rate), total)


class _Stack:
    """Frames of equal size in one array, scaled as they come."""

    def __init__(self, count: int, scaling: Scaling | None) -> None:
        self._count, self._filled, self._scaling = count, 0, scaling
        self._given: tuple[int, ...] = ()
        self.array: Frames = np.empty(0, np.uint8)

    def add(self, frame: Frames) -> None:
        if not self._given:
            self._given = frame.shape
            size = frame.shape[0], frame.shape[1]
            target = size if self._scaling is None else self._scaling(size, self._count)
            self.array = np.empty((self._count, *target, 3), np.uint8)
        if frame.shape != self._given:
            sizes = sorted((shape[1], shape[0]) for shape in (self._given, frame.shape))
            listed = ", ".join(f"{width}x{height}" for width, height in sizes)
            raise DataError(f"frames of one clip differ in size: {listed}")
        height, width = self.array.shape[1:3]
        if frame.shape[:2] != (height, width):
            frame = np.asarray(Image.fromarray(frame).resize((width, height)))
        self.array[self._filled] = frame
        self._filled += 1


# Files


def _count_frames(path: Path) -> tuple[int, Fraction]:
    """Number of frames, counted because headers may be wrong, and frames per second."""
    with _opened(path) as container:
        stream = _stream(container, path)
        total = sum(1 for _ in _decode(container, stream, path))
        rate = stream.average_rate or stream.guessed_rate
    if not total or not rate:
        raise DataError(f"video {path} holds no frames")
    return total, Fraction(rate)


def _opened(path: Path) -> AbstractContextManager[Any]:
    return opened(path, "video", _CONTAINERS, read=_READ, instead=_INSTEAD)


def _stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise DataError(f"video {path} has no picture stream")
    stream = container.streams.video[0]
    # Frames of a broken or hostile stream may be larger than its header says.
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _decode(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    import av

    try:
        yield from container.decode(stream)
    except av.FFmpegError as error:
        raise DataError(f"video {path} cannot be decoded: {error.strerror}") from error


def _upright(frame: Any, path: Path) -> Frames:
    """A frame as players show it: turned and flipped by its track's display matrix."""
    pixels: Frames = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # Where x and y of the frame go: x' = a x + c y, y' = b x + d y.
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
    if a == d == 0 and b and c:
        pixels, across, down = pixels.transpose(1, 0, 2), c, b
    elif b == c == 0 and a and d:
        across, down = a, d
    elif not (a or b or c or d):
        return pixels
    else:
        raise DataError(
            f"video {path} is turned by {math.degrees(math.atan2(b, a)):.0f} degrees",
            remedy="turn it upright with a video editor; quarter turns and flips alone are known",
        )
    return pixels[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1]
