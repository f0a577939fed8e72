"""The demonstration's questions: deterministic, unambiguous and in the documented format."""

from __future__ import annotations

import json
import random
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from prismquant.demo import board, scenes

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES = 150


def _samples(kind: scenes.Kind, turns: int = 6) -> list[scenes.SceneSample]:
    return [
        scenes.make_sample(kind, scenes.sample_rng("evaluation", 3, index), 1.0, turns)
        for index in range(SAMPLES)
    ]


def _same(first: scenes.SceneSample, second: scenes.SceneSample) -> bool:
    return (
        first.turns == second.turns
        and len(first.frames) == len(second.frames)
        and all(map(np.array_equal, first.frames, second.frames))
    )


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_same_seed_gives_same_sample(kind: scenes.Kind) -> None:
    first, second = (
        scenes.make_sample(kind, scenes.sample_rng("train", 1, 5), 1.0, 4) for _ in range(2)
    )
    assert _same(first, second)
    other = scenes.make_sample(kind, scenes.sample_rng("train", 1, 6), 1.0, 4)
    assert not _same(first, other)


def test_splits_seeds_and_indices_never_share_a_random_source() -> None:
    draws = {
        scenes.sample_rng(split, seed, index).getrandbits(128)
        for split in scenes.SPLITS
        for seed in range(5)
        for index in range(50)
    }
    assert len(draws) == len(scenes.SPLITS) * 5 * 50


@pytest.mark.parametrize("kind", scenes.KINDS)
@pytest.mark.parametrize("hardness", [0.0, 1.0])
def test_frames_fit_the_kind(kind: scenes.Kind, hardness: float) -> None:
    counts = {"text": {0}, "image": {1}, "video": {4, 6}}[kind]
    for index in range(30):
        sample = scenes.make_sample(kind, scenes.sample_rng("train", 0, index), hardness, 2)
        assert len(sample.frames) in counts
        assert len(sample.turns) == 2
        for frame in sample.frames:
            assert frame.shape == (board.FRAME_PIXELS, board.FRAME_PIXELS, 3)
            assert frame.dtype == np.uint8


def test_hardness_raises_the_number_of_objects() -> None:
    def largest(hardness: float) -> int:
        rng = random.Random(0)
        drawn = [scenes.make_sample("image", rng, hardness).scene for _ in range(60)]
        return max(len(scene.things) for scene in drawn if scene is not None)

    assert largest(0.0) == 2
    assert largest(1.0) == 6


@pytest.mark.parametrize("kind", ["image", "video"])
def test_references_fit_exactly_one_object(kind: scenes.Kind) -> None:
    """'Where is the small red object?' is only asked when one object is small and red."""
    checked = 0
    for sample in _samples(kind):
        assert sample.scene is not None
        for turn in sample.turns:
            match = re.fullmatch(r"Where is the (?P<words>[a-z ]+)\?", turn.question)
            if match is None:
                continue
            words = set(match["words"].split()) - {"object"}
            fitting = [
                thing
                for thing in sample.scene.things
                if words <= {thing.size, thing.colour, thing.shape}
            ]
            assert [thing.place for thing in fitting] == [turn.answer]
            checked += 1
    assert checked > 20


def test_counts_agree_with_the_scene() -> None:
    for sample in _samples("image"):
        assert sample.scene is not None
        for turn in sample.turns:
            if turn.question == "How many objects are there?":
                assert turn.answer == str(len(sample.scene.things))
            if turn.topic == "describe":
                assert len(turn.answer.split(", ")) == len(sample.scene.things)


def test_motion_starts_and_ends_on_free_cells() -> None:
    for sample in _samples("video"):
        scene = sample.scene
        assert scene is not None
        assert scene.motion is not None
        mover = scene.things[scene.motion.index]
        down, across = board.DIRECTIONS[scene.motion.direction]
        still = {thing.cell for thing in scene.things if thing is not mover}
        row, column = mover.cell
        steps = max(abs(scene.motion.end[0] - row), abs(scene.motion.end[1] - column))
        way = [(row + down * step, column + across * step) for step in range(steps + 1)]
        assert way[-1] == scene.motion.end
        assert not still & set(way)


def test_text_answers_are_right() -> None:
    for sample in _samples("text"):
        for turn in sample.turns:
            if turn.topic == "sum":
                first, word, second = re.findall(r"\d+|plus|minus", turn.question)
                sign = 1 if word == "plus" else -1
                assert int(turn.answer) == int(first) + sign * int(second)
            if turn.topic == "sort":
                words = turn.question.removeprefix("Sort these words: ").rstrip(".").split(", ")
                assert turn.answer.split(", ") == sorted(words)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_answers_are_short_lower_case_and_varied(kind: scenes.Kind) -> None:
    turns = [turn for sample in _samples(kind) for turn in sample.turns]
    assert all(re.fullmatch(r"[a-z0-9, ]+", turn.answer) for turn in turns)
    assert len({turn.topic for turn in turns}) >= 6
    yes_no = [turn.answer for turn in turns if turn.answer in ("yes", "no")]
    assert 0.1 < yes_no.count("yes") / len(yes_no) < 0.9


def test_paint_comes_close_to_its_colour() -> None:
    """Averaged over many samples, the middle of a circle has the colour of its name."""
    errors = []
    for sample in _samples("image", turns=1):
        assert sample.scene is not None
        for thing in sample.scene.things:
            if thing.shape in ("ring", "triangle") or thing.size == "small":
                continue
            corner = [index * board.CELL_PIXELS + board.CELL_PIXELS // 2 for index in thing.cell]
            patch = sample.frames[0][corner[0] - 1 : corner[0] + 1, corner[1] - 1 : corner[1] + 1]
            errors.append(patch.mean(axis=(0, 1)) - board.COLOURS[thing.colour])
    assert len(errors) > 50
    assert np.abs(np.mean(errors, axis=0)).max() < 12


def test_dataset_format(tmp_path: Path) -> None:
    path = scenes.write_dataset(tmp_path, split="calibration", seed=2, count=24)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert path == tmp_path / "calibration.jsonl"
    assert len({record["id"] for record in records}) == len(records) == 24
    kinds = [record["kind"] for record in records]
    assert {kind: kinds.count(kind) for kind in scenes.KINDS} == {"text": 8, "image": 8, "video": 8}
    for record in records:
        user, assistant = record["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert isinstance(assistant["content"], str)
        *shown, question = user["content"]
        assert question["type"] == "text"
        if record["kind"] == "text":
            assert shown == []
            continue
        (item,) = shown
        assert item["type"] == record["kind"]
        files = [item["image"]] if record["kind"] == "image" else item["video"]
        for name in files:
            with Image.open(tmp_path / name) as image:
                assert image.size == (board.FRAME_PIXELS, board.FRAME_PIXELS)
                assert image.mode == "RGB"


def test_dataset_is_reproducible_and_follows_the_mix(tmp_path: Path) -> None:
    mix: dict[scenes.Kind, float] = {"text": 1, "image": 3}
    texts = []
    for name in ("a", "b"):
        path = scenes.write_dataset(tmp_path / name, split="evaluation", count=10, mix=mix)
        texts.append(path.read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    kinds = [json.loads(line)["kind"] for line in texts[0].splitlines()]
    assert kinds.count("video") == 0
    assert sorted((kinds.count("text"), kinds.count("image"))) in ([2, 8], [3, 7])
    frames = [sorted((tmp_path / name / "frames").iterdir()) for name in ("a", "b")]
    assert [file.read_bytes() for file in frames[0]] == [file.read_bytes() for file in frames[1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scenes.sample_rng("test", 0, 0), "unknown split"),  # type: ignore[arg-type]
        (lambda: scenes.make_sample("audio", random.Random(0)), "unknown kind"),  # type: ignore[arg-type]
        (lambda: scenes.make_sample("image", random.Random(0), 1.5), "hardness"),
    ],
)
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
