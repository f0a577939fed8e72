"""Loading a checkpoint that PrismQuant, or another writer of compressed-tensors, made."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from prismquant.export.compressed_tensors import (
    SIGNS,
    DequantizingReader,
    StoredScheme,
    read_rotations,
    read_schemes,
)
from prismquant.models.config import empty_model, identify, native_config
from prismquant.models.load import materialize
from prismquant.models.names import NameMap, choose_layout
from prismquant.pipeline.group import parameters
from prismquant.runtime.quant_linear import quantize_inputs, quantize_outputs, rotate_inputs
from prismquant.storage import ShardReader, read_json


def load_model(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Load a checkpoint, quantized or not, for simulation.

    Weights are what the checkpoint stores, dequantized; inputs are quantized as its configuration
    says.

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
    called = _config_names(model, names, remote=arch.config_map is not None)
    config = read_json(folder / "config.json")
    schemes = {called[n]: scheme for n, scheme in read_schemes(config, list(called)).items()}
    rotations = {called[n]: block for n, block in read_rotations(config, list(called)).items()}
    disk = {module: names.to_disk(f"{module}.weight").removesuffix(".weight") for module in schemes}
    reader = DequantizingReader(folder, {disk[module]: schemes[module] for module in schemes})
    stored = shards.info(names.to_disk(f"{arch.embeddings}.weight")).dtype
    materialize(model, "", reader, names, device, dtype or stored)
    for module, block in rotations.items():
        signs = f"{names.to_disk(f'{module}.weight').removesuffix('.weight')}.{SIGNS}"
        rotate_inputs(model, module, block, shards.read(signs) if signs in shards.names else None)
    for module, scheme in schemes.items():
        _quantize_activations(model, module, scheme, reader, disk[module])
    return model


def _quantize_activations(
    model: nn.Module, module: str, scheme: StoredScheme, reader: DequantizingReader, prefix: str
) -> None:
    """Put quantizers around a layer, as the checkpoint says."""
    if scheme.activations is not None:
        columns = reader.split_columns(prefix)
        scale, zero_point = parameters(reader.static_scale(prefix, "input"))
        index = columns.index if columns else None
        quantize_inputs(model, module, scheme.activations, scale, zero_point, index)
    if scheme.outputs is not None:
        scale, zero_point = parameters(reader.static_scale(prefix, "output"))
        quantize_outputs(model, module, scheme.outputs, scale, zero_point)


def _config_names(model: nn.Module, names: NameMap, *, remote: bool) -> dict[str, str]:
    """What the configuration calls each linear layer -> its module path."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not remote:
        return {name: name for name in linears}
    return {names.to_disk(f"{name}.weight").removesuffix(".weight"): name for name in linears}
