"""One question, as a person asks it, and what a checkpoint answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prismquant.data.batches import make_batches
from prismquant.data.media import Limits
from prismquant.data.read import samples_of_messages
from prismquant.evaluate.fidelity import prompt_inputs
from prismquant.export.load_quantized import load_model
from prismquant.memory import available_bytes
from prismquant.models.config import config_value, identify, native_config
from prismquant.models.processor import load_processor
from prismquant.runtime.packed_layers import KernelUse, kernel_uses

# Stands where the answer will, so that the template writes all that comes before one.
_STAND_IN = "."


@dataclass(frozen=True)
class Question:
    """A question of one turn.

    Attributes:
        prompt: The text.
        images: Files of pictures that come before it.
        videos: Files of clips, likewise, after the pictures.
    """

    prompt: str
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """Choice of each next token.

    Attributes:
        max_new_tokens: The most of an answer.
        temperature: Of sampling; 0: the likeliest token each time.
        top_p: Sample from the likeliest tokens that have this probability together.
        seed: Of sampling.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: Without special tokens.
        tokens: How many were written.
        prompt_tokens: How many were read, those of pictures and clips among them.
        seconds: From the question to the answer, without loading.
        kernels: What multiplied, of a model that was loaded packed.
    """

    text: str
    tokens: int
    prompt_tokens: int
    seconds: float
    kernels: tuple[KernelUse, ...] = ()


def ask(
    folder: Path,
    question: Question,
    decoding: Decoding,
    *,
    packed: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Reply:
    """Load a checkpoint and ask it.

    Args:
        folder: The checkpoint.
        question: What is asked.
        decoding: How tokens are chosen.
        packed: Keep weights in codes.
        device: Where the model runs; the CPU by default.
        dtype: Of the arithmetic; the checkpoint's by default.
        trust_remote_code: Allow code in the folder to build the processor.

    Raises:
        PrismQuantError: The checkpoint or a file cannot be read.
    """
    processor = load_processor(folder, trust_remote_code=trust_remote_code)
    inputs = _prompt(folder, question, processor)
    place = device or torch.device("cpu")
    model = load_model(folder, dtype=dtype, device=place, packed=packed)
    given = {name: value.to(place) for name, value in inputs.items()}
    started = time.perf_counter()
    with _seeded(decoding.seed):
        produced = _decoded(model, given, decoding)
    seconds = time.perf_counter() - started
    width = inputs["input_ids"].shape[1]
    tokenizer = getattr(processor, "tokenizer", processor)
    text = tokenizer.decode(produced[width:], skip_special_tokens=True)
    kernels = kernel_uses(model) if packed else ()
    return Reply(text.strip(), len(produced) - width, width, seconds, kernels)


def _prompt(folder: Path, question: Question, processor: Any) -> dict[str, torch.Tensor]:
    """Inputs of the model, up to where its answer begins."""
    content: list[dict[str, str]] = [{"type": "image", "image": file} for file in question.images]
    content += [{"type": "video", "video": file} for file in question.videos]
    content.append({"type": "text", "text": question.prompt})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if getattr(processor, "chats", True):
        messages.append({"role": "assistant", "content": [{"type": "text", "text": _STAND_IN}]})
    conversation = {"question": messages}
    samples = samples_of_messages(conversation, "the question", most_bytes=available_bytes())
    arch = identify(folder)
    config = native_config(arch, folder)
    batches = make_batches(
        samples,
        processor,
        batch_size=1,
        vision_token_ids=[int(config_value(config, key)) for key in arch.vision_token_ids],
        limits=Limits(),
    )
    return prompt_inputs(batches[0])


@torch.no_grad()
def _decoded(model: nn.Module, inputs: dict[str, torch.Tensor], decoding: Decoding) -> list[int]:
    """All tokens, those of the prompt first."""
    generator: Any = model
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if decoding.temperature:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p}
    sampled = generator.generate(
        **inputs, **sampling, top_k=None, max_new_tokens=decoding.max_new_tokens, use_cache=True
    )
    tokens: list[int] = sampled[0].tolist()
    return tokens


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within the block, torch's random numbers begin at a seed; after it they go on as before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
