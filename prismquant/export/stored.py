"""A checkpoint that exists, seen layer by layer: what an exporter reads from.

Nothing is loaded when a checkpoint is opened: names, schemes and shapes come from its configuration
and from headers. Tensors are read one layer at a time, whichever shards they lie in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prismquant.errors import FormatError, ModelError, StorageError
from prismquant.export.arguments import PRIVATE_KEY, read_private
from prismquant.export.compressed_tensors import (
    CONFIG_KEY,
    METHOD,
    SIGNS,
    DequantizingReader,
    StoredScheme,
    read_rotations,
    read_schemes,
)
from prismquant.formats.packed import QuantizedTensor
from prismquant.formats.spec import NumberSpec
from prismquant.models.arch import ArchSpec
from prismquant.models.bind import bind
from prismquant.models.config import identify, native_config
from prismquant.models.empty import empty_model
from prismquant.models.names import NameMap, choose_layout
from prismquant.numerics.hadamard import block_hadamard
from prismquant.pipeline.group import StaticScale
from prismquant.storage import ShardReader, read_json

_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")


@dataclass(frozen=True)
class StoredLayer:
    """One linear layer of a checkpoint.

    Attributes:
        name: Its module path in transformers.
        called: What the checkpoint's configuration calls it.
        prefix: What its tensors' names begin with on disk.
        shape: ``(out, in)``.
        scheme: How it is stored; None: in floating point.
        rotation: Width of the Hadamard blocks that rotate its input at run time; None: no rotation.
        inputs, outputs: In what numbers its input and its output are; None: floating point. A layer
            that is stored in floating point may have them too.
    """

    name: str
    called: str
    prefix: str
    shape: tuple[int, int]
    scheme: StoredScheme | None
    rotation: int | None
    inputs: NumberSpec | None = None
    outputs: NumberSpec | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is an ordinary linear layer."""
        parts = (self.scheme, self.rotation, self.inputs, self.outputs)
        return all(part is None for part in parts)


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint folder, opened.

    Attributes:
        folder: Where it is.
        arch: Its architecture.
        config: The content of ``config.json``.
        names: Between names on disk and module paths.
        layers: All linear layers, in the order of the modules.
        shards: Its tensors as they are stored.
        reader: Its tensors in floating point.
    """

    folder: Path
    arch: ArchSpec
    config: Mapping[str, Any]
    names: NameMap
    layers: tuple[StoredLayer, ...]
    shards: ShardReader
    reader: DequantizingReader

    @property
    def quantized(self) -> tuple[StoredLayer, ...]:
        """The layers that are stored in codes."""
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @property
    def simulated(self) -> tuple[StoredLayer, ...]:
        """The layers whose input or output is quantized."""
        return tuple(layer for layer in self.layers if layer.inputs or layer.outputs)

    @property
    def rotated(self) -> tuple[StoredLayer, ...]:
        """The layers whose input is rotated at run time."""
        return tuple(layer for layer in self.layers if layer.rotation is not None)

    @property
    def has_cache_scales(self) -> bool:
        """Whether the configuration asks for a quantized key-value cache."""
        return bool((self.config.get(CONFIG_KEY) or {}).get("kv_cache_scheme"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of everything that is not quantized: that of the embeddings."""
        return _embedding_dtype(self.shards, self.names, self.arch)

    @property
    def plain_config(self) -> dict[str, Any]:
        """``config.json`` without what it says of quantization."""
        said = (CONFIG_KEY, PRIVATE_KEY)
        return {key: value for key, value in self.config.items() if key not in said}

    def codes(self, layer: StoredLayer) -> QuantizedTensor:
        """A quantized layer's codes and scales, as they are stored."""
        return self.reader.quantized(layer.prefix)

    def scale(self, layer: StoredLayer) -> Tensor:
        """A quantized layer's scale, where possible without reading the codes."""
        if layer.scheme is not None and layer.scheme.weights.scale != "float":
            return self.codes(layer).scale
        return self.shards.read(f"{layer.prefix}.weight_scale")

    def static_scale(self, layer: StoredLayer, side: str) -> StaticScale | None:
        """The static scale of a layer's ``input`` or ``output``, if there is one."""
        return self.reader.static_scale(layer.prefix, side)

    def signs(self, layer: StoredLayer) -> Tensor | None:
        """What a layer's input is multiplied by before its rotation, int8 ``[in]``; None: ones."""
        name = f"{layer.prefix}.{SIGNS}"
        return self.shards.read(name) if name in self.shards.names else None

    def splits(self, layer: StoredLayer) -> bool:
        """Whether single columns of a layer stay in floating point."""
        return self.reader.split_columns(layer.prefix) is not None

    def values(self, layer: StoredLayer) -> Tensor:
        """The weight that gives a layer's output from its input as the model has it.

        Returns:
            float32 ``[out, in]``: dequantized, columns that were split off put back, and a rotation
            of the input undone.
        """
        values = self.reader.read(f"{layer.prefix}.weight").float().reshape(layer.shape)
        if layer.rotation is None:
            return values
        # y = W' H S x, with H symmetric: W = W' H S.
        values = block_hadamard(values, layer.rotation)
        signs = self.signs(layer)
        return values if signs is None else values * signs.float()

    def walk(self) -> Iterator[tuple[StoredLayer | None, str]]:
        """All that a model consists of, shard by shard.

        Yields:
            ``(None, name)`` for a tensor that is kept as it is, and ``(layer, name)`` with the name
            on disk that its weight has in floating point for a layer that is not plain, once,
            whatever its number of tensors. What belongs to a layer's input or output, to a rotation
            or to the key-value cache is left out.
        """
        owners = {layer.prefix: layer for layer in self.layers if not layer.is_plain}
        met: set[str] = set()
        for name in sorted(self.shards.names, key=lambda name: (self.shards.info(name).file, name)):
            owner = self._owner(name, owners)
            if owner is None:
                if not (self.has_cache_scales and name.endswith(_CACHE_SCALES)):
                    yield None, name
            elif name == f"{owner.prefix}.bias":
                yield None, name
            elif owner.prefix not in met:
                met.add(owner.prefix)
                yield owner, f"{owner.prefix}.weight"

    @staticmethod
    def _owner(name: str, owners: Mapping[str, StoredLayer]) -> StoredLayer | None:
        """The layer below whose path a tensor lies; transforms lie one level deeper."""
        parent = name.rpartition(".")[0]
        return owners.get(parent) or owners.get(parent.rpartition(".")[0])


def open_checkpoint(folder: Path) -> StoredCheckpoint:
    """Open a finished checkpoint, quantized or not.

    Raises:
        ModelError, FormatError, StorageError: It cannot be read, or a run that writes it has not
            finished.
    """
    if not (folder / "config.json").is_file() and (folder / "prismquant" / "record.json").is_file():
        raise StorageError(
            "the run that writes this checkpoint has not finished",
            where=str(folder),
            remedy="finish it with `prismquant quantize .. --resume`",
        )
    arch = identify(folder)
    model = empty_model(native_config(arch, folder), arch)
    shards = ShardReader(folder)
    names = choose_layout(arch.layouts, shards.names, dict(model.named_modules()))
    called = _config_names(model, names, remote=arch.config_map is not None)
    config = _without_leftovers(folder, read_json(folder / "config.json"))
    aliases = _other_names(called, arch)
    schemes = read_schemes(config, list(called), aliases)
    rotations = read_rotations(config, _widths(model, called), aliases)
    sides = {name: (scheme.activations, scheme.outputs) for name, scheme in schemes.items()}
    # What our own section says is more exact.
    sides |= read_private(config)
    layers = tuple(
        StoredLayer(
            name,
            called=said,
            prefix=names.to_disk(f"{name}.weight").removesuffix(".weight"),
            shape=_shape(model, name),
            scheme=schemes.get(said),
            rotation=rotations.get(said),
            inputs=sides.get(said, (None, None))[0],
            outputs=sides.get(said, (None, None))[1],
        )
        for said, name in called.items()
    )
    stored = {layer.prefix: layer.scheme for layer in layers if layer.scheme is not None}
    reader = DequantizingReader(folder, stored)
    return StoredCheckpoint(folder, arch, config, names, layers, shards, reader)


def _without_leftovers(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the section of another method beside weights in floating point."""
    section = config.get(CONFIG_KEY)
    if isinstance(section, dict) and section.get("quant_method") != METHOD:
        with contextlib.suppress(ModelError):
            bind(folder)
            return {key: value for key, value in config.items() if key != CONFIG_KEY}
    return config


def _config_names(model: nn.Module, names: NameMap, *, remote: bool) -> dict[str, str]:
    """What the configuration calls each linear layer -> its module path."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not remote:
        return {name: name for name in linears}
    return {names.to_disk(f"{name}.weight").removesuffix(".weight"): name for name in linears}


def _other_names(called: Mapping[str, str], arch: ArchSpec) -> dict[str, tuple[str, ...]]:
    """What else a configuration may call each layer: its module path, its names on disk.

    Args:
        called: From :func:`_config_names`.
        arch: The architecture.
    """
    layouts = [NameMap(layout.name, layout.rewrites) for layout in arch.layouts]

    def names(module: str) -> Iterator[str]:
        yield module
        for layout in layouts:
            # A layout may lack a part of the model.
            with contextlib.suppress(ModelError):
                yield layout.to_disk(f"{module}.weight").removesuffix(".weight")

    return {said: tuple(dict.fromkeys(names(module))) for said, module in called.items()}


def _widths(model: nn.Module, called: Mapping[str, str]) -> dict[str, int]:
    """Input features of each linear layer, by what the configuration calls it."""
    return {said: _shape(model, name)[1] for said, name in called.items()}


def _embedding_dtype(shards: ShardReader, names: NameMap, arch: ArchSpec) -> torch.dtype:
    """The dtype of the stored embeddings.

    Raises:
        FormatError: They are quantized.
        StorageError: They are missing.
    """
    name = names.to_disk(f"{arch.embeddings}.weight")
    if f"{name}_scale" in shards.names:
        raise FormatError(
            "quantized embeddings cannot be read",
            where=name,
            remedy="quantize again with the embeddings in ignore",
        )
    return shards.info(name).dtype


def _shape(model: nn.Module, name: str) -> tuple[int, int]:
    rows, columns = model.get_submodule(name).get_parameter("weight").shape
    return (rows, columns)
