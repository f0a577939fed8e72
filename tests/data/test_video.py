"""Clips: the right frames, upright, of files that hold their own data."""

from __future__ import annotations

import os
import struct
import sys
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_data import save_picture, save_video, turns, write_lines

from prismquant.data import read_samples, video
from prismquant.data.frame_sampling import Sampling, asked_frames, choose_frames
from prismquant.data.video import Clip, Outline, outline_video, probe_video, read_frames, read_video
from prismquant.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT = Sampling()


@given(
    total=st.integers(1, 5000),
    rate=st.floats(1.0, 120.0),
    fps=st.floats(0.1, 30.0),
    least=st.integers(1, 8),
    room=st.integers(0, 60),
)
def test_chosen_frames_are_spread_evenly(
    total: int, rate: float, fps: float, least: int, room: int
) -> None:
    sampling = Sampling(fps, least, least + room)
    chosen = choose_frames(total, rate, sampling)
    assert min(total, least) <= len(chosen) <= min(total, least + room)
    assert chosen[0] == 0
    assert chosen[-1] <= total - 1
    gaps = np.diff(chosen)
    if len(chosen) > 1:
        assert chosen[-1] == total - 1
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1


def test_frames_of_a_video_file_are_the_right_ones(tmp_path: Path) -> None:
    clip = read_video(save_video(tmp_path / "a.mp4"), DEFAULT)
    assert clip.indices == choose_frames(20, 10.0, DEFAULT)
    assert (clip.fps, clip.total, clip.frames.shape) == (10.0, 20, (4, 16, 32, 3))
    shades = clip.frames.astype(float).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(shades, [10 * index for index in clip.indices], atol=6)
    assert outline_video(tmp_path / "a.mp4", {}, DEFAULT) == Outline((16, 32), 4)


def test_video_files_without_pyav_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_video(tmp_path / "a.mp4")
    lines = [turns([{"type": "video", "video": "a.mp4"}])]
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"prismquant\[video\]"):
        read_samples(write_lines(tmp_path / "data.jsonl", lines))


def test_a_clip_is_lengthened_with_its_last_frame() -> None:
    clip = Clip(np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3), (0,), 2.0, 1)
    longer = clip.lengthened(2)
    assert longer.indices == (0, 0)
    np.testing.assert_array_equal(longer.frames[0], longer.frames[1])
    assert clip.lengthened(1) is clip


@pytest.mark.parametrize("values", [(0.0, 1, 1), (1.0, 0, 1), (1.0, 3, 2)])
def test_impossible_samplings_are_refused(values: tuple[float, int, int]) -> None:
    with pytest.raises(DataError, match="cannot be sampled"):
        Sampling(*values)


# Options of items. Expected: qwen-vl-utils 0.0.14 (calculate_video_frame_range, smart_nframes, and
# an even grid from the first frame to the last), of a clip with so many frames at such a rate.


@pytest.mark.parametrize(
    ("total", "rate", "options", "expected"),
    [
        (60, 10.0, {"fps": 1.0}, (0, 12, 24, 35, 47, 59)),
        (60, 10.0, {"fps": 0.1}, (0, 20, 39, 59)),
        (60, 10.0, {"nframes": 6}, (0, 12, 24, 35, 47, 59)),
        (60, 10.0, {"nframes": 5}, (0, 20, 39, 59)),
        (60, 10.0, {"max_frames": 4}, (0, 20, 39, 59)),
        (60, 10.0, {"min_frames": 13, "fps": 0.5}, tuple(round(59 * n / 13) for n in range(14))),
        (60, 10.0, {"video_start": 0.5, "video_end": 1.5}, (5, 8, 12, 15)),
        (60, 10.0, {"video_start": 4.93, "nframes": 2}, (50, 59)),
        (900, 30.0, {"fps": 2.0}, tuple(round(899 * n / 59) for n in range(60))),
        (7, 25.0, {"fps": 2.0}, (0, 2, 4, 6)),
        (3, 25.0, {"fps": 2.0}, (0, 2)),
        (9000, 30.0, {"fps": 4.0}, tuple(round(8999 * n / 767) for n in range(768))),
    ],
)
def test_frames_are_those_that_an_item_asks_for(
    total: int, rate: float, options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert asked_frames(total, rate, options, DEFAULT) == expected


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"nframes": 62}, "62 frames .* of a clip that has 60"),
        ({"video_start": 7.0}, "no frames between 6 and 6 s of a clip of 6 s"),
        ({"video_start": 2.0, "video_end": 2.05}, "no frames between 2 and 2.05 s"),
    ],
)
def test_frames_that_are_not_there_are_refused(options: dict[str, Any], finding: str) -> None:
    with pytest.raises(DataError, match=finding):
        asked_frames(60, 10.0, options, DEFAULT)


@given(st.integers(1, 3000), st.integers(1, 70), st.sampled_from([{}, {"fps": 3.0}]))
def test_the_limit_holds_for_every_clip(total: int, limit: int, options: dict[str, Any]) -> None:
    sampling = Sampling.limited(limit)
    chosen = asked_frames(total, 24.0, options, sampling)
    assert 1 <= len(chosen) <= limit
    assert len(choose_frames(total, 24.0, sampling)) <= limit
    assert Sampling.limited(None) == DEFAULT


def test_lists_of_frames_are_kept_whole_but_for_the_limit(tmp_path: Path) -> None:
    files = [save_picture(tmp_path / f"{number}.png", seed=number) for number in range(7)]
    whole = read_frames(files, {"fps": 5.0}, DEFAULT)
    assert (whole.indices, whole.fps, whole.total) == (tuple(range(7)), 5.0, 7)
    few = read_frames(files, {}, Sampling.limited(3))
    assert (few.indices, few.fps, few.total) == ((0, 3, 6), 2.0, 7)
    np.testing.assert_array_equal(few.frames, whole.frames[[0, 3, 6]])
    np.testing.assert_array_equal(few.frames[1], np.asarray(Image.open(files[3])))


def test_frames_are_scaled_as_they_come(tmp_path: Path) -> None:
    def half(size: tuple[int, int], frames: int) -> tuple[int, int]:
        assert frames == 4
        return size[0] // 2, size[1] // 2

    path = save_video(tmp_path / "a.mp4")
    whole, scaled = read_video(path, DEFAULT), read_video(path, DEFAULT, scaling=half)
    assert scaled.frames.shape == (4, 8, 16, 3)
    np.testing.assert_allclose(scaled.frames[2], whole.frames[2][::2, ::2], atol=3)


def test_frames_of_different_sizes_are_refused(tmp_path: Path) -> None:
    files = [save_picture(tmp_path / "a.png"), save_picture(tmp_path / "b.png", size=(40, 30))]
    with pytest.raises(DataError, match="differ in size: 24x16, 40x30"):
        read_frames(files, {}, DEFAULT)


# Display matrices: what ffmpeg and players do with them (a quarter turn clockwise: the frame's top
# is at the right).


def turned(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """A clip with a light upper left and a grey lower right quarter, and this matrix in its track.

    Args:
        path: Where it goes.
        matrix: a, b, c, d of x' = a x + c y, y' = b x + d y.
    """
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16], pixels[8:, 16:] = 250, 120
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    # ISO/IEC 14496-12, track header of version 0: the matrix follows 40 bytes after the name's.
    place = data.index(b"tkhd") + 44
    assert struct.unpack(">9i", data[place : place + 36])[0] == 65536
    a, b, c, d = (int(65536 * value) for value in matrix)
    new = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:place] + new + data[place + 36 :])
    return path


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((1, 0, 0, 1), lambda frame: frame),
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
        ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
        ((0, -1, 1, 0), lambda frame: np.rot90(frame, 1)),
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
        ((1, 0, 0, -1), lambda frame: frame[::-1]),
        ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda frame: np.rot90(frame.transpose(1, 0, 2), 2)),
        ((0, 0, 0, 0), lambda frame: frame),
    ],
)
def test_clips_are_turned_upright(
    tmp_path: Path, matrix: tuple[int, int, int, int], upright: Any
) -> None:
    plain = read_video(turned(tmp_path / "plain.mp4", (1, 0, 0, 1)), DEFAULT).frames
    assert plain[0, 2, 2, 0] > 230
    assert abs(int(plain[0, 12, 28, 0]) - 120) < 10
    clip = read_video(turned(tmp_path / "turned.mp4", matrix), DEFAULT)
    np.testing.assert_array_equal(clip.frames, [upright(frame) for frame in plain])
    assert (clip.metadata["height"], clip.metadata["width"]) == clip.frames.shape[1:3]


def test_the_turn_is_the_one_that_pyav_names(tmp_path: Path) -> None:
    """PyAV counts counterclockwise, in degrees, what the frame needs to be upright."""
    path = turned(tmp_path / "a.mp4", (0, 1, -1, 0))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    if not hasattr(frame, "rotation"):
        pytest.skip("this version of PyAV does not tell")
    pixels = frame.to_ndarray(format="rgb24")
    np.testing.assert_array_equal(
        read_video(path, DEFAULT).frames[0], np.rot90(pixels, frame.rotation // 90)
    )


def test_other_turns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is turned by 30 degrees"):
        read_video(turned(tmp_path / "a.mp4", (0.866, 0.5, -0.5, 0.866)), DEFAULT)  # type: ignore[arg-type]


# Containers


def playlists(folder: Path) -> dict[str, str]:
    """Texts that name a clip which lies beside them."""
    path = folder / "other.ts"
    with av.open(str(path), "w", "mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(60):
            shade = np.full((16, 32, 3), 4 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n"
    return {
        "clip.m3u8": f"{head}{path}\n#EXT-X-ENDLIST\n",
        "clip.mp4": f"ffconcat version 1.0\nfile {path.name}\n",
        "clip.mkv": f"ffconcat version 1.0\nfile {path}\n",
        "clip.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "clip.txt": "no clip\n",
    }


def test_playlists_open_no_other_files(tmp_path: Path) -> None:
    texts = playlists(tmp_path)
    with av.open(str(tmp_path / "other.ts")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 60
    assert read_video(tmp_path / "other.ts", DEFAULT).total == 60
    for name, words in texts.items():
        (tmp_path / name).write_text(words)
        for read in (probe_video, lambda path: read_video(path, DEFAULT)):
            with pytest.raises(DataError, match="cannot be read") as caught:
                read(tmp_path / name)
            assert "playlists" in str(caught.value.remedy)
    # PyAV by itself does follow one of them.
    with av.open(str(tmp_path / "clip.m3u8")) as container:
        assert container.streams.video


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "avi", "mpg", "ts", "flv", "gif"])
def test_containers_with_their_own_data_are_opened(tmp_path: Path, suffix: str) -> None:
    codecs = {"webm": "libvpx-vp9", "mpg": "mpeg2video", "ts": "mpeg2video", "flv": "flv"}
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        codec = codecs.get(suffix, "gif" if suffix == "gif" else "mpeg4")
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 32, 16
        stream.pix_fmt = "rgb8" if suffix == "gif" else "yuv420p"
        for number in range(25):
            shade = np.full((16, 32, 3), 8 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(shade, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    clip = read_video(path, DEFAULT)
    assert clip.frames.shape == (4, 16, 32, 3)
    assert clip.frames[-1].mean() - clip.frames[0].mean() > 150


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_clips_that_are_no_regular_file_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").mkdir()
    for name, words in (("a.mp4", "named pipe"), ("b.mp4", "a folder"), ("c.mp4", "missing")):
        with pytest.raises(DataError, match=words):
            probe_video(tmp_path / name)


def test_frames_of_more_pixels_than_are_decoded_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the header says: the decoder itself is told."""
    path = save_video(tmp_path / "a.mp4", size=(64, 48))
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 // 2)
    with pytest.raises(DataError, match="cannot be decoded"):
        read_video(path, DEFAULT)
