"""Pictures from files: of known formats, of a size known before they are decoded, upright, in RGB.

Pillow knows some forty formats, and starts other programs for a few of them. Only what models are
fed is opened, through :mod:`prismquant.opening`, and the size in a file's header says how much
memory the picture takes before a pixel of it is made.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from prismquant.errors import DataError
from prismquant.opening import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Pillow refuses larger ones by itself, unless it is told not to.
MAX_PIXELS = 178_956_970
# While a picture is read, for each of its pixels: four in Pillow's image, and as many in a copy of
# it when it is turned upright, freed of transparency, or handed over.
DECODING_BYTES = 10
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa")
# Orientations of EXIF that exchange width and height.
_QUARTER_TURNS = (5, 6, 7, 8)


@dataclass(frozen=True)
class EmbeddedPicture:
    """A picture that a dataset holds as the bytes of its file.

    Attributes:
        data: The file.
        name: Its name in the dataset, if that tells one.
    """

    data: bytes = field(repr=False)
    name: str = ""


Source = Path | Image.Image | EmbeddedPicture


def read_picture(source: Source) -> Image.Image:
    """The picture in RGB, turned upright as its EXIF data say, on white where it is transparent.

    Raises:
        DataError: The file is missing, of no known format, too large, or no whole picture.
    """
    if isinstance(source, Image.Image):
        return _rgb(ImageOps.exif_transpose(source))
    with _opened(source) as picture:
        # Before anything is loaded: some versions of Pillow cannot read tags after that.
        ImageOps.exif_transpose(picture, in_place=True)
        picture.load()
        return _rgb(picture)


def header_size(source: Source) -> tuple[int, int]:
    """Width and height as they are stored, from the header; the picture may lie on its side.

    Raises:
        DataError: The file is missing, of no known format, or too large.
    """
    if isinstance(source, Image.Image):
        return source.size
    with _opened(source) as picture:
        return picture.size


def check_picture(source: Source, most_bytes: int | None = None) -> tuple[int, int]:
    """Make sure that a picture is whole, as headers alone do not show that it was cut off.

    Args:
        source: The picture.
        most_bytes: Memory that reading it may take.

    Returns:
        Its width and height when it is upright.

    Raises:
        DataError: The file is missing, of no known format, too large, or no whole picture.
    """
    if isinstance(source, Image.Image):
        return _upright(source.size, source)
    with _opened(source) as picture:
        width, height = picture.size
        needed = width * height * DECODING_BYTES
        require_room(f"picture {_named(source)}", needed, most_bytes, (width, height))
        size = _upright((width, height), picture)
        # Of a JPEG all is read, but only an eighth of the pixels on each side is made.
        picture.draft(None, (1, 1))
        picture.load()
        return size


def require_room(what: str, needed: int, most_bytes: int | None, size: tuple[int, int]) -> None:
    """Refuse what takes more memory than there is.

    Args:
        what: A picture or a clip.
        needed: Bytes that it takes.
        most_bytes: Bytes that there are; None: they are not counted.
        size: Its width and height, for the message.

    Raises:
        DataError: It takes more.
    """
    if most_bytes is not None and needed > most_bytes:
        raise DataError(
            f"{what} of {size[0]} x {size[1]} pixels takes {needed / 2**20:.0f} MiB to read, and "
            f"{max(most_bytes, 0) / 2**20:.0f} MiB are left",
            remedy="scale the file down, or allow more with --memory-budget",
        )


@contextlib.contextmanager
def _opened(source: Path | EmbeddedPicture) -> Iterator[Image.Image]:
    path = _named(source)
    try:
        with _file(source) as file, Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield picture
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"picture {path} is missing") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"picture {path} is of no format that is read",
            remedy=f"convert it to one of {', '.join(FORMATS)}",
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"picture {path} has more than {MAX_PIXELS:,} pixels", remedy="scale the file down"
        ) from error
    # Broken files make PIL raise nearly anything: OSError, SyntaxError (PNG), ValueError,
    # struct.error.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"picture {path} cannot be read: {reason}") from error


def _file(source: Path | EmbeddedPicture) -> BinaryIO:
    return BytesIO(source.data) if isinstance(source, EmbeddedPicture) else open_regular(source)


def _named(source: Path | EmbeddedPicture) -> str:
    return (source.name or "in the row") if isinstance(source, EmbeddedPicture) else str(source)


def _upright(size: tuple[int, int], picture: Image.Image) -> tuple[int, int]:
    turned = picture.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS
    return size[::-1] if turned else size


def _rgb(picture: Image.Image) -> Image.Image:
    """The picture in RGB, eight bits a channel.

    White lies behind what is transparent, as in the processors of transformers and in vLLM.
    """
    if picture.mode.startswith("I"):
        return _eight_bits(picture).convert("RGB")
    if picture.mode not in _TRANSPARENT and "transparency" not in picture.info:
        return picture.convert("RGB") if picture.mode != "RGB" else picture
    above = picture.convert("RGBA")
    white = Image.new("RGB", above.size, "white")
    white.paste(above, mask=above.getchannel("A"))
    return white


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of more bits; Pillow's own conversion cuts off whatever is above 255."""
    values = np.asarray(picture)
    # Versions of Pillow differ in which mode a file of 16 bits gets.
    if picture.mode.startswith("I;16") or values.max(initial=0) > 255:
        grey = values.clip(0, 65535) >> 8
    else:
        grey = values.clip(0, 255)
    clear = values == picture.info.get("transparency", -1)
    return Image.fromarray(np.where(clear, 255, grey).astype(np.uint8))
