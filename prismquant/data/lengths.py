"""Lengths of samples, estimated before anything is tokenized, and batches cut by them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from prismquant.data import Sample, located, media_of, text_of
from prismquant.data.media import Limits
from prismquant.data.pictures import Source, header_size
from prismquant.errors import DataError


def by_length(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of similar length next to one another, so that batches waste less on padding.

    The order follows from the samples alone. Lengths are estimated from texts and picture sizes.

    Raises:
        DataError: A file cannot be found.
    """
    return sorted(samples, key=_length_estimate)


def even_parts(
    samples: Sequence[Sample], most_tokens: int | None, limits: Limits
) -> Iterator[Sequence[Sample]]:
    """Samples of a batch in even parts; how many follows from these samples alone."""
    count = 1
    if most_tokens is not None:
        tokens = sum(_length_estimate(sample, limits.max_pixels) for sample in samples)
        count = min(max(math.ceil(tokens / most_tokens), 1), len(samples))
    for number in range(count):
        yield samples[len(samples) * number // count : len(samples) * (number + 1) // count]


def _length_estimate(sample: Sample, max_pixels: int | None = None) -> float:
    """Roughly the tokens of a sample: four characters, or 28 x 28 pixels, each."""
    if sample.window is not None:
        return len(sample.window.tokens)
    tokens = sum(len(text_of(message)) for message in sample.messages) / 4
    for kind, item in media_of(sample):
        file = item[kind]
        frames = file if isinstance(file, list) else [file]
        if kind == "image" or isinstance(file, list):
            pixels = _stored_pixels(located(frames[0], sample))
        else:
            pixels = 640 * 480
        asked = item.get("resized_height", 0) * item.get("resized_width", 0)
        most = min(item.get("max_pixels", pixels), max_pixels or pixels)
        tokens += min(asked or pixels, most) / 28**2 * len(frames)
    return tokens


def _stored_pixels(source: Source) -> int:
    try:
        width, height = header_size(source)
    except DataError:  # explained when the picture itself is read
        return 0
    return width * height
