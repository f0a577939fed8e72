"""Sounds from files: one channel, at the rate that a model hears."""

from __future__ import annotations

import json
import wave
from typing import TYPE_CHECKING

import numpy as np
import pytest

from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.data.sound import probe_sound, read_sound, sound_seconds
from prismquant.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

_RATE = 16_000


def write(path: Path, samples: np.ndarray, rate: int = _RATE, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype(np.int16).tobytes())
    return path


def test_samples_are_those_of_the_file(tmp_path: Path) -> None:
    samples = np.arange(-3000, 3000)
    path = write(tmp_path / "a.wav", samples)
    np.testing.assert_array_equal(read_sound(path, _RATE), samples.astype(np.float32) / 2**15)
    assert sound_seconds(path) == pytest.approx(6000 / _RATE)


@pytest.mark.parametrize("rate", [8000, 44_100, 48_000])
def test_another_rate_keeps_the_tone(tmp_path: Path, rate: int) -> None:
    """Of one second of 440 Hz in two channels, the strongest frequency, and its strength."""
    tone = 8000 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    path = write(tmp_path / "a.wav", np.repeat(tone, 2), rate, channels=2)
    heard = read_sound(path, _RATE)
    assert len(heard) == pytest.approx(_RATE, abs=64)
    spectrum = np.abs(np.fft.rfft(heard, _RATE)) / _RATE * 2
    assert np.argmax(spectrum) == 440
    assert spectrum[440] == pytest.approx(8000 / 2**15, rel=0.02)


def test_what_is_no_sound_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF" + bytes(20))
    for name, said in (("broken.wav", "cannot be read"), ("gone.wav", "is missing")):
        with pytest.raises(DataError, match=said):
            probe_sound(tmp_path / name)
    with pytest.raises(DataError, match="is empty"):
        read_sound(write(tmp_path / "empty.wav", np.zeros(0)), _RATE)


class Deaf:
    image_processor = object()


def test_a_model_without_ears_is_given_no_sound(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.ones(100))
    content = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "What is it?"}]
    row = {"messages": [{"role": "user", "content": content}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    [sample] = read_samples(tmp_path / "data.jsonl")
    assert sample.kind == "audio"
    with pytest.raises(DataError, match="1 samples hold sounds, and the model does not hear"):
        make_batches([sample], Deaf(), batch_size=1, vision_token_ids=())


def test_files_of_a_list_go_to_their_markers(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.ones(100))
    row = {"messages": [{"role": "user", "content": "<audio> What?"}], "audios": ["a.wav"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    [sample] = read_samples(tmp_path / "data.jsonl")
    assert sample.messages[0]["content"][0] == {"type": "audio", "audio": "a.wav"}
