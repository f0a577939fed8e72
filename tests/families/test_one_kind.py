"""Families whose own code cannot tell pictures from clips: a batch shows one kind of them."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest
import tiny_vlm

from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.errors import DataError
from prismquant.models.bind import bind
from prismquant.models.processor import load_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prismquant.data import Sample
    from prismquant.data.batches import Batches


@pytest.fixture
def batches_of(tiny: Callable[..., Path]) -> Callable[..., Batches]:
    """``batches_of(samples)``: of GLM-4.1V, four samples at a time."""
    bound = bind(tiny("glm4v"))
    assert bound.arch.one_kind

    def make(samples: list[Sample]) -> Batches:
        return make_batches(
            samples,
            load_processor(bound.folder),
            batch_size=4,
            vision_token_ids=bound.vision_token_ids,
            one_kind=True,
        )

    return make


def test_clips_are_in_batches_of_their_own(
    batches_of: Callable[..., Batches], tmp_path: Path
) -> None:
    samples = list(read_samples(tiny_vlm.samples(tmp_path, count=6)))
    kinds = [batch.kinds for batch in batches_of(samples)]
    assert sorted(kind for batch in kinds for kind in batch) == sorted(s.kind for s in samples)
    assert all(len({kind == "video" for kind in batch}) == 1 for batch in kinds)
    assert any({"text", "image"} <= set(batch) for batch in kinds)


def test_a_sample_of_both_is_refused_before_any_work(
    batches_of: Callable[..., Batches], tmp_path: Path
) -> None:
    file = tiny_vlm.samples(tmp_path, count=6)
    shown = [
        part
        for line in file.read_text().splitlines()
        for message in json.loads(line)["messages"]
        for part in (message["content"] if isinstance(message["content"], list) else [])
        if part["type"] in ("image", "video")
    ]
    both = {part["type"]: part for part in shown}
    message = {"role": "user", "content": [*both.values(), {"type": "text", "text": "say"}]}
    samples = read_samples(file)
    mixed = dataclasses.replace(samples[0], messages=(message,))
    with pytest.raises(DataError, match="1 samples show pictures beside clips"):
        batches_of([mixed, *samples[1:]])
