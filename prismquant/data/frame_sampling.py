"""Frames of a clip that are kept: evenly spaced, as the data or the recipe ask for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prismquant.errors import DataError

FRAME_KEYS = ("nframes", "min_frames", "max_frames", "video_start", "video_end")
# qwen-vl-utils: numbers of frames are even, and these unless the item says other.
_PAIR = 2
_FRAMES = (4, 768)


@dataclass(frozen=True)
class Sampling:
    """Sampling of a video file's frames, and the rate of clips that do not say theirs.

    Attributes:
        fps: Frames for each second of video; also the rate assumed for a list of frames without
            one.
        min_frames: The least number of frames, as far as the file has them.
        max_frames: The greatest number; longer files are sampled more thinly.
        limit: The greatest number whatever a clip's item says, and for lists of frames too.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 64
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.fps <= 0 or not 1 <= self.min_frames <= self.max_frames:
            raise DataError(
                f"frames cannot be sampled with fps={self.fps}, min_frames={self.min_frames}, "
                f"max_frames={self.max_frames}",
                remedy="fps above 0 and 1 <= min_frames <= max_frames",
            )

    @classmethod
    def limited(cls, limit: int | None) -> Sampling:
        """The default, with at most so many frames for any clip."""
        if limit is None:
            return cls()
        return cls(min_frames=min(cls.min_frames, limit), max_frames=limit, limit=limit)


def choose_frames(total: int, fps: float, sampling: Sampling) -> tuple[int, ...]:
    """Numbers of the frames to keep of ``total`` that were taken ``fps`` times a second.

    The first and the last frame are among them, the others evenly between.
    """
    wanted = round(total / fps * sampling.fps)
    return spread_frames(total, min(max(wanted, sampling.min_frames), sampling.max_frames, total))


def asked_frames(
    total: int, fps: float, options: Mapping[str, Any], sampling: Sampling
) -> tuple[int, ...]:
    """Numbers of the frames to keep of a file, as qwen-vl-utils chooses them by an item's options.

    Raises:
        DataError: The options ask for more frames than there are, or for none.
    """
    first, last = _cut_out(total, fps, options)
    there = last - first + 1
    if "nframes" in options:
        count = round(options["nframes"] / _PAIR) * _PAIR
        if not _PAIR <= count <= there:
            raise DataError(
                f"{options['nframes']} frames (nframes) of a clip that has {there}",
                remedy=f"nframes from {_PAIR} to {there}, or max_frames",
            )
    else:
        least = math.ceil(options.get("min_frames", _FRAMES[0]) / _PAIR) * _PAIR
        most = options.get("max_frames", min(_FRAMES[1], there)) // _PAIR * _PAIR
        wanted = there / fps * options.get("fps", sampling.fps)
        count = int(min(max(wanted, least), most, there)) // _PAIR * _PAIR
    count = max(min(count, sampling.limit or count), 1)
    return tuple(first + number for number in spread_frames(there, count))


def chosen_frames(
    total: int, fps: float, options: Mapping[str, Any], sampling: Sampling
) -> tuple[int, ...]:
    if any(key in options for key in ("fps", *FRAME_KEYS)):
        return asked_frames(total, fps, options, sampling)
    return choose_frames(total, fps, sampling)


def _cut_out(total: int, fps: float, options: Mapping[str, Any]) -> tuple[int, int]:
    """First and last frame between ``video_start`` and ``video_end``, in seconds."""
    seconds = total / fps
    start = min(max(options.get("video_start", 0.0), 0.0), seconds)
    end = min(max(options.get("video_end", seconds), 0.0), seconds)
    first, last = math.ceil(start * fps), min(math.floor(end * fps), total - 1)
    if first > last or (first == last and total > 1):
        raise DataError(
            f"no frames between {start:g} and {end:g} s of a clip of {seconds:g} s",
            remedy="another video_start and video_end",
        )
    return first, last


def spread_frames(total: int, count: int) -> tuple[int, ...]:
    if count == 1:
        return (0,)
    # Whole numbers only: a float grid would round differently from one machine to the next.
    return tuple((2 * step * (total - 1) + count - 1) // (2 * (count - 1)) for step in range(count))
