"""Places by class: those of the fidelity measure, with pictures and clips told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.evaluate import fidelity
from prismquant.models.bind import bind
from prismquant.search.sensitivity import TOKEN_CLASSES
from prismquant.search.token_places import NOWHERE, count_places, token_places

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_places_are_those_of_the_fidelity_measure(
    tiny_folder: Path, processor: Any, calibration_file: Path
) -> None:
    bound = bind(tiny_folder)
    samples = read_samples(calibration_file)
    batches = make_batches(
        samples, processor, batch_size=3, vision_token_ids=bound.vision_token_ids
    )
    counted = dict.fromkeys(TOKEN_CLASSES, 0)
    for batch in batches:
        places = token_places(batch, bound)
        theirs = fidelity._places(batch, everything=True)
        rows, positions = theirs.rows, theirs.columns[theirs.slots]
        assert int((places != NOWHERE).sum()) == len(rows)
        names = [TOKEN_CLASSES[n] for n in places[rows, positions].tolist()]
        coarse = {"answer": 0, "text": 1, "image": 2, "video": 2}
        assert [coarse[name] for name in names] == theirs.classes.tolist()
        for row, kind in enumerate(batch.kinds):
            found = {TOKEN_CLASSES[n] for n in places[row].tolist() if n != NOWHERE}
            assert found == {"answer", "text"} | ({kind} if kind != "text" else set())
        for name in names:
            counted[name] += 1
    assert count_places(batches, bound) == counted
    assert all(counted.values())


def test_classes_that_are_missing_are_left_out(
    tiny: Callable[..., Path], processors: Callable[[str], Any], tmp_path: Path
) -> None:
    file = tmp_path / "words.jsonl"
    file.write_text('{"text": "red blue green"}\n{"text": "what is it"}\n')
    bound = bind(tiny("qwen2_vl"))
    batches = make_batches(
        read_samples(file),
        processors("qwen2_vl"),
        batch_size=2,
        vision_token_ids=bound.vision_token_ids,
    )
    assert set(count_places(batches, bound)) == {"text"}
    tokens = sum(int(batch.attended.sum()) for batch in batches)
    rows = sum(len(batch) for batch in batches)
    assert count_places(batches, bound) == {"text": tokens - rows}
    assert torch.equal(token_places(batches[0], bound)[:, -1], torch.full((len(batches[0]),), -1))
