"""A small random checkpoint of a family, and samples for it.

It has the structure of a given model, by its configuration alone: no weight is read. Weights are
drawn so that nothing is trivially zero or one, which would hide a mistake.
"""

from __future__ import annotations

import contextlib
import io
import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prismquant.data.read import read_samples
from prismquant.data.samples import Sample
from prismquant.errors import ModelError, brief
from prismquant.families.shrink_config import shrunk_config
from prismquant.models.arch import ArchSpec
from prismquant.models.config import import_transformers
from prismquant.models.load import empty_model
from prismquant.storage import write_text

__all__ = ["KINDS", "write_samples", "write_specimen"]

# Kinds of samples, each of which shows what it is called.
KINDS = ("text", "audio", "image", "video")
_FRAMES = 4
# Samples of a sound per second.
_RATE = 16_000
# Of pictures, in pixels; processors enlarge what is too small for them.
_SIZES = ((64, 48), (96, 64), (48, 80))
_TEXTS = (
    "What is the colour of the bar on the left, and how many are there in all?",
    "Say yes or no: is one of them round?",
    "Name what you see.",
)
_ANSWERS = ("red", "no, none of them is", "a bar")


def write_specimen(config: Any, arch: ArchSpec, token_ids: Sequence[int], folder: Path) -> Path:
    """Write a random checkpoint with two narrow blocks of each kind, as transformers writes it.

    Args:
        config: Native configuration of the family's model.
        arch: Names its class.
        token_ids: The vocabulary, as :func:`~prismquant.families.shrink_config.shrunk_config` takes
            it.
        folder: Where it goes; it is made.

    Returns:
        The folder. Weights are float32.

    Raises:
        ModelError: transformers cannot build or write such a small model.
    """
    small = shrunk_config(config, token_ids)
    empty_model(small, arch)  # its errors are in words
    for part in (small, *(getattr(small, name, None) for name in small.sub_configs)):
        if part is not None:
            part.dtype = torch.float32
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(import_transformers(), arch.hf_class)(small)
            _randomize(model)
        model.tie_weights()
        with contextlib.redirect_stderr(io.StringIO()):  # its bar of progress
            model.save_pretrained(folder)
    # Third-party code over a configuration that nobody has released.
    except Exception as error:
        raise ModelError(
            f"transformers cannot build a small {arch.title}: {brief(error)}",
            remedy="check the family on a model of your own with few and narrow blocks",
        ) from error
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Draw all parameters anew: biases beside zero, vectors around one, matrices of unit gain."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.normal_(0.0, 0.1)
            elif parameter.dim() < 2:
                parameter.normal_(1.0, 0.2)
            elif isinstance(module, nn.Embedding):
                parameter.normal_(0.0, 1.0)
            else:
                # A stack of experts' matrices is no weight of its module.
                stacked = parameter.dim() == 3 and name.endswith("_proj")
                fan_in = parameter.shape[-1] if stacked else parameter[0].numel()
                parameter.normal_(0.0, 1.3 * fan_in**-0.5)


def write_samples(folder: Path, kinds: Sequence[str], count: int) -> tuple[Sample, ...]:
    """Write and read samples of some kinds, by turns, with sounds, pictures and clips of noise.

    Args:
        folder: Where files go; it is made.
        kinds: Of :data:`KINDS`.
        count: Number of samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        kind, text = kinds[number % len(kinds)], _TEXTS[number % len(_TEXTS)]
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if kind != "text":
            size = _SIZES[number % len(_SIZES)]
            stem = folder / f"{kind}-{number}"
            if kind == "audio":
                files = [_write_sound(stem, number)]
            else:
                files = _write_pictures(stem, size, kind, number)
            content.insert(0, {"type": kind, kind: files if kind == "video" else files[0]})
        answer = {"role": "assistant", "content": _ANSWERS[number % len(_ANSWERS)]}
        messages = [{"role": "user", "content": content if kind != "text" else text}, answer]
        lines.append(json.dumps({"id": f"{kind}-{number}", "messages": messages}))
    write_text(folder / "samples.jsonl", "\n".join(lines) + "\n")
    return read_samples(folder / "samples.jsonl")


def _write_sound(stem: Path, seed: int) -> str:
    """Name of a sound of noise, some tenths of a second long, each of another length."""
    draw = torch.Generator().manual_seed(seed)
    samples = torch.randint(-(2**13), 2**13, (_RATE // 4 + seed * 800,), generator=draw)
    name = f"{stem.name}.wav"
    with wave.open(str(stem.with_name(name)), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes(samples.to(torch.int16).numpy().tobytes())
    return name


def _write_pictures(stem: Path, size: tuple[int, int], kind: str, seed: int) -> list[str]:
    """Names of pictures of random pixels: one, or the frames of a clip."""
    from PIL import Image

    draw = torch.Generator().manual_seed(seed)
    names = []
    for frame in range(_FRAMES if kind == "video" else 1):
        pixels = torch.randint(256, (size[1], size[0], 3), generator=draw, dtype=torch.uint8)
        name = f"{stem.name}-{frame}.png"
        Image.fromarray(pixels.numpy(), "RGB").save(stem.with_name(name))
        names.append(name)
    return names
