"""Pictures: of known formats alone, of a size known before, upright, on white where transparent."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from prismquant.data import pictures
from prismquant.data.pictures import (
    DECODING_BYTES,
    EmbeddedPicture,
    check_picture,
    header_size,
    read_picture,
)
from prismquant.errors import DataError
from prismquant.models.config import import_transformers

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

RNG = np.random.default_rng(0)
SEEING = RNG.integers(0, 256, (40, 60, 4), dtype=np.uint8)


def composited(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """On white, in double precision."""
    alpha = pixels[..., 3:] / 255
    return np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def palette(seed: int = 0) -> Image.Image:
    """Half of its colours are transparent to different degrees."""
    generator = np.random.default_rng(seed)
    picture = Image.fromarray(generator.integers(0, 8, (40, 60), dtype=np.uint8), "L").convert("P")
    picture.putpalette(generator.integers(0, 256, 24, dtype=np.uint8).tobytes())
    picture.info["transparency"] = bytes([0, 60, 130, 255, 255, 255, 10, 255])
    return picture


def transparent(mode: str) -> Image.Image:
    if mode == "P":
        return palette()
    if mode == "L with a clear value":
        picture = Image.fromarray(SEEING[..., 0])
        picture.info["transparency"] = int(SEEING[0, 0, 0])
        return picture
    whole = Image.fromarray(SEEING)
    return whole if mode == "RGBA" else whole.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L with a clear value"])
@pytest.mark.parametrize("where", ["file", "bytes", "memory"])
def test_white_lies_behind_what_is_transparent(tmp_path: Path, mode: str, where: str) -> None:
    """As in double precision, and as the processors of transformers do it."""
    picture = transparent(mode)
    picture.save(tmp_path / "a.png", transparency=picture.info.get("transparency"))
    with Image.open(tmp_path / "a.png") as saved:
        expected = composited(np.asarray(saved.convert("RGBA")))
        source: Any = tmp_path / "a.png"
        if where == "bytes":
            source = EmbeddedPicture(source.read_bytes())
        elif where == "memory":
            source = saved
        found = read_picture(source)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), expected)
        import_transformers()
        from transformers.image_transforms import convert_to_rgb

        # Older versions show what lies under the transparency.
        if np.asarray(convert_to_rgb(Image.new("RGBA", (1, 1))))[0, 0, 0] == 255:
            np.testing.assert_array_equal(np.asarray(convert_to_rgb(saved)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "RGB", "P"])
def test_other_modes_are_converted_as_pillow_does(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(SEEING[..., :3]).convert(mode)
    picture.save(tmp_path / "a.tiff")
    with Image.open(tmp_path / "a.tiff") as saved:
        expected = np.asarray(saved.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "a.tiff")), expected)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_become_eight(tmp_path: Path, suffix: str) -> None:
    """The upper eight; Pillow's own conversion makes nearly all of them white."""
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    found = np.asarray(read_picture(tmp_path / f"a.{suffix}"))
    np.testing.assert_array_equal(found, np.repeat((values >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    """Every way in which cameras store a picture; and the size is told without decoding it."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8], upright[8:, 16:] = 250, 120
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "a.png")), upright)
    assert check_picture(tmp_path / "a.png") == (24, 16)
    assert header_size(tmp_path / "a.png") == stored.shape[1::-1]
    with Image.open(tmp_path / "a.png") as lazily:
        np.testing.assert_array_equal(np.asarray(read_picture(lazily)), upright)


# What is opened


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.eps"])
def test_other_formats_are_refused_and_start_no_other_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    (tmp_path / name).write_bytes(POSTSCRIPT)
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for source in (tmp_path / name, EmbeddedPicture(POSTSCRIPT, name)):
        for read in (read_picture, check_picture, header_size):
            with pytest.raises(DataError, match="of no format that is read") as caught:
                read(source)
            assert "PNG, JPEG, WEBP, GIF, BMP, TIFF" in str(caught.value.remedy)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "mpo"])
def test_what_models_are_fed_is_opened(tmp_path: Path, suffix: str) -> None:
    """Whatever the file is called; cameras write several pictures into one JPEG (MPO)."""
    picture, path = Image.new("RGB", (24, 16), "red"), tmp_path / f"a.{suffix}"
    more = {"save_all": True, "append_images": [Image.new("RGB", (24, 16), "blue")]}
    picture.save(path, **(more if suffix in ("mpo", "gif", "tiff", "webp") else {}))
    path = path.rename(tmp_path / "picture")
    red, _, blue = np.asarray(read_picture(path))[4, 4]
    assert red > 240
    assert blue < 20
    assert check_picture(path) == (24, 16)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for name, words in (("a.png", "named pipe"), ("b.png", "a folder"), ("c.png", "missing")):
        for read in (read_picture, check_picture, header_size):
            with pytest.raises(DataError, match=words):
                read(tmp_path / name)


def large(path: Path, size: tuple[int, int]) -> Path:
    """A file of few bytes that unpacks to many."""
    Image.new("1", size).save(path)
    return path


def test_a_picture_is_counted_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = large(tmp_path / "a.png", (2000, 1000))
    assert path.stat().st_size < 10_000
    needed = 2_000_000 * DECODING_BYTES
    assert check_picture(path, needed) == (2000, 1000)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=r"a\.png of 2000 x 1000 pixels takes 19 MiB") as caught:
        check_picture(path, needed - 1)
    assert "--memory-budget" in str(caught.value.remedy)
    with pytest.raises(DataError, match="in the row of 2000 x 1000"):
        check_picture(EmbeddedPicture(path.read_bytes()), needed - 1)


def test_a_picture_of_too_many_pixels_is_refused_whatever_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = large(tmp_path / "a.png", (400, 300))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 400 * 300)
    assert check_picture(path) == (400, 300)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 400 * 300 - 1)
    for read in (read_picture, check_picture, header_size):
        with pytest.raises(DataError, match="more than 119,999 pixels"):
            read(path)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
@pytest.mark.parametrize("lost", [0.02, 0.5, 0.9])
def test_the_quick_check_finds_what_reading_would(
    tmp_path: Path, options: dict[str, bool], lost: float
) -> None:
    """A JPEG is checked at an eighth of its sides, but to its last byte."""
    path = tmp_path / "a.jpg"
    Image.fromarray(RNG.integers(0, 256, (100, 164, 3), dtype=np.uint8)).save(path, **options)
    assert check_picture(path) == read_picture(path).size == (164, 100)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * (1 - lost))])
    for read in (read_picture, check_picture):
        with pytest.raises(DataError, match="truncated"):
            read(path)
