"""Samples are read and checked completely; the masks of batches are right to the token."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_data import image, save_picture, text, turns, write_lines

from prismquant.data import (
    Sample,
    balanced_subset,
    fingerprint,
    read_samples,
    require_modalities,
)
from prismquant.errors import DataError

if TYPE_CHECKING:
    pass

IMAGE_ID, VIDEO_ID = 5, 6


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


def test_a_text_file_is_running_text_in_documents(tmp_path: Path) -> None:
    """A line with nothing but a form feed ends a document; all that stands in one is kept."""
    path = tmp_path / "wiki.txt"
    path.write_text("one\ntwo\n\n  \nthree\n\f\n\n\f \nfour \f five\n\f", newline="\r\n")
    samples = read_samples(path)
    texts = ["one\ntwo\n\n  \nthree\n", "four \f five\n"]
    assert [s.answer for s in samples] == texts
    assert [(s.id, s.running, s.window) for s in samples] == [
        ("wiki-1", True, None),
        ("wiki-2", True, None),
    ]


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
        (turns([{"type": "audio", "audio": "gone.wav"}]), "gone.wav is missing"),
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
    assert [finding.split(":")[0] for finding in caught.value.findings] == [
        f"line {number}" for number in range(1, 41)
    ]


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
    with pytest.raises(DataError, match="unknown modality 'smell'"):
        require_modalities(samples, {"smell"})


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
