"""Loading a checkpoint that PrismQuant, or another writer of compressed-tensors, made."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from prismquant.export.arguments import read_private
from prismquant.export.compressed_tensors import (
    CONFIG_KEY,
    SIGNS,
    DequantizingReader,
    read_rotations,
    read_schemes,
)
from prismquant.export.kv_cache import quantize_kv_cache, read_kv_cache_scheme
from prismquant.export.stored import config_names, embedding_dtype, other_names, widths
from prismquant.formats.spec import NumberSpec
from prismquant.models.config import empty_model, identify, native_config
from prismquant.models.load import materialize
from prismquant.models.names import choose_layout
from prismquant.pipeline.group import parameters
from prismquant.runtime.quant_linear import quantize_inputs, quantize_outputs, rotate_inputs
from prismquant.storage import ShardReader, read_json


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
    arch = identify(folder)
    model = empty_model(native_config(arch, folder), arch)
    shards = ShardReader(folder)
    names = choose_layout(arch.layouts, shards.names, dict(model.named_modules()))
    called = config_names(model, names, remote=arch.config_map is not None)
    config = read_json(folder / "config.json")
    aliases = other_names(called, arch)
    declared = read_schemes(config, list(called), aliases)
    schemes = {called[name]: scheme for name, scheme in declared.items()}
    rotated = read_rotations(config, widths(model, called), aliases)
    rotations = {called[name]: block for name, block in rotated.items()}
    disk = {module: names.to_disk(f"{module}.weight").removesuffix(".weight") for module in schemes}
    reader = DequantizingReader(folder, {disk[module]: schemes[module] for module in schemes})
    stored = embedding_dtype(shards, names, arch)
    materialize(model, "", reader, names, device, dtype or stored)
    for module, block in rotations.items():
        signs = f"{names.to_disk(f'{module}.weight').removesuffix('.weight')}.{SIGNS}"
        rotate_inputs(model, module, block, shards.read(signs) if signs in shards.names else None)
    activations = {module: (s.activations, s.outputs) for module, s in schemes.items()}
    # What our own section says is more exact.
    activations |= {called[name]: sides for name, sides in read_private(config).items()}
    for module, sides in activations.items():
        prefix = names.to_disk(f"{module}.weight").removesuffix(".weight")
        _quantize_activations(model, module, sides, reader, prefix)
    if (kv_cache := read_kv_cache_scheme(config.get(CONFIG_KEY) or {})) is not None:
        quantize_kv_cache(model, arch, names, shards, kv_cache)
    return model


def _quantize_activations(
    model: nn.Module,
    module: str,
    sides: tuple[NumberSpec | None, NumberSpec | None],
    reader: DequantizingReader,
    prefix: str,
) -> None:
    """Put quantizers before and behind a layer, as the checkpoint says."""
    inputs, outputs = sides
    if inputs is not None:
        columns = reader.split_columns(prefix)
        scale, zero_point = parameters(reader.static_scale(prefix, "input"))
        index = columns.index if columns else None
        quantize_inputs(model, module, inputs, scale, zero_point, index)
    if outputs is not None:
        scale, zero_point = parameters(reader.static_scale(prefix, "output"))
        quantize_outputs(model, module, outputs, scale, zero_point)
