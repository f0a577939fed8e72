"""A question set about small pictures and clips, drawn from a seed.

Scenes are those of :mod:`prismquant.demo.board`. There are three kinds of sample:

- ``image``: one picture and questions about it;
- ``video``: a clip of four or six frames in which one object moves from cell to cell;
- ``text``: questions that need no picture (facts to be read from a description, orders, sums,
  sorting).

All samples come from a ``random.Random`` that :func:`sample_rng` derives from the name of a split,
a seed and an index, so that training, calibration and evaluation data cannot coincide.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from PIL import Image

from prismquant.demo.board import Frame, Scene, draw_clip, draw_scene, render
from prismquant.demo.questions import IMAGE_TOPICS, TEXT_TOPICS, VIDEO_TOPICS, Turn, ask

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["text", "image", "video"]
Split = Literal["train", "calibration", "evaluation"]

KINDS: tuple[Kind, ...] = ("text", "image", "video")
SPLITS: tuple[Split, ...] = ("train", "calibration", "evaluation")

DEFAULT_HARDNESS = 1.0
"""The hardness at which the shipped model is measured, calibrated and evaluated."""


@dataclass(frozen=True, slots=True)
class SceneSample:
    """One sample: no frame for text, one for an image, four or six for a clip.

    Each frame is a ``uint8`` array of shape (FRAME_PIXELS, FRAME_PIXELS, 3). The turns are
    independent questions about the same frames, and ``scene`` is what they show.
    """

    kind: Kind
    frames: tuple[Frame, ...]
    turns: tuple[Turn, ...]
    scene: Scene | None = None


def sample_rng(split: Split, seed: int, index: int) -> random.Random:
    """Return the random source of one sample; two splits never share one, whatever their seeds."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    digest = hashlib.sha256(f"{split}/{seed}/{index}".encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def make_sample(
    kind: Kind, rng: random.Random, hardness: float = DEFAULT_HARDNESS, turns: int = 1
) -> SceneSample:
    """Draw one sample.

    Args:
        kind: what the sample shows.
        rng: the only source of chance.
        hardness: from 0 (one or two objects, clean paint) to 1 (up to six objects, uncertain
            paint).
        turns: number of questions.
    """
    if not 0.0 <= hardness <= 1.0:
        raise ValueError(f"hardness {hardness} lies outside 0 .. 1")
    if kind == "text":
        return SceneSample(kind, (), tuple(ask(TEXT_TOPICS, hardness, rng) for _ in range(turns)))
    if kind == "image":
        scene = draw_scene(rng, hardness)
        frames = render(scene, rng, hardness, (0.0,))
        return SceneSample(
            kind, frames, tuple(ask(IMAGE_TOPICS, scene, rng) for _ in range(turns)), scene
        )
    if kind == "video":
        scene = draw_clip(rng, hardness)
        count = rng.choice((4, 6))
        frames = render(scene, rng, hardness, [i / (count - 1) for i in range(count)])
        return SceneSample(
            kind, frames, tuple(ask(VIDEO_TOPICS, scene, rng) for _ in range(turns)), scene
        )
    raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")


def write_dataset(
    folder: Path,
    *,
    split: Split,
    seed: int = 0,
    count: int = 128,
    mix: Mapping[Kind, float] | None = None,
    hardness: float = DEFAULT_HARDNESS,
) -> Path:
    """Write one-question samples as ``{split}.jsonl`` and their frames as PNG; return the JSONL.

    Each line holds ``id``, ``kind``, ``topic`` and ``messages``: a user message whose content lists
    the picture (or the clip as a list of frames) and the question, and an assistant message with
    the answer. Paths are relative to ``folder``.

    Args:
        folder: where the files go; made if missing.
        split: which split the seed belongs to.
        seed: chooses among the possible datasets of the split.
        count: number of samples.
        mix: share of each kind; thirds if not given.
        hardness: as in :func:`make_sample`.
    """
    kinds = _spread(mix or dict.fromkeys(KINDS, 1.0), count)
    sample_rng(split, seed, count).shuffle(kinds)
    frames_folder = folder / "frames"
    frames_folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, kind in enumerate(kinds):
        sample = make_sample(kind, sample_rng(split, seed, index), hardness)
        identity = f"{split}-{seed}-{index:05d}"
        paths = [f"frames/{identity}-{number}.png" for number in range(len(sample.frames))]
        for path, frame in zip(paths, sample.frames, strict=True):
            Image.fromarray(frame).save(folder / path)
        turn = sample.turns[0]
        content: list[dict[str, object]] = [{"type": "text", "text": turn.question}]
        if kind == "image":
            content.insert(0, {"type": "image", "image": paths[0]})
        elif kind == "video":
            content.insert(0, {"type": "video", "video": paths})
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": turn.answer},
        ]
        lines.append(
            json.dumps({"id": identity, "kind": kind, "topic": turn.topic, "messages": messages})
        )
    target = folder / f"{split}.jsonl"
    partial = target.with_suffix(".jsonl.partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    partial.replace(target)
    return target


def _spread(mix: Mapping[Kind, float], count: int) -> list[Kind]:
    """Return ``count`` kinds in the proportions of ``mix``, by largest remainder."""
    total = sum(mix.values())
    if total <= 0 or any(share < 0 for share in mix.values()):
        raise ValueError(f"the shares of a mix must be positive, got {dict(mix)}")
    exact = {kind: count * share / total for kind, share in mix.items()}
    whole = {kind: math.floor(amount) for kind, amount in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: whole[kind] - exact[kind])
    for kind in by_remainder[: count - sum(whole.values())]:
        whole[kind] += 1
    return [kind for kind, amount in whole.items() for _ in range(amount)]
