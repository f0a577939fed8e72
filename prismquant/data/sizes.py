"""Sizes of pictures and frames that items of the data ask for, as ``qwen-vl-utils`` reads them.

Data that were made for Qwen's models say for a picture how many pixels it may have. Their own tool
scales it before the processor sees it, by rules of its own; those rules are here, so that the same
data give the same grid of patches. Sizes are (height, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prismquant.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

Size = tuple[int, int]

SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width", "total_pixels")
_STEEPEST = 200
# Least and most tokens of a picture and of a frame, and those of a clip, where the item is silent.
_PICTURE = (4, 16384)
_FRAME = (128, 768)
_CLIP = 0.9 * 128_000
# Frames that become one in time.
_PAIR = 2


@dataclass(frozen=True)
class OwnSizes:
    """Scaling of pictures by a processor.

    Attributes:
        factor: Sides are multiples of this many pixels.
        least, most: Pixels of a picture.
    """

    factor: int
    least: int
    most: int

    @classmethod
    def of(cls, processor: Any) -> OwnSizes | None:
        """Sizes of an image or video processor; None where it does not go by numbers of pixels."""
        try:
            sides = processor.patch_size, processor.merge_size
            area = processor.size["shortest_edge"], processor.size["longest_edge"]
        except (AttributeError, KeyError, TypeError):
            return None
        if not all(isinstance(number, int) for number in (*sides, *area)):
            return None
        return cls(sides[0] * sides[1], *area)


def sized(options: Mapping[str, Any]) -> bool:
    """Whether an item says anything of its size."""
    return any(key in options for key in SIZE_KEYS)


def fitted(size: Size, factor: int, least: float, most: float, *, thin: bool = False) -> Size:
    """The size nearest to this one, of about its shape, that a processor can cut into patches.

    Args:
        size: Height and width.
        factor: Sides become multiples of it.
        least, most: How many pixels there may be.
        thin: Whether a picture thinner than half of ``factor`` counts as one without pixels, which
            is then enlarged, as the processors of transformers do; else that side alone is.

    Raises:
        DataError: One side is more than two hundred times the other.
    """
    if max(size) > _STEEPEST * min(size):
        raise DataError(
            f"{size[1]} x {size[0]} pixels: one side is more than {_STEEPEST} times the other",
            remedy="crop the picture",
        )
    smallest, pixels = 0 if thin else factor, size[0] * size[1]
    height, width = (max(smallest, round(side / factor) * factor) for side in size)
    if height * width > most:
        shrink = math.sqrt(pixels / most)
        height, width = (max(factor, math.floor(side / shrink / factor) * factor) for side in size)
    elif height * width < least:
        grow = math.sqrt(least / pixels)
        height, width = (math.ceil(side * grow / factor) * factor for side in size)
    return height, width


def picture_size(
    size: Size, options: Mapping[str, Any], own: OwnSizes, max_pixels: int | None = None
) -> Size:
    """The size of a picture as the model sees it.

    Args:
        size: Height and width of the picture.
        options: Of its item.
        own: How the processor scales pictures without options.
        max_pixels: More it must not have, whatever the item and the processor say.
    """
    if not sized(options):
        return fitted(size, own.factor, *_limited(own.least, own.most, max_pixels), thin=True)
    bounds: tuple[float, float] = (_PICTURE[0] * own.factor**2, _PICTURE[1] * own.factor**2)
    if (resized := _resized(options)) is not None:
        return fitted(resized, own.factor, *_limited(*bounds, max_pixels))
    return fitted(size, own.factor, *_limited(*_asked(options, *bounds), max_pixels))


def frame_size(
    size: Size,
    frames: int,
    options: Mapping[str, Any],
    factor: int,
    *,
    pictures: bool,
    max_pixels: int | None = None,
) -> Size:
    """The size of a clip's frames as the model sees them, where its item has options.

    Args:
        size: Height and width of the frames.
        frames: How many there are.
        options: Of its item.
        factor: Sides become multiples of it.
        pictures: Whether the clip is a list of pictures.
        max_pixels: More a frame must not have, whatever the item says.
    """
    frames += frames % _PAIR
    area = factor**2
    if (resized := _resized(options)) is not None:
        bounds: tuple[float, float] = (_PICTURE[0] * area, _PICTURE[1] * area)
        return fitted(resized, factor, *_limited(*bounds, max_pixels))
    if pictures:
        # Each picture is first scaled by itself, to multiples of twice the side.
        bounds = _asked(options, *(tokens * 4 * area for tokens in _PICTURE))
        size = fitted(size, 2 * factor, *bounds)
    least = options.get("min_pixels", _FRAME[0] * area)
    share = options.get("total_pixels", _CLIP * area) / frames * _PAIR
    most = max(min(_FRAME[1] * area, share), int(least * 1.05))
    bounds = _asked(options, least, most, most)
    return fitted(size, factor, *_limited(*bounds, max_pixels))


def _asked(
    options: Mapping[str, Any], least: float, most: float, cap: float = math.inf
) -> tuple[float, float]:
    """Bounds as the item gives them; one that it does not give makes room for the other."""
    if "min_pixels" in options and "max_pixels" not in options:
        most = max(options["min_pixels"], most)
    most = min(options.get("max_pixels", most), cap)
    if "min_pixels" in options:
        return options["min_pixels"], most
    return _limited(least, most, None)


def _limited(least: float, most: float, max_pixels: int | None) -> tuple[float, float]:
    """Bounds of which the upper one holds, if need be for any small picture."""
    most = most if max_pixels is None else min(most, max_pixels)
    return (least if least <= most else 0), most


def _resized(options: Mapping[str, Any]) -> Size | None:
    asked = [options.get(key) for key in ("resized_height", "resized_width")]
    if None not in asked:
        return asked[0], asked[1]  # type: ignore[return-value]
    if asked != [None, None]:
        raise DataError("resized_height and resized_width need one another", remedy="give both")
    return None
