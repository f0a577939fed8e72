"""Pictures and clips have the grid that their items ask for, else the one of the processor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_data import image, save_picture, save_video, text

from prismquant.data import Sample
from prismquant.data.batches import Batches, make_batches
from prismquant.data.media import Limits
from prismquant.data.sizes import OwnSizes, Size, fitted, frame_size, picture_size
from prismquant.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IMAGE_ID, VIDEO_ID = 5, 6

# qwen-vl-utils 0.0.14: height and width that fetch_image makes of a picture, by the side of a patch
# and the options of its item.
PICTURES: list[tuple[Size, int, dict[str, int], Size]] = [
    ((300, 400), 14, {"max_pixels": 100352}, (252, 364)),
    ((300, 400), 14, {"min_pixels": 501760}, (616, 840)),
    ((300, 400), 16, {"min_pixels": 4096, "max_pixels": 65536}, (192, 288)),
    ((2000, 3000), 14, {"max_pixels": 1003520}, (812, 1204)),
    ((50, 70), 14, {"max_pixels": 100352}, (56, 56)),
    ((300, 400), 14, {"resized_height": 280, "resized_width": 420}, (280, 420)),
    ((300, 400), 16, {"resized_height": 30, "resized_width": 500}, (32, 512)),
    ((30, 3000), 14, {"max_pixels": 150528}, (28, 2996)),
]
# The same of fetch_video: of so many frames, from a file and as a list of pictures.
CLIPS: list[tuple[Size, int, int, dict[str, int], Size, Size]] = [
    ((480, 640), 8, 14, {"max_pixels": 151200}, (336, 448), (336, 448)),
    ((480, 640), 8, 14, {"min_pixels": 313600}, (504, 672), (504, 672)),
    ((480, 640), 64, 14, {"total_pixels": 20070400}, (476, 644), (504, 616)),
    ((480, 640), 64, 16, {"total_pixels": 10240000, "min_pixels": 16384}, (480, 640), (480, 608)),
    (
        (1080, 1920),
        120,
        14,
        {"total_pixels": 90316800, "max_pixels": 602112},
        (560, 1008),
        (560, 1008),
    ),
    ((480, 640), 4, 14, {"resized_height": 280, "resized_width": 420}, (280, 420), (280, 420)),
    ((480, 640), 7, 14, {"max_pixels": 200704, "min_pixels": 100352}, (364, 504), (336, 504)),
    ((1080, 1920), 16, 16, {"min_pixels": 131072}, (640, 1152), (640, 1152)),
]


@pytest.mark.parametrize(("size", "patch", "options", "expected"), PICTURES)
def test_pictures_have_the_size_that_qwen_vl_utils_makes(
    size: Size, patch: int, options: dict[str, int], expected: Size
) -> None:
    own = OwnSizes(2 * patch, least=1, most=2)
    assert picture_size(size, options, own) == expected


@pytest.mark.parametrize(("size", "frames", "patch", "options", "file", "listed"), CLIPS)
def test_frames_have_the_size_that_qwen_vl_utils_makes(
    size: Size, frames: int, patch: int, options: dict[str, int], file: Size, listed: Size
) -> None:
    for pictures, expected in ((False, file), (True, listed)):
        assert frame_size(size, frames, options, 2 * patch, pictures=pictures) == expected


@pytest.mark.parametrize("seed", range(3))
def test_qwen_vl_utils_agrees_where_it_is_installed(seed: int) -> None:
    """On random pictures and options; it is no dependency."""
    vision = pytest.importorskip("qwen_vl_utils.vision_process")
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(50):
        size, least = (number(30, 900), number(30, 900)), number(1, 300)
        options = {"min_pixels": least * 784, "max_pixels": (least + number(1, 300)) * 784}
        found = vision.fetch_image({"image": Image.new("RGB", size[::-1]), **options})
        own = OwnSizes(28, least=1, most=2)
        assert picture_size(size, options, own) == (found.height, found.width)


SIDES = st.integers(1, 3000)


@given(SIDES, SIDES, st.sampled_from((8, 28)), st.integers(1, 300))
def test_sizes_are_multiples_within_the_bounds(
    height: int, width: int, factor: int, tokens: int
) -> None:
    least, most = tokens * factor**2, (8 * tokens + 64) * factor**2
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(DataError, match="more than 200 times"):
            fitted((height, width), factor, least, most)
        return
    found = fitted((height, width), factor, least, most)
    assert all(side % factor == 0 and side >= factor for side in found)
    # No picture is thinner than one patch, whatever the bound.
    assert found[0] * found[1] <= most or min(found) == factor
    assert found[0] * found[1] >= least
    if least <= height * width <= most and min(height, width) >= 8 * factor:
        assert abs(found[0] / found[1] * width / height - 1) < 0.2


@given(SIDES, SIDES)
def test_without_options_the_size_is_the_processors_own(
    processors: Callable[[str], Any], height: int, width: int
) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    for family in ("qwen2_vl", "video_llama_3"):
        worker = processors(family).image_processor
        own = OwnSizes.of(worker)
        assert own is not None
        found = picture_size((height, width), {}, own)
        patches = worker.get_number_of_image_patches(height, width, {})
        assert (found[0] // worker.patch_size) * (found[1] // worker.patch_size) == patches


def test_a_height_without_a_width_is_refused() -> None:
    with pytest.raises(DataError, match="need one another"):
        picture_size((300, 400), {"resized_height": 100}, OwnSizes(28, 1, 10**6))


# Through the processors. Patches are 4 pixels wide in the tiny models, and merged two by two.


def sample(folder: Path, *items: dict[str, Any]) -> Sample:
    kind = "video" if any(item["type"] == "video" for item in items) else "image"
    content = [*items, text("what ?")]
    return Sample("s", kind, ({"role": "user", "content": content},), folder, {})  # type: ignore[arg-type]


def made(processor: Any, one: Sample, **limits: int) -> Batches:
    ids = (IMAGE_ID, VIDEO_ID)
    return make_batches(
        [one], processor, batch_size=1, vision_token_ids=ids, limits=Limits(**limits)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 160 x 120, four of 48 x 32, and a clip of 60 frames of 64 x 32, ten a second."""
    path = tmp_path_factory.mktemp("media")
    save_picture(path / "a.png", size=(160, 120))
    for number in range(4):
        save_picture(path / f"{number}.png", size=(48, 32), seed=number)
    save_video(path / "a.mp4", frames=60, size=(64, 32))
    return path


@pytest.mark.parametrize(
    ("options", "limits", "expected"),
    [
        ({}, {}, (120, 160)),
        ({"max_pixels": 6400}, {}, (64, 88)),
        ({"min_pixels": 40000}, {}, (176, 232)),
        ({"resized_height": 80, "resized_width": 40}, {}, (80, 40)),
        ({}, {"max_pixels": 3000}, (40, 56)),
        ({"min_pixels": 40000}, {"max_pixels": 3000}, (40, 56)),
        ({"resized_height": 80, "resized_width": 40}, {"max_pixels": 3000}, (72, 32)),
        ({}, {"max_pixels": 10**6}, (120, 160)),
    ],
)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_picture_has_the_grid_that_is_asked_for(
    processors: Callable[[str], Any],
    folder: Path,
    family: str,
    options: dict[str, int],
    limits: dict[str, int],
    expected: Size,
) -> None:
    batches = made(processors(family), sample(folder, image("a.png") | options), **limits)
    batch = batches[0]
    assert batch.inputs["image_grid_thw"].tolist() == [[1, expected[0] // 4, expected[1] // 4]]
    # What it takes is known before.
    assert batches.cost(0).pixels == batch.pixel_bytes
    assert batches.cost(0).peak > batch.pixel_bytes


def test_a_picture_without_options_keeps_its_own_beside_one_with(
    processors: Callable[[str], Any], folder: Path
) -> None:
    first, second = image("a.png"), image("0.png") | {"max_pixels": 300}
    batch = made(processors("qwen2_vl"), sample(folder, first, second))[0]
    assert batch.inputs["image_grid_thw"].tolist() == [[1, 30, 40], [1, 2, 4]]
    alone = made(processors("qwen2_vl"), sample(folder, first))[0]
    # The picture needs no scaling, so that its pixels are the same as well.
    assert torch.equal(alone.inputs["pixel_values"], batch.inputs["pixel_values"][:1200])


@pytest.mark.parametrize(
    ("options", "limits", "expected"),
    [
        ({}, {}, (12, 32, 64)),
        ({"nframes": 6}, {}, (6, 32, 64)),
        ({"max_frames": 4}, {}, (4, 32, 64)),
        ({"max_pixels": 512}, {}, (12, 16, 32)),
        ({"total_pixels": 512 * 6, "min_pixels": 64}, {}, (12, 16, 32)),
        ({"video_start": 0.5, "video_end": 1.5}, {}, (4, 32, 64)),
        ({"fps": 1.0, "resized_height": 16, "resized_width": 16}, {}, (6, 16, 16)),
        ({}, {"max_frames": 4, "max_pixels": 600}, (4, 16, 32)),
        ({"nframes": 20}, {"max_frames": 4}, (4, 32, 64)),
    ],
)
def test_a_clip_has_the_grid_that_is_asked_for(
    processor: Any,
    folder: Path,
    options: dict[str, Any],
    limits: dict[str, int],
    expected: tuple[int, int, int],
) -> None:
    """Of every family, each with its own bounds by default."""
    item = {"type": "video", "video": "a.mp4"} | options
    batches = made(processor, sample(folder, item), **limits)
    frames, height, width = expected
    together = processor.video_processor.temporal_patch_size
    grid = batches[0].inputs["video_grid_thw"].tolist()
    assert grid == [[frames // together, height // 4, width // 4]]
    assert batches.cost(0).pixels == batches[0].pixel_bytes


def test_a_list_of_frames_is_scaled_too(processors: Callable[[str], Any], folder: Path) -> None:
    item = {"type": "video", "video": [f"{n}.png" for n in range(4)], "max_pixels": 512}
    batch = made(processors("qwen2_vl"), sample(folder, item))[0]
    assert batch.inputs["video_grid_thw"].tolist() == [[2, 4, 4]]


def test_clips_of_a_sample_say_their_size_all_or_none(
    processors: Callable[[str], Any], folder: Path
) -> None:
    clip = {"type": "video", "video": "a.mp4"}
    with pytest.raises(DataError, match="some clips of a sample say their size") as caught:
        made(processors("qwen2_vl"), sample(folder, clip, clip | {"max_pixels": 512}))[0]
    assert caught.value.where == "sample s"


def test_options_need_a_processor_that_counts_pixels(folder: Path) -> None:
    fixed = SimpleNamespace(size={"height": 336, "width": 336}, patch_size=14)
    processor = SimpleNamespace(image_processor=fixed, video_processor=fixed)
    for item in (image("a.png"), {"type": "video", "video": "a.mp4"}):
        batches = made(processor, sample(folder, item | {"max_pixels": 512}))  # type: ignore[operator]
        with pytest.raises(DataError, match="does not scale"):
            batches.cost(0)
