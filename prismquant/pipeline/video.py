"""Pictures and clips from files, as arrays.

A clip is a list of frame pictures or a video file. Either way the result is one uint8 array with
the times of its frames, so that the processors of all families get clips in one form and never
sample again by rules of their own. Frames of video files are chosen here: evenly spaced, about
``Sampling.fps`` of them for each second. PyAV is needed for video files only and is imported only
then.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from prismquant.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_INSTALL_VIDEO = (
    "pip install 'prismquant[video]' (PyAV), or give the clip as a list of frame pictures"
)


@dataclass(frozen=True)
class Sampling:
    """How frames of a video file are chosen, and the rate of clips that do not say theirs.

    Attributes:
        fps: Frames for each second of video; also the rate assumed for a list of frames without
            one.
        min_frames: The least number of frames, as far as the file has them.
        max_frames: The greatest number; longer files are sampled more thinly.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 64

    def __post_init__(self) -> None:
        if self.fps <= 0 or not 1 <= self.min_frames <= self.max_frames:
            raise DataError(
                f"frames cannot be sampled with fps={self.fps}, min_frames={self.min_frames}, "
                f"max_frames={self.max_frames}",
                remedy="fps above 0 and 1 <= min_frames <= max_frames",
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

    frames: npt.NDArray[np.uint8]
    indices: tuple[int, ...]
    fps: float
    total: int

    @property
    def metadata(self) -> dict[str, Any]:
        """What the processors of transformers want to know of a clip that is already sampled."""
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


def read_picture(source: Path | Image.Image) -> Image.Image:
    """The picture in RGB, turned upright as its EXIF data say.

    Raises:
        DataError: The file is missing or is not a whole picture.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    try:
        with Image.open(source) as picture:
            upright = ImageOps.exif_transpose(picture)
            return upright.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"picture {source} is missing") from error
    # Broken files make PIL raise nearly anything: OSError, SyntaxError (PNG), ValueError,
    # struct.error.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"picture {source} cannot be read: {reason}") from error


def read_frames(sources: Sequence[Path | Image.Image], fps: float) -> Clip:
    """A clip from pictures of equal size, taken ``fps`` times a second.

    Raises:
        DataError: A frame is missing or broken, or the sizes differ.
    """
    pictures = [read_picture(source) for source in sources]
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise DataError(f"frames of one clip differ in size: {listed}")
    frames = np.stack([np.asarray(picture, dtype=np.uint8) for picture in pictures])
    return Clip(frames, tuple(range(len(frames))), fps, len(frames))


def choose_frames(total: int, fps: float, sampling: Sampling) -> tuple[int, ...]:
    """Numbers of the frames to keep of ``total`` that were taken ``fps`` times a second.

    The first and the last frame are among them, the others evenly between.
    """
    wanted = round(total / fps * sampling.fps)
    count = min(max(wanted, sampling.min_frames), sampling.max_frames, total)
    if count == 1:
        return (0,)
    # Whole numbers only: a float grid would round differently from one machine to the next.
    return tuple((2 * step * (total - 1) + count - 1) // (2 * (count - 1)) for step in range(count))


def probe_video(path: Path) -> None:
    """Make sure that a video file can be read, without decoding it.

    Raises:
        DataError: PyAV is not installed, or the file is missing, broken or without pictures.
    """
    with _open(path) as container:
        _stream(container, path)


def read_video(path: Path, sampling: Sampling) -> Clip:
    """Sampled frames of a video file. Only the frames that are kept are held in memory.

    Raises:
        DataError: PyAV is not installed, or the file is missing, broken or without pictures.
    """
    total, rate = _count_frames(path)
    indices = choose_frames(total, float(rate), sampling)
    kept = set(indices)
    frames = []
    with _open(path) as container:
        stream = _stream(container, path)
        for number, frame in enumerate(_decode(container, stream, path)):
            if number in kept:
                frames.append(frame.to_ndarray(format="rgb24"))
            if number == indices[-1]:
                break
    return Clip(np.stack(frames), indices, float(rate), total)


def _count_frames(path: Path) -> tuple[int, Fraction]:
    """Number of frames, counted because headers may be wrong, and frames per second."""
    with _open(path) as container:
        stream = _stream(container, path)
        total = sum(1 for _ in _decode(container, stream, path))
        rate = stream.average_rate or stream.guessed_rate
    if not total or not rate:
        raise DataError(f"video {path} holds no frames")
    return total, Fraction(rate)


def _open(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"video file {path.name} needs PyAV, which is not installed",
            where=str(path),
            remedy=_INSTALL_VIDEO,
        ) from error
    if not path.is_file():
        raise DataError(f"video {path} is missing")
    try:
        return av.open(str(path))
    except (av.FFmpegError, ValueError) as error:
        raise DataError(f"video {path} cannot be read: {error}") from error


def _stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise DataError(f"video {path} has no picture stream")
    return container.streams.video[0]


def _decode(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    import av

    try:
        yield from container.decode(stream)
    except av.FFmpegError as error:
        raise DataError(f"video {path} cannot be decoded: {error}") from error
