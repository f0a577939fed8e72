"""Pictures and clips of a sample as a processor is given them, and the memory that takes.

Nothing is kept: a sample's files are read when its batch is due. What it will take is told before,
from the headers of its files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prismquant.data import Sample, located, media_of
from prismquant.data.frame_sampling import Sampling
from prismquant.data.pictures import DECODING_BYTES, header_size, read_picture
from prismquant.data.sizes import OwnSizes, Size, fitted, frame_size, picture_size, sized
from prismquant.data.sound import Wave, read_sound, sound_seconds
from prismquant.data.video import Clip, Outline, outline_video, read_frames, read_video
from prismquant.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_FLOAT32 = 4
_CHANNELS = 3
# A processor works on one picture at a time, and joins the results where there are several.
_ONE, _SEVERAL = 1.7, 2.1


@dataclass(frozen=True)
class Limits:
    """Limits of samples, whatever the data and the processor say.

    Attributes:
        max_pixels: Pixels of a picture, or of a frame of a clip, as the model sees it.
        max_frames: Frames of a clip.
        max_length: Tokens of a sample. Longer ones are cut, but never within a picture or a clip.
        seq_length: Tokens of a window that running text is cut into; None: the usual number.
    """

    max_pixels: int | None = None
    max_frames: int | None = None
    max_length: int | None = None
    seq_length: int | None = None

    @property
    def sampling(self) -> Sampling:
        """Sampling of clips' frames."""
        return Sampling.limited(self.max_frames)


@dataclass(frozen=True)
class Cost:
    """Memory that a sample's pictures and clips take.

    Attributes:
        peak: Bytes while they are read and processed.
        pixels: Bytes of what the processor makes of them, which the peak includes.
    """

    peak: int = 0
    pixels: int = 0


def processor_inputs(sample: Sample, processor: Any, limits: Limits) -> dict[str, Any]:
    """Read a sample's pictures and clips, scaled where its items or the limits ask for it.

    Args:
        sample: What to read.
        processor: Of the model.
        limits: What there may be at most.

    Returns:
        Keyword arguments of the processor's call.

    Raises:
        DataError: A file cannot be read, or a size cannot be had.
    """
    given: dict[str, Any] = {}
    items = list(media_of(sample))
    if images := [item for kind, item in items if kind == "image"]:
        rule = _Pictures.of(images, processor, limits)
        given["images"] = [rule.read(item, sample) for item in images]
        given["images_kwargs"] = rule.options
    if videos := [item for kind, item in items if kind == "video"]:
        rules = _Clips.of(videos, processor, limits)
        clips = [rules.read(item, sample) for item in videos]
        given["videos"] = [clip.frames for clip in clips]
        given["videos_kwargs"] = rules.options | {
            "do_sample_frames": False,
            "video_metadata": [clip.metadata for clip in clips],
        }
    if sounds := [item["audio"] for kind, item in items if kind == "audio"]:
        rate = heard_rate(processor)
        given["audio"] = [_heard(sample.folder / sound, rate, processor) for sound in sounds]
        given["audio_kwargs"] = {"sampling_rate": rate}
    return given


def _heard(path: Path, rate: int, processor: Any) -> Wave:
    """A sound of which the processor cuts nothing off.

    Raises:
        DataError: It is longer than what the model hears, or cannot be read.
    """
    wave, most = read_sound(path, rate), getattr(processor.feature_extractor, "n_samples", None)
    if most is not None and len(wave) > most:
        raise DataError(
            f"{path.name} lasts {len(wave) / rate:.1f} s, and the model hears {most / rate:g} s",
            remedy="cut the sound",
        )
    return wave


def heard_rate(processor: Any) -> int:
    """Samples per second of the sounds that a processor takes.

    Raises:
        DataError: It takes none.
    """
    ears = getattr(processor, "feature_extractor", None)
    if ears is None:
        raise DataError("the model hears no sounds", remedy="leave them out of the data")
    return int(ears.sampling_rate)


def media_cost(sample: Sample, processor: Any, limits: Limits) -> Cost:
    """Cost of a sample's pictures and clips, from the headers of their files.

    Raises:
        DataError: A file cannot be opened, or a size cannot be had.
    """
    items = list(media_of(sample))
    decoding, held, pixels = [0], [], []
    if images := [item for kind, item in items if kind == "image"]:
        rule = _Pictures.of(images, processor, limits)
        for item in images:
            width, height = header_size(located(item["image"], sample))
            decoding.append(height * width * DECODING_BYTES)
            held.append(math.prod(rule.target((height, width), item)) * _CHANNELS)
            pixels.append(rule.pixel_bytes((height, width), item))
    if videos := [item for kind, item in items if kind == "video"]:
        rules = _Clips.of(videos, processor, limits)
        for item in videos:
            outline = rules.outline(item, sample)
            held.append(outline.frames * math.prod(outline.size) * _CHANNELS)
            pixels.append(rules.pixel_bytes(outline, item))
    for sound in [item["audio"] for kind, item in items if kind == "audio"]:
        seconds = sound_seconds(sample.folder / sound) or 0.0
        held.append(int(seconds * heard_rate(processor)) * _FLOAT32)
        pixels.append(_heard_bytes(processor, seconds))
    # The processor arranges what it is given in another way, which is a copy of it.
    work = _ONE if len(pixels) == 1 and not videos else _SEVERAL
    working = sum(held) + int(work * sum(pixels))
    return Cost(sum(held) + max(*decoding, working), sum(pixels))


@dataclass(frozen=True)
class _Pictures:
    """Reader of a sample's pictures.

    Attributes:
        processor: The image processor.
        own: How it scales pictures by itself; None where that is no number of pixels.
        explicit: Whether pictures are scaled here, to the size that they shall have.
        limits: What there may be at most.
    """

    processor: Any
    own: OwnSizes | None
    explicit: bool
    limits: Limits

    @classmethod
    def of(cls, items: Sequence[Mapping[str, Any]], processor: Any, limits: Limits) -> _Pictures:
        worker = getattr(processor, "image_processor", None)
        own, asked = OwnSizes.of(worker), any(map(sized, items))
        if own is None and asked:
            raise _no_sizes("pictures")
        return cls(worker, own, own is not None and (asked or bool(limits.max_pixels)), limits)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the image processor."""
        layout = {"input_data_format": "channels_first"} if self._takes_tensors else {}
        return layout | ({"do_resize": False} if self.explicit else {})

    @property
    def _takes_tensors(self) -> bool:
        """Whether it takes tensors, which saves a copy; others know Pillow's images alone."""
        return type(self.processor).__module__.startswith("transformers.")

    def target(self, size: Size, item: Mapping[str, Any]) -> Size:
        """Height and width at which the processor gets a picture."""
        most = self.limits.max_pixels
        if self.explicit and self.own is not None:
            return picture_size(size, item, self.own, most)
        return size if most is None or size[0] * size[1] <= most else fitted(size, 1, 0, most)

    def read(self, item: Mapping[str, Any], sample: Sample) -> Any:
        picture = read_picture(located(item["image"], sample))
        height, width = self.target((picture.height, picture.width), item)
        if (width, height) != picture.size:
            picture = picture.resize((width, height))
        if not self._takes_tensors:
            return picture
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()

    def pixel_bytes(self, size: Size, item: Mapping[str, Any]) -> int:
        target, patches = self.target(size, item), None
        if not self.explicit:
            patches = _told(self.processor, "get_number_of_image_patches", *target)
        return _encoded_bytes(self.processor, target, 1, patches)


@dataclass(frozen=True)
class _Clips:
    """Reader of a sample's clips; see :class:`_Pictures`."""

    processor: Any
    factor: int
    explicit: bool
    limits: Limits

    @classmethod
    def of(cls, items: Sequence[Mapping[str, Any]], processor: Any, limits: Limits) -> _Clips:
        worker = getattr(processor, "video_processor", None)
        own, asked = OwnSizes.of(worker), [sized(item) for item in items]
        if own is None and any(asked):
            raise _no_sizes("clips")
        if any(asked) and not all(asked):
            raise DataError(
                "some clips of a sample say their size and others do not",
                remedy="give max_pixels or another size to all clips of the sample, or to none",
            )
        return cls(worker, own.factor if own else 1, all(asked), limits)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the video processor."""
        return {"do_resize": False} if self.explicit else {}

    @property
    def _together(self) -> int:
        """Frames that become one."""
        return int(getattr(self.processor, "temporal_patch_size", 1) or 1)

    def target(self, size: Size, frames: int, item: Mapping[str, Any]) -> Size:
        """Height and width at which the processor gets a clip's frames."""
        most = self.limits.max_pixels
        if self.explicit:
            listed = isinstance(item["video"], list)
            return frame_size(size, frames, item, self.factor, pictures=listed, max_pixels=most)
        if most is None or size[0] * size[1] <= most:
            return size
        return fitted(size, self.factor, 0, most)

    def read(self, item: Mapping[str, Any], sample: Sample) -> Clip:
        def scaling(size: Size, frames: int) -> Size:
            return self.target(size, frames, item)

        file, sampling = item["video"], self.limits.sampling
        if isinstance(file, list):
            frames = [located(frame, sample) for frame in file]
            clip = read_frames(frames, item, sampling, scaling)
        else:
            clip = read_video(sample.folder / file, sampling, item, scaling)
        return clip.lengthened(self._together)

    def outline(self, item: Mapping[str, Any], sample: Sample) -> Outline:
        """Size and number of the frames that will be held."""
        file, sampling = item["video"], self.limits.sampling
        if isinstance(file, list):
            width, height = header_size(located(file[0], sample))
            frames = min(len(file), sampling.limit or len(file))
            found = Outline((height, width), frames)
        else:
            found = outline_video(sample.folder / file, item, sampling)
        if not all(found.size):
            return found
        return Outline(self.target(found.size, found.frames, item), found.frames)

    def pixel_bytes(self, outline: Outline, item: Mapping[str, Any]) -> int:
        patches, frames = None, max(outline.frames, self._together)
        if not self.explicit and all(outline.size):
            patches = _told(self.processor, "get_num_of_video_patches", frames, *outline.size)
        return _encoded_bytes(self.processor, outline.size, frames, patches)


def _told(processor: Any, name: str, *sizes: int) -> int | None:
    """Number of patches that a processor makes of something; None where it does not say."""
    count = getattr(processor, name, None)
    try:
        return None if count is None else int(count(*sizes, {}))
    # What displeases it is told when it is at work.
    except Exception:
        return None


def _encoded_bytes(processor: Any, size: Size, frames: int, patches: int | None) -> int:
    """Bytes of what a processor makes of a picture or a clip.

    Args:
        processor: The image or video processor.
        size: Height and width.
        frames: Number of frames.
        patches: Number of patches where the processor tells it.
    """
    together = int(getattr(processor, "temporal_patch_size", 1) or 1)
    area = _patch_area(processor)
    if patches is None or area is None:
        pixels = size[0] * size[1] * math.ceil(frames / together)
    else:
        pixels = int(patches) * area
    return pixels * together * _CHANNELS * _FLOAT32


def _heard_bytes(processor: Any, seconds: float) -> int:
    """Bytes of the spectrum that a processor makes of a sound; most make one of a fixed length."""
    ears = processor.feature_extractor
    hop, bands = getattr(ears, "hop_length", 1), getattr(ears, "feature_size", 1)
    frames = getattr(ears, "nb_max_frames", None) or seconds * ears.sampling_rate / hop
    return int(frames) * int(bands) * _FLOAT32


def _patch_area(processor: Any) -> int | None:
    """Pixels of what a processor counts: a patch, or a crop as large as the model's input."""
    side, size = getattr(processor, "patch_size", None), getattr(processor, "size", None)
    if isinstance(side, int):
        return side**2
    height, width = (getattr(size, name, None) for name in ("height", "width"))
    return height * width if isinstance(height, int) and isinstance(width, int) else None


def _no_sizes(what: str) -> DataError:
    return DataError(
        f"items ask for sizes, and this model's processor does not scale {what} by their number of "
        "pixels",
        remedy="leave out min_pixels, max_pixels, resized_height and resized_width",
    )
