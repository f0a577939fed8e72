"""Models that hear: sounds go through their float tower, and into all that calibration sees."""

from __future__ import annotations

import json
import wave
from typing import TYPE_CHECKING

import pytest
import tiny_families
import torch

import prismquant as pq
from prismquant.data.batches import make_batches
from prismquant.data.media import Limits, processor_inputs
from prismquant.data.spans import render
from prismquant.errors import DataError
from prismquant.families.check_family import check_family
from prismquant.families.specimen import KINDS, write_samples
from prismquant.models import arch_files
from prismquant.models.processor import load_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_FAMILY = "qwen2_5_omni"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.build(_FAMILY, tmp_path_factory.mktemp("models") / "thinker")


@pytest.mark.slow
def test_a_stream_that_sounds_enter_is_not_rotated_without_them(
    thinker: Path, tmp_path: Path
) -> None:
    text = (arch_files.PACKAGED / f"{_FAMILY}.toml").read_text(encoding="utf-8")
    assert ', "model.audio_tower.proj"' in text
    file = tmp_path / "deaf.toml"
    file.write_text(text.replace(', "model.audio_tower.proj"', ""), encoding="utf-8")
    claims = check_family(thinker, file).claims
    stream = "the llm tower's residual stream can be rotated"
    assert [claim.what for claim in claims if claim.holds is False] == [stream]


def test_sounds_are_calibrated_on_and_measured(thinker: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "data", KINDS, 4)
    data = tmp_path / "data" / "samples.jsonl"
    pq.quantize(thinker, "w8a16", tmp_path / "out", data, fallback=True)
    found = pq.measure(tmp_path / "out", data, reference=thinker)
    assert set(found.by_kind) == {*KINDS}
    assert found.by_kind["audio"].divergence["answer"].kl < 0.1


def test_sounds_are_padded_as_the_processor_pads_them(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Samples are made one at a time; joined, they are what the processor makes of all."""
    folder = tiny("qwen3_omni_moe")
    processor = load_processor(folder)
    samples = write_samples(tmp_path / "data", ("audio",), 3)
    [batch] = make_batches(samples, processor, batch_size=3, vision_token_ids=())
    sounds = [processor_inputs(sample, processor, Limits())["audio"][0] for sample in samples]
    assert len({len(sound) for sound in sounds}) == 3
    texts = [render(sample, processor).text for sample in samples]
    expected = processor(text=texts, audio=sounds, return_tensors="pt", padding=True)
    heard = batch.inputs["feature_attention_mask"].bool()
    torch.testing.assert_close(heard, expected["feature_attention_mask"].bool())
    ours, theirs = (one["input_features"].transpose(1, 2) for one in (batch.inputs, expected))
    # A window at the end of a sound sees the padding.
    torch.testing.assert_close(ours[heard], theirs[heard], rtol=1e-2, atol=1e-2)


def test_a_sound_that_the_model_would_not_hear_whole_is_refused(
    thinker: Path, tmp_path: Path
) -> None:
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(2 * 16_000 * 31))
    content = [{"type": "audio", "audio": "long.wav"}, {"type": "text", "text": "What is it?"}]
    row = {"messages": [{"role": "user", "content": content}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=r"long.wav lasts 31.0 s, and the model hears 30 s"):
        pq.quantize(thinker, "w8a16", tmp_path / "out", tmp_path / "data.jsonl", fallback=True)
