"""Loading a checkpoint that PrismQuant, or another writer of compressed-tensors, made."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from prismquant.export.kv_section import quantize_kv_cache, read_kv_cache_scheme
from prismquant.export.stored import StoredCheckpoint, StoredLayer, open_checkpoint
from prismquant.formats.quantized_layer import scale_and_zero_point
from prismquant.models.config import native_config
from prismquant.models.empty import empty_model
from prismquant.models.load import materialize
from prismquant.runtime.quant_linear import quantize_inputs, quantize_outputs, rotate_inputs


def load_model(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Load a checkpoint, quantized or not, for simulation.

    Weights are what the checkpoint stores, dequantized; inputs, and keys and values, are quantized
    as its configuration says.

    Args:
        folder: The checkpoint.
        dtype: Of the arithmetic; that of the stored embeddings by default.
        device: Where it goes.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError, FormatError, StorageError: The checkpoint cannot be read.
    """
    source = open_checkpoint(folder)
    model = empty_model(native_config(source.arch, folder), source.arch)
    materialize(model, "", source.reader, source.names, device, dtype or source.dtype)
    for layer in source.layers:
        if layer.rotation is not None:
            rotate_inputs(model, layer.name, layer.rotation, source.signs(layer))
        _quantize_activations(model, source, layer)
    kv_cache = read_kv_cache_scheme(source.section)
    if kv_cache is not None:
        quantize_kv_cache(model, source.arch, source.names, source.shards, kv_cache)
    return model


def _quantize_activations(model: nn.Module, source: StoredCheckpoint, layer: StoredLayer) -> None:
    """Put quantizers before and behind a layer, as the checkpoint says."""
    if layer.inputs is not None:
        columns = source.columns(layer)
        scale, zero_point = scale_and_zero_point(source.static_scale(layer, "input"))
        index = columns.index if columns else None
        quantize_inputs(model, layer.name, layer.inputs, scale, zero_point, index)
    if layer.outputs is not None:
        scale, zero_point = scale_and_zero_point(source.static_scale(layer, "output"))
        quantize_outputs(model, layer.name, layer.outputs, scale, zero_point)
