"""Weights into modules, a piece at a time or all at once.

A model starts empty (parameters without memory, real buffers). :func:`materialize` fills one module
from the shards and reads only that module's tensors; :func:`release` gives the memory back.
Evaluation loads everything through the same reader, so that every layout, also the remote-code one,
runs in the native transformers class. Nothing here reads a pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from prismquant.errors import ModelError
from prismquant.models.empty import empty_model
from prismquant.storage import ShardReader

if TYPE_CHECKING:
    from prismquant.models.names import NameMap

__all__ = [
    "load_float",
    "materialize",
    "release",
]


def materialize(
    model: nn.Module,
    prefix: str,
    reader: ShardReader,
    names: NameMap,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> None:
    """Fill all parameters and buffers below a module path.

    Tied weights share memory when both ends are filled. Buffers that are not stored, such as rotary
    frequencies, are moved to the device and keep their dtype.

    Args:
        model: From :func:`empty_model`.
        prefix: Module path; empty for the whole model.
        reader: The checkpoint.
        names: Its names.
        device: Where the tensors go.
        dtype: Floating dtype of the parameters; None keeps the dtype on disk.

    Raises:
        ModelError: The path does not exist, or a tensor has another shape than its parameter.
        StorageError: A tensor is missing or unreadable.
    """
    # With its index, so that tied ends on one device are recognized as such.
    device = torch.empty(0, device=device).device
    for path, module in _below(model, prefix):
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{path}.{leaf}" if path else leaf
            shared = _tied_tensor(model, full, reader, names, device, dtype)
            value = shared if shared is not None else _read(full, reader, names, device, dtype)
            if value.shape != parameter.shape:
                raise ModelError(
                    f"{full}: shape {tuple(value.shape)} on disk, not {tuple(parameter.shape)}",
                    where=str(reader.folder),
                )
            module._parameters[leaf] = (
                value
                if isinstance(value, nn.Parameter)
                else nn.Parameter(value, requires_grad=False)
            )
        for leaf, buffer in module._buffers.items():
            if buffer is None:
                continue
            full = f"{path}.{leaf}" if path else leaf
            if leaf in module._non_persistent_buffers_set:
                module._buffers[leaf] = buffer.to(device)
            else:
                module._buffers[leaf] = _read(full, reader, names, device, dtype)


def release(model: nn.Module, prefix: str) -> None:
    """Turn the parameters below a module path back into shapes without memory.

    Raises:
        ModelError: The path does not exist.
    """
    for _, module in _below(model, prefix):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def load_float(
    folder: Path | str,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a whole unquantized model for evaluation.

    Args:
        folder: The checkpoint, in any described layout.
        dtype: Floating dtype of the parameters; None keeps the dtypes on disk.
        device: Where it goes.

    Returns:
        The native transformers model in eval mode, without gradients or cache.

    Raises:
        ModelError: The folder does not fit its architecture.
        StorageError: A shard is broken.
    """
    from prismquant.models.bind import bind

    bound = bind(folder)
    model = empty_model(bound.config, bound.arch)
    materialize(model, "", ShardReader(bound.folder), bound.names, device, dtype)
    return model


def _below(model: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    try:
        top = model.get_submodule(prefix)
    except AttributeError as error:
        raise ModelError(f"the model has no module {prefix!r}") from error
    return [
        (f"{prefix}.{path}" if prefix and path else prefix or path, module)
        for path, module in top.named_modules()
    ]


def _read(
    name: str,
    reader: ShardReader,
    names: NameMap,
    device: torch.device,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    tensor = reader.read(names.to_disk(name))
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.to(device)


def _tied_tensor(
    model: nn.Module,
    name: str,
    reader: ShardReader,
    names: NameMap,
    device: torch.device,
    dtype: torch.dtype | None,
) -> torch.Tensor | None:
    """The tensor of the other end of a tie, or None when the name is not tied or must be read."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return None
    pairs: dict[str, str] = getattr(model, "_tied_weights_keys", None) or {}
    partner = pairs.get(name) or next((t for t, s in pairs.items() if s == name), None)
    if partner is None:
        return None
    stored = name if names.to_disk(name) in reader.names else partner
    if stored == name and names.to_disk(partner) in reader.names:
        return None  # both are stored: two weights, whatever the config says
    owner, _, leaf = partner.rpartition(".")
    other = model.get_submodule(owner)._parameters[leaf]
    wanted = dtype or reader.info(names.to_disk(stored)).dtype
    if other is not None and other.device == device and other.dtype == wanted:
        return other
    return _read(stored, reader, names, device, dtype)
