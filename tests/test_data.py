"""Samples are read and checked completely; the masks of batches are right to the token."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import tiny_vlm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prismquant.errors import DataError
from prismquant.models.load import load_float
from prismquant.models.processor import load_processor
from prismquant.pipeline.batches import Batch, by_length, make_batches
from prismquant.pipeline.data import (
    Sample,
    balanced_subset,
    fingerprint,
    read_samples,
    require_modalities,
)
from prismquant.pipeline.media import Limits
from prismquant.pipeline.pictures import read_picture
from prismquant.pipeline.video import Clip, Sampling, choose_frames, read_video

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMAGE_ID, VIDEO_ID = 5, 6


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def turns(question: Any = "what is it ?", answer: Any = "red") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def image(file: str) -> dict[str, str]:
    return {"type": "image", "image": file}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def save_picture(path: Path, size: tuple[int, int] = (24, 16), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_video(path: Path, frames: int = 20, rate: int = 10) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(frames):
            shade = np.full((16, 32, 3), 10 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def processors(tiny: Callable[..., Path]) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in loaded:
            loaded[family] = load_processor(tiny(family))
        return loaded[family]

    return get


@pytest.fixture(scope="session")
def processor(family: str, processors: Callable[[str], Any]) -> Any:
    return processors(family)


def batches(samples: Sequence[Sample], processor: Any, batch_size: int = 8, **options: Any) -> Any:
    return make_batches(
        samples,
        processor,
        batch_size=batch_size,
        vision_token_ids=(IMAGE_ID, VIDEO_ID),
        **options,
    )


def only(samples: Sequence[Sample], processor: Any, **options: Any) -> Batch:
    (batch,) = batches(samples, processor, **options)
    return batch


def words(batch: Batch, row: int, mask: torch.Tensor, processor: Any) -> list[str]:
    ids = batch.inputs["input_ids"][row][mask[row]].tolist()
    return list(processor.tokenizer.convert_ids_to_tokens(ids))


# Reading


def test_messages_of_every_kind_are_read(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_picture(tmp_path / name)
    path = write_lines(
        tmp_path / "data.jsonl",
        [
            {"id": "t", "topic": "sum", **turns()},
            "",
            {"id": 7, "kind": "whatever", **turns([image("a.png"), text("a ?"), image("b.png")])},
            turns([image("a.png"), {"type": "video", "video": ["a.png", "b.png"], "fps": 4}]),
        ],
    )
    first, second, third = read_samples(path)
    assert [s.kind for s in (first, second, third)] == ["text", "image", "video"]
    assert (first.id, second.id, third.id) == ("t", "7", "data-4")
    assert first.meta == {"topic": "sum"}
    assert (first.type, second.type) == ("sum", "")
    assert first.answer == "red"
    assert third.messages[0]["content"][1] == {
        "type": "video",
        "video": ["a.png", "b.png"],
        "fps": 4.0,
    }


def test_llava_markers_take_their_files_in_order(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_picture(tmp_path / name)
    entries = [
        {
            "id": "two",
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": "<image>\nfirst ? <image> second ?"},
                {"from": "gpt", "value": "yes"},
            ],
        },
        {
            "id": "clip",
            "video": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": "what moves ?"},
                {"from": "gpt", "value": "no"},
            ],
        },
    ]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(entries))
    two, clip = read_samples(path)
    assert two.messages[0] == {
        "role": "user",
        "content": [image("a.png"), text("first ?"), image("b.png"), text("second ?")],
    }
    assert two.messages[1] == {"role": "assistant", "content": "yes"}
    assert clip.kind == "video"
    assert clip.messages[0]["content"][0] == {"type": "video", "video": ["a.png", "b.png"]}


def test_paragraphs_of_a_text_file_are_samples_without_answers(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text("one\ntwo\n\n\n  \nthree\n")
    samples = read_samples(path)
    assert [s.messages[0]["content"] for s in samples] == ["one\ntwo", "three"]
    assert [s.answer for s in samples] == [None, None]


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ('{"messages": [', "line 2: no valid JSON"),
        ("[1, 2]", "line 2: a sample is an object, not [1, 2]"),
        ({"caption": "x"}, "line 2: no conversation: none of 'messages', 'conversations'"),
        ({"messages": []}, "line 2: the conversation is empty"),
        ({"messages": [{"content": "x"}]}, "line 2: message 1: no role"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: no content"),
        (turns([image("gone.png")]), "gone.png is missing"),
        (turns([image("cut.png")]), "cut.png cannot be read"),
        (turns([image("https://a.b/c.png")]), "is not a local file"),
        (turns([{"type": "audio"}]), "sound is not supported"),
        (turns([{"type": "image", "image": ""}]), "a file is named by its path"),
        (turns([{"type": "video", "video": ["ok.png", "gone.png"]}]), "gone.png is missing"),
        (turns([{"type": "video", "video": ["ok.png", "big.png"]}]), "clip differ in size"),
        (turns([{"type": "video", "video": ["ok.png"], "fps": 0}]), "fps is a number from"),
        (turns([{"type": "video", "video": "ok.mp4"}]), "ok.mp4 cannot be read"),
        (turns(answer=[image("ok.png")]), "an answer that shows a picture"),
        ({"id": "first", **turns()}, "line 2: id 'first' is already taken by line 1"),
        ({"conversations": [{"value": "x"}]}, "message 1: no role"),
        ({"image": "ok.png", "conversations": [{"from": "gpt", "value": "x"}]}, "no human turn"),
        (
            {"image": "ok.png", "conversations": [{"from": "human", "value": "<image><image>"}]},
            "2 <image> markers or items without a file, but 1 image files",
        ),
    ],
)
def test_a_broken_sample_is_named_with_its_line(tmp_path: Path, line: Any, finding: str) -> None:
    save_picture(tmp_path / "ok.png")
    save_picture(tmp_path / "big.png", size=(40, 40))
    cut = save_picture(tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "ok.mp4").write_bytes(b"no video")
    path = write_lines(tmp_path / "data.jsonl", [{"id": "first", **turns()}, line])
    with pytest.raises(DataError) as caught:
        read_samples(path)
    assert finding in str(caught.value)
    assert str(path) in str(caught.value)
    assert "remedy" in str(caught.value)


def test_all_findings_come_at_once_but_no_more_than_ten(tmp_path: Path) -> None:
    lines = ["{", turns([image("gone.png")]), {"messages": 3}, turns()]
    with pytest.raises(DataError, match="3 findings") as caught:
        read_samples(write_lines(tmp_path / "few.jsonl", lines))
    assert all(f"line {number}" in caught.value.what for number in (1, 2, 3))
    lines = [turns([image(f"{number}.png")]) for number in range(40)]
    with pytest.raises(DataError, match="40 findings") as caught:
        read_samples(write_lines(tmp_path / "many.jsonl", lines))
    assert caught.value.what.count("\n") == 11
    assert caught.value.what.endswith("and 30 more")


def test_the_same_of_many_rows_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="40 findings") as caught:
        read_samples(write_lines(tmp_path / "many.jsonl", ["{"] * 40))
    assert caught.value.what.count("\n") == 1
    assert "line 1, line 2, line 3 and 37 more: no valid JSON" in caught.value.what


def test_answers_are_required_on_demand(tmp_path: Path) -> None:
    open_ended = {"messages": [{"role": "user", "content": "well ?"}]}
    path = write_lines(tmp_path / "data.jsonl", [open_ended, turns(), turns(answer="")])
    assert len(read_samples(path)) == 3
    with pytest.raises(DataError, match="2 findings") as caught:
        read_samples(path, require_answers=True)
    assert "line 1" in caught.value.what
    assert "line 3" in caught.value.what


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.txt", "./none", "/none/at/all"])
def test_a_missing_file_is_no_dataset_name(name: str) -> None:
    with pytest.raises(DataError, match="missing"):
        read_samples(name)


def test_empty_and_unknown_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no samples"):
        read_samples(tmp_path / "empty.jsonl")
    (tmp_path / "data.xml").write_text("<a/>")
    with pytest.raises(DataError, match="no kind of data file"):
        read_samples(tmp_path / "data.xml")
    (tmp_path / "odd.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_samples(tmp_path / "odd.jsonl")
    with pytest.raises(DataError, match="limit of 0"):
        read_samples(tmp_path / "empty.jsonl", limit=0)


def test_files_of_samples_outside_the_limit_need_not_exist(tmp_path: Path) -> None:
    lines = [{"id": str(n), **turns([image(f"{n}.png")])} for n in range(9)]
    path = write_lines(tmp_path / "data.jsonl", lines)
    for number in range(9):
        save_picture(tmp_path / f"{number}.png")
    chosen = [sample.id for sample in read_samples(path, limit=3, seed=1)]
    for number in range(9):
        if str(number) not in chosen:
            (tmp_path / f"{number}.png").unlink()
    assert [sample.id for sample in read_samples(path, limit=3, seed=1)] == chosen


def bare(identity: str, kind: Any) -> Sample:
    return Sample(identity, kind, ({"role": "user", "content": "x"},), Path(), {})


@given(
    st.lists(st.sampled_from(("text", "image", "video")), max_size=30),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_a_subset_is_balanced_and_keeps_its_order(kinds: list[str], limit: int, seed: int) -> None:
    samples = [bare(str(number), kind) for number, kind in enumerate(kinds)]
    subset = balanced_subset(samples, limit, seed)
    assert len(subset) == min(limit, len(samples))
    places = [int(sample.id) for sample in subset]
    assert places == sorted(places)
    taken, there = Counter(s.kind for s in subset), Counter(kinds)
    fullest = max(taken.values(), default=0)
    # A kind lags behind another by more than one only if it is used up.
    assert all(taken[kind] >= fullest - 1 or taken[kind] == there[kind] for kind in there)
    reordered = balanced_subset(samples[::-1], limit, seed)
    assert {sample.id for sample in reordered} == {sample.id for sample in subset}


def test_another_seed_gives_another_subset() -> None:
    samples = [bare(str(number), "text") for number in range(100)]
    assert balanced_subset(samples, 10, 0) != balanced_subset(samples, 10, 1)


def test_missing_modalities_are_reported(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    lines = [turns(), turns([image("a.png")])]
    samples = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    require_modalities(samples, {"text", "image", "vision"})
    with pytest.raises(DataError, match=r"needs video samples.*1 text, 1 image, 0 video"):
        require_modalities(samples, {"image", "video"})
    with pytest.raises(DataError, match="needs vision samples"):
        require_modalities(samples[:1], {"vision"})
    with pytest.raises(DataError, match="unknown modality 'audio'"):
        require_modalities(samples, {"audio"})


def test_the_fingerprint_depends_on_contents_and_not_on_places(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tiny_vlm.samples(tmp_path / "a")
    before = fingerprint(read_samples(path))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = tmp_path / "b" / path.name
    assert fingerprint(read_samples(moved)) == before
    save_picture(tmp_path / "b" / "2-1.png", size=Image.open(tmp_path / "b" / "2-1.png").size)
    changed = fingerprint(read_samples(moved))
    assert changed != before
    moved.write_text(moved.read_text().replace("colour", "shape", 1))
    assert fingerprint(read_samples(moved)) not in (before, changed)


# Hugging Face datasets


def test_a_dataset_that_is_not_installed_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"prismquant\[eval\]"):
        read_samples("someone/some-data")


class FakeTable(list):  # type: ignore[type-arg]
    """Rows with what is used of a streamed dataset whose features are unknown."""

    features = None

    def shuffle(self, seed: int, buffer_size: int) -> FakeTable:
        return self

    def take(self, count: int) -> FakeTable:
        return FakeTable(self[:count])


def test_rows_of_a_dataset_become_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    picture = Image.open(save_picture(tmp_path / "a.png"))
    rows = FakeTable(
        [
            {"image": picture, "question": "colour ?", "answer": ["red", "a red"], "type": "vqa"},
            {
                "images": [picture],
                "messages": turns([{"type": "image", "text": None}, text("shape ?")])["messages"],
            },
            {"question": "one and one ?", "answer": "2"},
        ]
    )
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> FakeTable:
        asked.append((name, split))
        assert streaming
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    samples = read_samples("someone/data:test", limit=3)
    assert asked == [("someone/data", "test")]
    assert [sample.kind for sample in samples] == ["image", "image", "text"]
    assert [sample.answer for sample in samples] == ["red", "red", "2"]
    assert samples[0].type == "vqa"
    assert samples[1].messages[0]["content"][0]["image"] is picture
    assert fingerprint(samples) == fingerprint(samples)


def test_a_dataset_out_of_reach_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="no route to the hub") as caught:
        read_samples("someone/data")
    assert "network" in str(caught.value)
    assert "long trace" not in str(caught.value)


# Pictures and clips


def test_pictures_are_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    picture = Image.new("L", (8, 4), 50)
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=exif)
    read = read_picture(tmp_path / "a.jpg")
    assert (read.mode, read.size) == ("RGB", (4, 8))


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
    clip = read_video(save_video(tmp_path / "a.mp4"), Sampling(fps=2.0, min_frames=4))
    assert clip.indices == choose_frames(20, 10.0, Sampling(fps=2.0, min_frames=4))
    assert (clip.fps, clip.total, clip.frames.shape) == (10.0, 20, (4, 16, 32, 3))
    shades = clip.frames.astype(float).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(shades, [10 * index for index in clip.indices], atol=6)


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


# Batches


def mixed_samples(folder: Path) -> tuple[Sample, ...]:
    """Texts, pictures and clips, alone and together; one without an answer."""
    for number in range(6):
        save_picture(folder / f"{number}.png", size=(16 + 8 * (number % 3), 24), seed=number)
    frames = [str(save_picture(folder / f"f{n}.png", seed=10 + n).name) for n in range(4)]
    clip = {"type": "video", "video": frames, "fps": 1.0}
    still = {"type": "video", "video": ["5.png"]}
    history = [*turns([image("3.png"), text("which ?")], "it is a red square")["messages"]]
    return read_samples(
        write_lines(
            folder / "mixed.jsonl",
            [
                {"id": "short", **turns("which ?", "no")},
                {
                    "id": "several",
                    **turns([image("0.png"), text("and"), clip, image("1.png")], "yes and no"),
                },
                {"id": "picture", **turns([text("say"), image("2.png"), text("what ?")])},
                {"id": "long", **turns("which one of the two is it ?" * 12, [text("the red one")])},
                {"id": "still", **turns([still, text("what moves ?")], "it")},
                {"id": "turns", "messages": [*history, *turns("how many ?", "2")["messages"]]},
                {
                    "id": "open",
                    "messages": [*history, {"role": "user", "content": [image("4.png")]}],
                },
            ],
        )
    )


def test_masks_mark_the_answers_and_the_placeholders(tmp_path: Path, processor: Any) -> None:
    samples = mixed_samples(tmp_path)
    batch = only(samples, processor)
    ids = batch.inputs["input_ids"]
    assert batch.ids == tuple(sample.id for sample in samples)
    assert batch.kinds == ("text", "video", "image", "text", "video", "image", "image")
    expected = [["no"], ["yes", "and", "no"], ["red"], ["the", "red", "one"], ["it"], ["2"]]
    for row, answer in enumerate(expected):
        assert words(batch, row, batch.answer_mask, processor) == [*answer, "<|im_end|>"]
    assert not batch.answer_mask[6].any()
    assert torch.equal(batch.vision_mask, (ids == IMAGE_ID) | (ids == VIDEO_ID))
    assert not (batch.vision_mask & batch.answer_mask).any()
    assert not (batch.answer_mask & ~batch.attended).any()
    # Padding stands on the right although this tokenizer's own side is the left.
    lengths = batch.attended.sum(dim=1)
    assert torch.equal(batch.attended, torch.arange(ids.shape[1])[None, :] < lengths[:, None])
    assert processor.tokenizer.padding_side == "left"


def test_placeholders_are_as_many_as_the_features_of_the_vision_tower(
    tmp_path: Path, processor: Any
) -> None:
    batch = only(mixed_samples(tmp_path), processor)
    inputs = batch.inputs
    for token, grid, merge in (
        (IMAGE_ID, "image_grid_thw", "image_merge_sizes"),
        (VIDEO_ID, "video_grid_thw", "video_merge_sizes"),
    ):
        side = inputs.get(merge, torch.tensor(2))
        features = int((inputs[grid].prod(dim=1) // side**2).sum())
        if token == VIDEO_ID and "video_compression_mask" in inputs:
            features = int(inputs["video_compression_mask"].sum())
        assert int((inputs["input_ids"] == token).sum()) == features
    assert len(inputs["image_grid_thw"]) == 6
    assert len(inputs["video_grid_thw"]) == 2


def test_the_prompt_is_what_the_processor_makes_of_it_alone(tmp_path: Path, processor: Any) -> None:
    """The answer's place is derived from texts after the last picture: check with whole prompts."""
    samples = mixed_samples(tmp_path)[:6]
    batch = only(samples, processor)
    for row, sample in enumerate(samples):
        alone = Sample(sample.id, sample.kind, sample.messages[:-1], sample.folder, {})
        prompt = only([alone], processor).inputs["input_ids"][0].tolist()
        prompt += processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
        first = int(batch.answer_mask[row].int().argmax())
        assert batch.inputs["input_ids"][row, :first].tolist() == prompt


def test_a_batch_says_the_same_as_its_samples_alone(
    tmp_path: Path, processor: Any, tiny_folder: Path
) -> None:
    """Pictures and clips of a mixed batch go to the rows that show them."""
    samples = mixed_samples(tmp_path)
    model = load_float(tiny_folder, dtype=torch.float32)
    batch = only(samples, processor)
    with torch.inference_mode():
        together = model(**batch.inputs).logits
        for row, sample in enumerate(samples):
            single = only([sample], processor)
            length = single.inputs["input_ids"].shape[1]
            assert torch.equal(
                single.inputs["input_ids"][0], batch.inputs["input_ids"][row, :length]
            )
            assert torch.equal(single.answer_mask[0], batch.answer_mask[row, :length])
            logits = model(**single.inputs).logits[0]
            torch.testing.assert_close(together[row, :length], logits, atol=2e-4, rtol=2e-4)


def test_the_same_samples_give_the_same_tensors(tmp_path: Path, processor: Any) -> None:
    samples = mixed_samples(tmp_path)
    first, second = only(samples, processor), only(samples, processor)
    assert first.inputs.keys() == second.inputs.keys()
    assert all(torch.equal(first.inputs[name], second.inputs[name]) for name in first.inputs)


def test_batches_move_to_a_device_as_a_whole(tmp_path: Path, processors: Any) -> None:
    moved = only(mixed_samples(tmp_path), processors("qwen2_vl")).to("meta")
    tensors = [*moved.inputs.values(), moved.answer_mask, moved.vision_mask]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_sorting_by_length_wastes_less_and_loses_nothing(tmp_path: Path, processors: Any) -> None:
    samples = mixed_samples(tmp_path)
    plain = list(batches(samples, processors("qwen2_vl"), batch_size=3))
    tidy = list(batches(by_length(samples), processors("qwen2_vl"), batch_size=3))
    assert sorted(i for batch in tidy for i in batch.ids) == sorted(sample.id for sample in samples)
    assert [len(batch) for batch in plain] == [3, 3, 1]

    def waste(parts: list[Batch]) -> int:
        return sum(int((~batch.attended).sum()) for batch in parts)

    assert waste(tidy) < waste(plain)


def test_batches_of_too_many_tokens_are_cut_into_even_parts_by_themselves(
    tmp_path: Path, processors: Any
) -> None:
    """How a batch is cut does not depend on the others, so ranks that share them cut alike."""
    samples, processor = by_length(mixed_samples(tmp_path)), processors("qwen2_vl")
    whole = list(batches(samples, processor, batch_size=4, most_tokens=10**6))
    assert [len(batch) for batch in whole] == [4, 3]
    cut = list(batches(samples, processor, batch_size=4, most_tokens=12))
    assert [i for batch in cut for i in batch.ids] == [i for batch in whole for i in batch.ids]
    assert max(len(batch) for batch in cut) < 4
    alone = list(batches(samples[4:], processor, batch_size=4, most_tokens=12))
    assert [batch.ids for batch in alone] == [batch.ids for batch in cut[-len(alone) :]]
    single = list(batches(samples, processor, batch_size=4, most_tokens=1))
    assert [len(batch) for batch in single] == [1] * len(samples)


def test_rows_are_cut_but_never_within_a_picture(tmp_path: Path, processors: Any) -> None:
    samples = mixed_samples(tmp_path)
    processor = processors("qwen2_vl")
    by_id = {sample.id: sample for sample in samples}
    pair = [by_id["short"], by_id["long"]]
    batch = only(pair, processor, limits=Limits(max_length=40))
    assert batch.inputs["input_ids"].shape == (2, 40)
    assert batch.inputs["attention_mask"].shape == (2, 40)
    # The answer of the long one was cut off, so none of it is left.
    assert batch.answer_mask.sum(dim=1).tolist() == [2, 0]
    with pytest.raises(DataError, match="does not fit into 8 tokens") as caught:
        only([by_id["picture"]], processor, limits=Limits(max_length=8))
    assert "sample picture" in str(caught.value)


def test_video_files_reach_the_model(tmp_path: Path, processor: Any, tiny_folder: Path) -> None:
    save_video(tmp_path / "a.mp4")
    lines = [turns([{"type": "video", "video": "a.mp4", "fps": 3.0}, text("what moves ?")])]
    (sample,) = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    batch = only([sample], processor)
    steps = int(batch.inputs["video_grid_thw"][0, 0])
    assert steps == 6 // processor.video_processor.temporal_patch_size
    model = load_float(tiny_folder, dtype=torch.float32)
    with torch.inference_mode():
        assert model(**batch.inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("family", "time"), [("qwen3_vl", "<1.0seconds>"), ("video_llama_3", "2.0s")]
)
def test_the_rate_of_a_clip_stands_in_the_prompt(
    tmp_path: Path, processors: Any, family: str, time: str
) -> None:
    """Four frames, one every two seconds: pairs are at 1 and 5 s, single frames at 0, 2, ... s."""
    frames = [save_picture(tmp_path / f"{n}.png", seed=n).name for n in range(4)]
    lines = [turns([{"type": "video", "video": frames, "fps": 0.5}])]
    batch = only(read_samples(write_lines(tmp_path / "d.jsonl", lines)), processors(family))
    prompt = processors(family).tokenizer.decode(batch.inputs["input_ids"][0])
    assert time in prompt


def test_placeholder_tokens_in_a_text_are_refused(tmp_path: Path, processors: Any) -> None:
    lines = [{"id": "sly", **turns("what is <|image_pad|> ?")}]
    samples = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    with pytest.raises(DataError, match="0 images, but 1 placeholders") as caught:
        only(samples, processors("qwen2_vl"))
    assert "sample sly" in str(caught.value)


def test_chat_templates_that_refuse_a_conversation_are_quoted(
    tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    changed = load_processor(tiny("qwen2_vl"))
    changed.chat_template = "{{ raise_exception('roles must alternate') }}"
    samples = read_samples(write_lines(tmp_path / "data.jsonl", [turns()]))
    with pytest.raises(DataError, match="roles must alternate"):
        only(samples, changed)


def test_what_the_processor_refuses_names_the_samples(tmp_path: Path, processors: Any) -> None:
    save_picture(tmp_path / "a.png", size=(1000, 2))
    lines = [{"id": "thin", **turns([image("a.png")])}]
    samples = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    with pytest.raises(DataError, match="processor refuses the data") as caught:
        only(samples, processors("qwen2_vl"))
    assert "thin" in str(caught.value)


def test_a_file_that_vanished_names_the_sample(tmp_path: Path, processors: Any) -> None:
    save_picture(tmp_path / "a.png")
    lines = [{"id": "ghost", **turns([image("a.png")])}]
    samples = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="missing") as caught:
        only(samples, processors("qwen2_vl"))
    assert "sample ghost" in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        fingerprint(samples)


def test_a_batch_size_below_one_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="batch of 0"):
        batches([], None, batch_size=0)
