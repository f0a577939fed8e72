"""As much of an architecture as a configuration and its processor show before anything has run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prismquant.data.batches import Batch
from prismquant.errors import ModelError, brief
from prismquant.models.arch_files import BESIDE
from prismquant.models.config import import_transformers, read_config
from prismquant.storage import write_text

__all__ = ["input_groups", "write_provisional"]

_PLACEHOLDERS = (
    ("image_token_id", "image_token_index"),
    ("video_token_id", "video_token_index"),
)
_PICTURES = ("preprocessor_config.json", "processor_config.json")
# They say which tokens are pictures: of the language model, not of the vision tower.
_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
_FOR_TEXT = ("AutoModelForCausalLM",)
_FOR_PICTURES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", *_FOR_TEXT)


def write_provisional(folder: Path) -> None:
    """Write an architecture file that names the class, and says whether the model sees pictures.

    Args:
        folder: With config.json and the processor's files; the file goes there, too.

    Raises:
        ModelError: transformers has no class for it.
    """
    config = _config(folder)
    kind = str(config.model_type)
    sees = any((folder / name).is_file() for name in _PICTURES)
    tokens = list(_placeholders(config)) if sees else []
    if sees and not tokens:
        raise ModelError(
            "the folder has an image processor, but config.json names no token for pictures",
            where=str(folder),
            remedy="write the file by hand: docs/families.md",
        )
    name = _class_of(config, folder, sees=sees)
    values = {
        "title": name.partition("For")[0],
        "model_types": [kind],
        "hf_class": name,
        "head": "lm_head",
        "embeddings": "embed_tokens",
        "vision_token_ids": tokens,
        "input_groups": [["pixel_values"]] if sees else [],
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    lines.append('layouts = [{ name = "native", rewrites = {} }]')
    lines.append('towers = [{ modality = "llm", root = "model", modules = ["model"] }]')
    write_text(folder / BESIDE, "\n".join(lines) + "\n")


def input_groups(
    batches: Mapping[str, Batch], model: nn.Module
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Inputs that pictures and clips bring along, pixels first.

    Args:
        batches: By the kinds of their samples.
        model: Says which of them its vision tower takes.

    Returns:
        A group for each call of the vision tower, and inputs that no call takes.
    """
    known = {*batches["text"].inputs, *_OF_TOKENS} if "text" in batches else {*_OF_TOKENS}
    groups: list[tuple[str, ...]] = []
    idle: list[str] = []
    for kind in ("image", "video"):
        if kind not in batches:
            continue
        taken = _parameters(model, f"get_{kind}_features")
        group: list[str] = []
        for key in batches[kind].inputs.keys() - known:
            used = not taken or key.startswith("pixel") or key.removesuffix("_videos") in taken
            (group if used else idle).append(key)
        group.sort(key=lambda key: (not key.startswith("pixel"), _place(key, taken), key))
        if group and tuple(group) not in groups:
            groups.append(tuple(group))
    return tuple(groups), tuple(sorted({*idle}.difference(*groups)))


def _parameters(model: nn.Module, method: str) -> list[str]:
    """Names of the parameters of a method of a model; empty where it has no such method."""
    inner = getattr(model, "model", None)
    function = getattr(inner, method, None) or getattr(model, method, None)
    return [] if function is None else list(inspect.signature(function).parameters)


def _place(key: str, names: Sequence[str]) -> int:
    """The place of an input among those that a method takes; behind them where it is not there."""
    key = key.removesuffix("_videos")
    return names.index(key) if key in names else len(names)


def _config(folder: Path) -> Any:
    transformers = import_transformers()
    read_config(folder)  # its errors are in words
    try:
        return transformers.AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise ModelError(
            f"transformers {transformers.__version__} has no such model: {brief(error)}",
            where=str(folder / "config.json"),
            remedy="install a release of transformers that has the model; remote code never runs",
        ) from error


def _placeholders(config: Any) -> Iterator[str]:
    """Keys of the tokens that stand for pictures and for clips."""
    for names in _PLACEHOLDERS:
        if (key := next((one for one in names if getattr(config, one, None)), None)) is not None:
            yield key


def _class_of(config: Any, folder: Path, *, sees: bool) -> str:
    """The class that runs a model: the one it was written by, or transformers' own choice."""
    transformers = import_transformers()
    for auto in _FOR_PICTURES if sees else _FOR_TEXT:
        table = getattr(getattr(transformers, auto, None), "_model_mapping", {})
        if type(config) in table:
            return str(table[type(config)].__name__)
    raise ModelError(
        f"transformers has no class that puts out text for model_type {config.model_type!r}",
        where=str(folder / "config.json"),
        remedy="only models that write text are described",
    )
