"""Weights into modules, a piece at a time or all at once.

A model starts empty (parameters without memory, real buffers). :func:`materialize` fills one module
from the shards and reads only that module's tensors; :func:`release` gives the memory back.
Evaluation loads everything through the same reader, so that every layout, also the remote-code one,
runs in the native transformers class. Nothing here reads a pickle.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prismquant.errors import DataError, ModelError
from prismquant.models.bind import bind
from prismquant.models.config import (
    config_value,
    empty_model,
    identify,
    import_transformers,
    native_config,
)
from prismquant.storage import ShardReader, read_json

if TYPE_CHECKING:
    from prismquant.models.arch import ArchSpec, ProcessorMap
    from prismquant.models.names import NameMap

__all__ = [
    "load_float",
    "load_processor",
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
    bound = bind(folder)
    model = empty_model(bound.config, bound.arch)
    materialize(model, "", ShardReader(bound.folder), bound.names, device, dtype)
    return model


def load_processor(folder: Path | str, *, trust_remote_code: bool = False) -> Any:
    """Load tokenizer, image and video processor of a checkpoint.

    Where the checkpoint's own processor is remote code, the native one is built from its settings,
    with a chat template that writes one placeholder for each image or video.

    Args:
        folder: The checkpoint.
        trust_remote_code: Let transformers run Python files of the folder.

    Raises:
        DataError: Files are missing, or torchvision, which video processors need.
        ModelError: The folder is not a checkpoint of a known architecture.
    """
    folder = Path(folder)
    arch = identify(folder)
    transformers = import_transformers()
    if importlib.util.find_spec("torchvision") is None:
        raise DataError(
            "the video processors of transformers need torchvision, which is not installed",
            where=str(folder),
            remedy="pip install 'prismquant[vision]'",
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise _no_processor(folder, "it has neither tokenizer.json nor vocab.json")
    settings = ("processor_config.json", "preprocessor_config.json")
    if not any((folder / name).is_file() for name in settings):
        raise _no_processor(folder, f"it has neither {settings[0]} nor {settings[1]}")
    try:
        if arch.processor_map is not None and not trust_remote_code:
            return _native_processor(arch, arch.processor_map, folder, transformers)
        return transformers.AutoProcessor.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise _no_processor(folder, str(error)) from error


def _no_processor(folder: Path, why: str) -> DataError:
    return DataError(
        f"the checkpoint's processor cannot be loaded: {why}",
        where=str(folder),
        remedy="copy the tokenizer and processor files of the original checkpoint into the folder",
    )


def _native_processor(arch: ArchSpec, table: ProcessorMap, folder: Path, transformers: Any) -> Any:
    settings = read_json(folder / "preprocessor_config.json")
    common = {key: settings[key] for key in table.keys if key in settings}
    patch = int(config_value(native_config(arch, folder), "vision_config.patch_size"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def build(name: str) -> Any:
        kind = getattr(transformers, name)
        # Sizes are given in visual tokens; the native processors count pixels.
        pixels = (patch * int(kind.merge_size)) ** 2
        size = {
            edge: int(settings[key]) * pixels
            for edge, key in (
                ("shortest_edge", table.min_tokens),
                ("longest_edge", table.max_tokens),
            )
            if key in settings
        }
        return kind(**common, **({"size": size} if len(size) == 2 else {}))

    return getattr(transformers, table.hf_class)(
        image_processor=build(table.image_class),
        tokenizer=tokenizer,
        video_processor=build(table.video_class),
        chat_template=table.chat_template,
    )


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
