"""Small random models of families that are tested by their name alone, saved as real checkpoints.

A file here is a family: ``make`` gives its configuration and its processor, of the parts that
transformers has for it, and ``TOKENS`` the tokens that its tokenizer names. Weights, words and
samples are those of :mod:`tiny_vlm`. ``ARCH`` names the architecture where several models of it are
tried; ``SPARSE`` says of a family that it has experts; ``DROPPED`` are stored tensors that its
class drops, with their shapes; ``SLOW``, that another family has all that is particular of it, so
that it is tried among slow tests; ``BLOCKS``, how many its language model has, if not two;
``finish`` sets what weights alone do not say.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch

from prismquant.models.arch_files import known_archs
from prismquant.models.config import import_transformers
from prismquant.shards import ShardReader
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from pathlib import Path

_FILES = {
    name: importlib.import_module(f"tiny_families.{name}")
    for _, name, _ in pkgutil.iter_modules(__path__)
    if name != "parts"
}
SPARSE = tuple(name for name, file in _FILES.items() if getattr(file, "SPARSE", False))
FAMILIES = tuple(name for name in _FILES if name not in SPARSE)


def blocks_of(family: str) -> dict[str, int]:
    """How many blocks each tower has."""
    return {"vision": 2, "llm": getattr(_FILES[family], "BLOCKS", 2)}


def params(*names: str) -> list[Any]:
    """Families as parameters of a test, those that are slow with that mark."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * getattr(_FILES[name], "SLOW", False))
        for name in names
    ]


def build(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random checkpoint with two blocks in each tower, as transformers writes it.

    Args:
        family: One of :data:`FAMILIES` or :data:`SPARSE`.
        folder: Where it goes.
        dtype: Of the weights.
    """
    transformers: Any = import_transformers()
    file = _FILES[family]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_vlm.word_tokenizer(transformers, file.TOKENS)
    config, processor = file.make(transformers, tokenizer)
    processor.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arch = getattr(file, "ARCH", family)
        model = getattr(transformers, known_archs()[arch].hf_class)(config)
        tiny_vlm.randomize(model)
        getattr(file, "finish", lambda _: None)(model)
    model.to(dtype).save_pretrained(folder)
    if dropped := getattr(file, "DROPPED", None):
        _add_tensors(folder, dropped, dtype)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def _add_tensors(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Put random tensors beside a model's, which its class drops."""
    reader = ShardReader(folder)
    draw = torch.Generator().manual_seed(1)
    tensors = {name: reader.read(name) for name in reader.names}
    tensors |= {n: torch.randn(shape, generator=draw).to(dtype) for n, shape in shapes.items()}
    write_tensors(folder / "model.safetensors", tensors)
