"""Loading a checkpoint that PrismQuant, or another writer of compressed-tensors, made.

This needs nothing of what quantizes: no engine, plan, recipe or data. What only some checkpoints
have (quantized inputs, rotations, a quantized cache) is imported for those alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from prismquant.arguments import FLOATS, as_device, as_dtype, as_flag, as_path, default_modes
from prismquant.errors import FormatError
from prismquant.export.compressed_tensors.reader import StoredLayer
from prismquant.export.compressed_tensors.stored import StoredCheckpoint, open_checkpoint
from prismquant.formats.quantized_layer import scale_and_zero_point
from prismquant.formats.section import CONFIG_KEY, METHOD
from prismquant.models.config import header_infos, identify, native_config, read_config
from prismquant.models.load import empty_model, materialize
from prismquant.models.processor import load_processor

_DTYPES = (*FLOATS, "float64")


@default_modes()
def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    packed: bool = False,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Load a checkpoint, quantized or not, and its processor. Needs no other quantization library.

    Args:
        folder: A checkpoint in compressed-tensors format, or in floating point.
        dtype: Of the arithmetic, e.g. ``bfloat16``; the checkpoint's by default.
        packed: Keep weights in codes, and multiply with these; they are dequantized otherwise.
        device: Where the model goes.
        trust_remote_code: Allow code in the folder to build the processor.

    Returns:
        The model, in evaluation mode, with inputs quantized as the checkpoint says; and the
        processor.

    Raises:
        ModelError, FormatError, StorageError: The checkpoint cannot be read.
    """
    path = as_path(folder, "folder")
    wanted = None if dtype is None else as_dtype(dtype, known=_DTYPES)
    trusted = as_flag(trust_remote_code, "trust_remote_code")
    in_codes, place = as_flag(packed, "packed"), as_device(device)
    processor = load_processor(path, trust_remote_code=trusted)
    return load_model(path, dtype=wanted, device=place, packed=in_codes), processor


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    packed: bool = False,
) -> nn.Module:
    """Load a checkpoint, quantized or not.

    Weights are what the checkpoint stores, dequantized or in codes; inputs, and keys and values,
    are quantized as its configuration says.

    Args:
        folder: The checkpoint.
        dtype: Of the arithmetic; that of the stored embeddings by default.
        device: Where it goes.
        packed: Keep weights in codes.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError, FormatError, StorageError: The checkpoint cannot be read.
    """
    if _is_foreign(folder):
        if packed:
            raise FormatError(
                "only weights in the compressed-tensors format can be kept in codes",
                where=str(folder),
                remedy="leave packed out, or quantize the model anew",
            )
        from prismquant.models.float_model import load_float  # shows other tools' codes as floats

        return load_float(folder, dtype, device=device)
    source = open_checkpoint(folder)
    model = empty_model(native_config(source.arch, folder), source.arch)
    if packed:
        _put_codes(model, source, device, dtype or source.dtype)
    materialize(model, "", source.reader, source.names, device, dtype or source.dtype)
    simulate_activations(model, source)
    return model


def _put_codes(
    model: nn.Module, source: StoredCheckpoint, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Put layers that multiply with codes in the place of those that are stored so, one by one."""
    from prismquant.memory import give_back_freed
    from prismquant.runtime.packed_layers import PackedLinear

    for layer in source.quantized:
        linear = cast("nn.Linear", model.get_submodule(layer.name))
        given = (source.codes(layer), source.columns(layer), device, dtype)
        parent, _, leaf = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, PackedLinear.of(linear, *given))
    give_back_freed()


def _is_foreign(folder: Path) -> bool:
    """Whether a checkpoint is quantized in a way that is read as a source alone."""
    section = read_config(folder).get(CONFIG_KEY)
    if not (folder / "hf_quant_config.json").is_file() and (
        not isinstance(section, Mapping) or section.get("quant_method") == METHOD
    ):
        return False
    from prismquant.models.open_source import source_of

    return source_of(folder, identify(folder), header_infos(folder)) is not None


def simulate_activations(model: nn.Module, source: StoredCheckpoint) -> None:
    """Let a model rotate and round inputs, outputs, keys and values as a checkpoint says; in place.

    Args:
        model: Of the checkpoint's class, with its weights.
        source: The checkpoint.
    """
    for layer in source.rotated:
        _rotate_input(model, source, layer)
    for layer in source.simulated:
        _quantize_activations(model, source, layer)
    if source.has_cache_scales:
        _quantize_cache(model, source)


def _rotate_input(model: nn.Module, source: StoredCheckpoint, layer: StoredLayer) -> None:
    """Put a rotation before a layer, as the checkpoint says."""
    from prismquant.runtime.input_rotation import rotate_inputs

    if layer.rotation is not None:
        rotate_inputs(model, layer.name, layer.rotation, source.signs(layer))


def _quantize_activations(model: nn.Module, source: StoredCheckpoint, layer: StoredLayer) -> None:
    """Put quantizers before and behind a layer, as the checkpoint says."""
    from prismquant.runtime.linear import quantize_inputs, quantize_outputs

    if layer.inputs is not None:
        columns = source.columns(layer)
        scale, zero_point = scale_and_zero_point(source.static_scale(layer, "input"))
        index = columns.index if columns else None
        quantize_inputs(model, layer.name, layer.inputs, scale, zero_point, index)
    if layer.outputs is not None:
        scale, zero_point = scale_and_zero_point(source.static_scale(layer, "output"))
        quantize_outputs(model, layer.name, layer.outputs, scale, zero_point)


def _quantize_cache(model: nn.Module, source: StoredCheckpoint) -> None:
    """Put quantizers before attention, as the checkpoint says."""
    from prismquant.export.compressed_tensors.kv_section import (
        quantize_kv_cache,
        read_kv_cache_scheme,
    )

    spec = read_kv_cache_scheme(source.section)
    if spec is not None:
        quantize_kv_cache(model, source.arch, source.names, source.shards, spec)
