"""Recognizing a checkpoint that is quantized already, by its configuration and its headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from prismquant.errors import FormatError, ModelError
from prismquant.headers import TensorInfo
from prismquant.opening import read_json
from prismquant.sources.compressed_source import compressed_weights
from prismquant.sources.quantized_source import QuantizedSource
from prismquant.sources.scaled_sources import scaled_weights
from prismquant.sources.source_headers import SourceHeaders
from prismquant.sources.source_weight import SourceWeight
from prismquant.sources.word_sources import awq_weights, gptq_weights

__all__ = ["SECTION", "SECTION_FILES", "declared_section", "quantized_source"]

SECTION = "quantization_config"
# Files beside config.json in which older writers say the same.
SECTION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

_BYTES = (torch.uint8, torch.int8)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Ends of names of tensors that only a weight in codes has.
_MARKS = (".weight_packed", ".qweight", ".weight_scale_inv")
_Find = Callable[[SourceHeaders], Iterator[tuple[str, SourceWeight]]]
_METHODS: Mapping[str, _Find] = MappingProxyType(
    {
        "fp8": scaled_weights,
        "fbgemm_fp8": scaled_weights,
        "modelopt": scaled_weights,
        "gptq": gptq_weights,
        "awq": awq_weights,
        "compressed-tensors": compressed_weights,
    }
)
_OF_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}
# Last parts of names of tensors that quantize inputs, outputs and caches.
_OF_ACTIVATIONS = frozenset(
    [
        *("input_scale", "input_global_scale", "input_zero_point", "activation_scale"),
        *("output_scale", "output_global_scale", "output_zero_point", "prob_scale"),
        *("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point"),
    ]
)
_PARTS_OF_CONFIG = ("text_config", "llm_config", "thinker_config")


def quantized_source(
    folder: Path,
    config: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    called: Callable[[str], tuple[str, ...]],
) -> QuantizedSource | None:
    """Recognize how a checkpoint is quantized; None where its weights are in floating point.

    Args:
        folder: The checkpoint.
        config: The content of its ``config.json``.
        infos: Headers of all its shards.
        called: From the name of a layer on disk to all names that a configuration may have for it.

    Raises:
        ModelError: It is quantized by a method that cannot be read.
        FormatError: Its tensors are not what its configuration says.
    """
    section = declared_section(folder, config)
    method = str(section.get("quant_method", "")).lower() if section else ""
    _refuse_bitsandbytes(folder, method, infos)
    if not section or method not in _METHODS:
        _refuse_codes(folder, section, infos)
        return None
    try:
        weights = dict(_METHODS[method](SourceHeaders(folder, section, infos, called)))
    except FormatError as error:
        where = str(folder if error.where is None else folder / error.where)
        raise FormatError(error.what, where=where, remedy=error.remedy) from error
    if not weights:
        return None
    over = frozenset(name for name in infos if name.rpartition(".")[2] in _OF_ACTIVATIONS)
    return QuantizedSource(method, weights, over, _dtype(config, infos))


def declared_section(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section that says how a checkpoint is quantized, wherever it lies; None: there is none.

    Raises:
        StorageError: A file that says so cannot be read.
    """
    for part in (config, *(config.get(name) for name in _PARTS_OF_CONFIG)):
        section = part.get(SECTION) if isinstance(part, Mapping) else None
        if isinstance(section, dict) and section:
            return section
    for name, method in _OF_FILES.items():
        if (folder / name).is_file():
            content = read_json(folder / name)
            if isinstance(content, dict):
                return {"quant_method": method} | content
    return None


def _refuse_codes(
    folder: Path, section: Mapping[str, Any] | None, infos: Mapping[str, TensorInfo]
) -> None:
    """Refuse weights in codes of which no known method says what they mean.

    Raises:
        ModelError: There are such.
    """
    coded = next(
        (
            name
            for name, info in infos.items()
            if name.endswith(_MARKS) or (info.dtype in _FP8 and len(info.shape) > 1)
        ),
        None,
    )
    if coded is None:
        return
    if not section:
        said = f"config.json has no {SECTION} that says what they mean"
        remedy = "restore config.json from the original checkpoint"
    else:
        said = f"by a method that is not read ({section.get('quant_method')!r})"
        remedy = "use the unquantized checkpoint, or convert this one with the tool that wrote it"
    raise ModelError(
        f"weights are quantized already ({coded} among them), {said}",
        where=str(folder / infos[coded].file),
        remedy=remedy,
    )


def _refuse_bitsandbytes(folder: Path, method: str, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse weights that bitsandbytes has quantized.

    Raises:
        ModelError: There are such.
    """
    marks = (".quant_state.bitsandbytes", ".SCB", ".absmax", ".quant_map")
    marked = next((name for name in infos if any(mark in name for mark in marks)), None)
    coded = method == "bitsandbytes" and any(info.dtype in _BYTES for info in infos.values())
    if marked is None and not coded:
        return
    raise ModelError(
        "the checkpoint is quantized by bitsandbytes, whose weights are not read",
        where=f"{folder}: {marked or SECTION}",
        remedy="use the unquantized checkpoint that it was made from (its name is usually this "
        "one's without -bnb-4bit); if there is none, load this one in transformers, call "
        "`model.dequantize()` and save it",
    )


def _dtype(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> torch.dtype:
    """The dtype of the model in floating point: the configuration's, or that of most tensors."""
    for part in (config, *(config.get(name) for name in _PARTS_OF_CONFIG)):
        if not isinstance(part, Mapping):
            continue
        for key in ("dtype", "torch_dtype"):
            said = getattr(torch, str(part.get(key)).removeprefix("torch."), None)
            if isinstance(said, torch.dtype) and said.is_floating_point and said.itemsize > 1:
                return said
    stored = Counter(
        info.dtype
        for info in infos.values()
        if info.dtype.is_floating_point and info.dtype.itemsize > 1
    )
    return stored.most_common(1)[0][0] if stored else torch.bfloat16
