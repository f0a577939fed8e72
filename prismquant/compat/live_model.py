"""A model that a caller holds in memory: found in a wrapper, written as a checkpoint, put back.

The engine works from a folder, a unit at a time. What counts is what the caller holds: weights are
written as they are in memory, whatever was changed since they were loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prismquant.errors import DataError, ModelError, StorageError
from prismquant.export.companions import files_to_copy
from prismquant.export.compressed_tensors.stored import open_checkpoint
from prismquant.export.load_quantized import simulate_activations
from prismquant.memory import readable_bytes
from prismquant.models.attention import hook_attention, hooked, unhook_attention
from prismquant.runtime.input_rotation import InputRotation
from prismquant.runtime.kv_cache import KVHook
from prismquant.runtime.linear import ActivationQuantizer, QuantLinear
from prismquant.shards import ShardReader
from prismquant.storage import copy_file, write_tensors

# Bytes of tensors that go into one file.
_SHARD = 1 << 30
# Modules that stand around layers; their tensors are none of the model's.
_AROUND = (ActivationQuantizer, KVHook)


@dataclass(frozen=True, eq=False)
class LiveModel:
    """A model of transformers in memory, and the object that the caller holds it by.

    Attributes:
        model: The model, with its head.
        holder: A wrapper around it, or the model itself.
    """

    model: nn.Module
    holder: Any

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The device of its first parameter."""
        return next(self.model.parameters()).device

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by their module paths, those of a tied head once.

        Raises:
            ModelError: Some are not in memory, or an online rotation stands before a layer.
        """
        modules = dict(self.model.named_modules())
        rotated = [name for name, module in modules.items() if isinstance(module, InputRotation)]
        if rotated:
            raise ModelError(
                "an earlier call rotates inputs of this model at run time, which a checkpoint of "
                "its weights does not say",
                where=rotated[0].rpartition(".")[0],
                remedy="quantize all parts in one call, or load the model again",
            )
        around = [f"{name}." for name, module in modules.items() if isinstance(module, _AROUND)]
        found: dict[str, Tensor] = {}
        places: set[tuple[int, torch.Size]] = set()
        for name, tensor in self.model.state_dict().items():
            if name.startswith(tuple(around)):
                continue
            if tensor.is_meta:
                raise ModelError(
                    "the tensor is not in memory: it was offloaded",
                    where=name,
                    remedy="load the model without device_map, or with memory enough for all of it",
                )
            place = (tensor.data_ptr(), tensor.shape)
            if place not in places or not self._says_tied:
                found[name] = tensor
            places.add(place)
        return found

    @property
    def _says_tied(self) -> bool:
        return bool(getattr(self.config, "tie_word_embeddings", False))


def model_in(holder: Any) -> nn.Module | None:
    """The outermost model of transformers with a language head that an object is, or holds.

    Args:
        holder: A model, or a wrapper with the model as its ``model``.
    """
    for candidate in (holder, getattr(holder, "model", None)):
        whole = isinstance(candidate, nn.Module) and hasattr(candidate, "config")
        if whole and isinstance(getattr(candidate, "lm_head", None), nn.Module):
            return candidate
    return None


def write_description(live: LiveModel, folder: Path) -> bool:
    """Write a model's configuration and, where it has one, its processor into a folder.

    The processor is the wrapper's (``holder.processor``); without one, the files in the folder that
    the model was loaded from.

    Returns:
        Whether there is a processor.

    Raises:
        DataError: The processor cannot be saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processor = getattr(live.holder, "processor", None)
    if processor is not None:
        try:
            processor.save_pretrained(folder)
        except Exception as error:
            raise DataError(
                f"the processor of the wrapper cannot be saved: {error}",
                where=type(processor).__name__,
                remedy="give it the processor that AutoProcessor.from_pretrained loads",
            ) from error
    home = Path(str(getattr(live.config, "_name_or_path", "") or ""))
    if processor is None and (home / "config.json").is_file():
        for path in files_to_copy(home):
            copy_file(path, folder / path.relative_to(home))
    generation = getattr(live.model, "generation_config", None)
    if generation is not None and not (folder / "generation_config.json").exists():
        generation.save_pretrained(folder)
    live.config.save_pretrained(folder)
    return (folder / "tokenizer_config.json").is_file()


def write_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors as shards of safetensors into a folder.

    Raises:
        StorageError: The disk has no room for them and for the result.
    """
    needed = 2 * sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"the model and its quantized twin take {readable_bytes(needed)} for the length of the "
            f"call, but only {readable_bytes(free)} are free",
            where=str(folder),
            remedy="free space, or set TMPDIR to a folder on a larger disk",
        )
    for number, part in enumerate(_shards(tensors), start=1):
        write_tensors(folder / f"model-{number:05d}.safetensors", part)


def put_back(live: LiveModel, source: Path, result: Path, names: Collection[str]) -> None:
    """Give a model the weights of a quantized checkpoint, and its roundings at run time; in place.

    Args:
        live: The model.
        source: The checkpoint that was written of it, from which it is restored after an error.
        result: The finished checkpoint, whose names are the model's module paths.
        names: Tensors that the model's checkpoint had.
    """
    model, undo = live.model, _undo(live.model)
    before, head = dict(model.named_modules()), getattr(model, "lm_head", None)
    try:
        checkpoint = open_checkpoint(result)
        _copy_weights(model, checkpoint.reader, names)
        simulate_activations(model, checkpoint)
    except BaseException:
        undo()
        _copy_weights(model, ShardReader(source), names)
        raise
    weight = f"{checkpoint.arch.head}.weight"
    if head is not None and weight not in names and weight in checkpoint.reader.names:
        # A rotation has untied it.
        held = head.weight
        values = checkpoint.reader.read(weight).to(held.device, held.dtype)
        head.weight = nn.Parameter(values, requires_grad=held.requires_grad)
        live.config.tie_word_embeddings = False
    for name, module in model.named_modules():
        if module is not before.get(name, module):
            _take_over_hooks(module, before[name])


def remove_quantizers(holder: Any) -> None:
    """Let a model's inputs, outputs, keys and values pass in floating point again; in place.

    Weights stay as they are, and so do rotations of inputs, which the weights need.

    Args:
        holder: A model, or a wrapper with the model as its ``model``.

    Raises:
        ModelError: It is no model.
    """
    model = model_in(holder)
    if model is None:
        raise ModelError(f"a {type(holder).__name__} is no model, and holds none as its .model")
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.input_quantizer = None
            module.output_quantizer = None
    unhook_attention(model)


def _copy_weights(model: nn.Module, reader: ShardReader, names: Collection[str]) -> None:
    """Copy tensors of a checkpoint into a model, in the dtype and on the device that they have."""
    with torch.no_grad():
        for name in names:
            owner, _, leaf = name.rpartition(".")
            held: Tensor = getattr(model.get_submodule(owner), leaf)
            held.data.copy_(reader.read(name).reshape(held.shape))


def _undo(model: nn.Module) -> Callable[[], None]:
    """Takes out again what is put around a model's layers from now on."""
    modules = dict(model.named_modules())
    around = {
        layer: (layer.input_rotation, layer.input_quantizer, layer.output_quantizer)
        for layer in modules.values()
        if isinstance(layer, QuantLinear)
    }
    hooks = [(module, hook) for module in modules.values() if (hook := hooked(module)) is not None]

    def undo() -> None:
        unhook_attention(model)
        for attention, hook in hooks:
            hook_attention(attention, hook)
        for name, module in modules.items():
            owner, _, leaf = name.rpartition(".")
            if name and model.get_submodule(name) is not module:
                setattr(model.get_submodule(owner), leaf, module)
        for layer, had in around.items():
            layer.input_rotation, layer.input_quantizer, layer.output_quantizer = had

    return undo


def _take_over_hooks(module: nn.Module, old: nn.Module) -> None:
    """Let a caller's hooks on a module stay on the one that takes its place; handles still work."""
    for name in (
        "_forward_pre_hooks",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        setattr(module, name, getattr(old, name))


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in parts of so many bytes, or of one tensor."""
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if part and sum(one.nbytes for one in part.values()) + tensor.nbytes > _SHARD:
            yield part
            part = {}
        part[name] = tensor
    if part:
        yield part
