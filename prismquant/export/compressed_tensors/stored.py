"""A checkpoint that exists, seen layer by layer: what an exporter reads from.

Nothing is loaded when a checkpoint is opened: names, schemes and shapes come from its configuration
and from headers. Tensors are read one layer at a time, whichever shards they lie in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prismquant.errors import FormatError, ModelError, StorageError
from prismquant.export.compressed_tensors.expected import (
    layer_faults_of,
    model_faults,
    require_tensors,
)
from prismquant.export.compressed_tensors.reader import (
    DequantizingReader,
    FiniteReader,
    StoredLayer,
    read_schemes,
    static_scale,
)
from prismquant.formats.quantized_layer import OutlierColumns, QuantizedTensor, StaticScale
from prismquant.formats.section import (
    CONFIG_KEY,
    METHOD,
    PRIVATE_KEY,
    SPLIT_INDEX,
    Section,
)
from prismquant.formats.section_grammar import read_section
from prismquant.formats.spec import NumberSpec
from prismquant.models.arch import ArchSpec
from prismquant.models.config import identify, native_config, read_config
from prismquant.models.load import empty_model
from prismquant.models.names import NameMap, choose_layout
from prismquant.shards import NO_VIEWS, ShardReader, TensorView

_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint folder, opened.

    Attributes:
        folder: Where it is.
        arch: Its architecture.
        config: The content of ``config.json``.
        section: Its ``quantization_config``, read.
        names: Between names on disk and module paths.
        layers: All linear layers, in the order of the modules.
        shards: Its tensors as they are stored; what is in floating point is finite.
        reader: Its tensors in floating point.
        says_tied: Whether its configuration calls the head the embedding.
    """

    folder: Path
    arch: ArchSpec
    config: Mapping[str, Any]
    section: Section
    names: NameMap
    layers: tuple[StoredLayer, ...]
    shards: FiniteReader
    reader: DequantizingReader
    says_tied: bool = False

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
        """True if the configuration asks for a quantized key-value cache."""
        return self.section.cache is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of everything that is not quantized: that of the embeddings."""
        return _embedding_dtype(self.shards, self.names, self.arch)

    @property
    def plain_config(self) -> dict[str, Any]:
        """``config.json`` without what it says of quantization, and of a tie that is none."""
        from prismquant.export.compressed_tensors.plain_config import (  # of exports alone
            untied_config,
            without_sections,
        )

        part = self.arch.config_part
        config = without_sections(self.config, part)
        return config if self.tied == self.says_tied else untied_config(config, part)

    @property
    def tied(self) -> bool:
        """True if the head is the embedding: what is stored counts more than what is said."""
        return self.says_tied and self.names.to_disk(f"{self.arch.head}.weight") not in (
            self.reader.names
        )

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
        spec = layer.inputs if side == "input" else layer.outputs
        return None if spec is None else static_scale(self.shards, layer.prefix, side, spec)

    def signs(self, layer: StoredLayer) -> Tensor | None:
        """Signs of a layer's input before its rotation, int8 ``[in]``; None: ones.

        Raises:
            FormatError: They are none.
        """
        from prismquant.export.compressed_tensors.layer_edits import read_signs

        return read_signs(self.shards, layer.prefix, layer.shape[1])

    def columns(self, layer: StoredLayer) -> OutlierColumns | None:
        """The columns of a layer that stay in floating point, if there are any."""
        if f"{layer.prefix}.{SPLIT_INDEX}" not in self.shards.names:
            return None
        from prismquant.export.compressed_tensors.layer_edits import read_outlier_columns

        return read_outlier_columns(self.shards, layer.prefix, layer.shape)

    def splits(self, layer: StoredLayer) -> bool:
        """True if single columns of a layer stay in floating point."""
        return self.columns(layer) is not None

    def reorders(self, layer: StoredLayer) -> bool:
        """True if groups of a layer are of columns that are no neighbours."""
        reordered = layer.scheme is not None and layer.scheme.reordered
        return reordered and self.codes(layer).group_index is not None

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
        ModelError, FormatError, StorageError: It cannot be read, its tensors are not what its
            configuration says, or a run that writes it has not finished.
    """
    if not (folder / "config.json").is_file() and (folder / "prismquant" / "record.json").is_file():
        raise StorageError(
            "the run that writes this checkpoint has not finished",
            where=str(folder),
            remedy="finish it with `prismquant quantize .. --resume`",
        )
    arch = identify(folder)
    config = read_config(folder)
    if is_leftover(folder, config):
        del config[CONFIG_KEY]
    section = read_section(config)
    section.require()
    model = empty_model(native_config(arch, folder), arch)
    shards = FiniteReader(folder)
    names = choose_layout(arch.layouts, shards.names, dict(model.named_modules()))
    views = stored_views(arch, model, names, shards)
    if views:
        shards = FiniteReader(folder, views=views)
    linears_of = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    called = {names.in_config(name): name for name in linears_of}
    linears = {
        said: Linear(
            name, names.to_disk(f"{name}.weight").removesuffix(".weight"), _shape(model, name)
        )
        for said, name in called.items()
    }
    layers = read_layers(config, section, linears, arch)
    tensors = {name: shards.info(name) for name in shards.names}
    faults = [*layer_faults_of(layers, tensors), *model_faults(model, names, layers, tensors)]
    require_tensors(folder, faults)
    _embedding_dtype(shards, names, arch)
    stored = {x.prefix: (x.scheme, x.shape) for x in layers if x.scheme is not None}
    reader = DequantizingReader(folder, stored, views)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return StoredCheckpoint(folder, arch, config, section, names, layers, shards, reader, tied)


def stored_views(
    arch: ArchSpec, model: nn.Module, names: NameMap, shards: ShardReader
) -> Mapping[str, TensorView]:
    """Layers' weights that lie within larger stored tensors, by the names that they have alone."""
    if not arch.experts and not any(layout.joined for layout in arch.layouts):
        return NO_VIEWS
    from prismquant.models.bind_experts import shown_tensors  # of few models

    return shown_tensors(arch, model, names, {name: shards.info(name) for name in shards.names})[0]


@dataclass(frozen=True)
class Linear:
    """A linear layer of a model.

    Attributes:
        name: Its module path.
        prefix: What its tensors' names begin with on disk.
        shape: ``(out, in)``.
    """

    name: str
    prefix: str
    shape: tuple[int, int]


def read_layers(
    config: Mapping[str, Any], section: Section, linears: Mapping[str, Linear], arch: ArchSpec
) -> tuple[StoredLayer, ...]:
    """The linear layers of a model, each with the way in which it is stored.

    Args:
        config: The content of ``config.json``.
        section: Its ``quantization_config``, read.
        linears: The model's linear layers, by what the configuration calls them.
        arch: The architecture.

    Raises:
        FormatError: The configuration says something that PrismQuant does not read.
    """
    aliases = other_names({said: linear.name for said, linear in linears.items()}, arch)
    schemes = read_schemes(section, list(linears), aliases)
    widths = {said: linear.shape[1] for said, linear in linears.items()}
    rotations = _rotations(section, widths, aliases)
    _require_known_cache(section)
    sides = {name: (scheme.activations, scheme.outputs) for name, scheme in schemes.items()}
    # What our own section says is more exact.
    sides |= _private_sides(config, linears)
    return tuple(
        StoredLayer(
            linear.name,
            called=said,
            prefix=linear.prefix,
            shape=linear.shape,
            scheme=schemes.get(said),
            rotation=rotations.get(said),
            inputs=sides.get(said, (None, None))[0],
            outputs=sides.get(said, (None, None))[1],
        )
        for said, linear in linears.items()
    )


def _require_known_cache(section: Section) -> None:
    """Refuse a key-value cache that PrismQuant does not have.

    Raises:
        FormatError: It is one.
    """
    if section.cache is not None:
        from prismquant.export.compressed_tensors.kv_section import read_kv_cache_scheme

        read_kv_cache_scheme(section)


def _private_sides(
    config: Mapping[str, Any], layers: Collection[str]
) -> dict[str, tuple[NumberSpec | None, NumberSpec | None]]:
    """Formats of inputs and outputs that only our own section declares."""
    if PRIVATE_KEY not in config:
        return {}
    from prismquant.export.compressed_tensors.private_section import read_private

    return read_private(config, layers)


def _rotations(
    section: Section, widths: Mapping[str, int], aliases: Mapping[str, Collection[str]]
) -> dict[str, int]:
    """Widths of the blocks in which inputs are rotated."""
    if not section.transforms:
        return {}
    from prismquant.export.compressed_tensors.layer_edits import read_rotations

    return read_rotations(section, widths, aliases)


def other_names(called: Mapping[str, str], arch: ArchSpec) -> dict[str, tuple[str, ...]]:
    """Other names that a configuration may have for each layer: its module path, those on disk.

    Args:
        called: What the configuration calls each layer -> its module path.
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


def is_leftover(folder: Path, config: Mapping[str, Any]) -> bool:
    """True if a configuration has the section of another method beside weights in floating point.

    Args:
        folder: The checkpoint.
        config: The content of its ``config.json``.
    """
    section = config.get(CONFIG_KEY)
    if not isinstance(section, Mapping) or section.get("quant_method") == METHOD:
        return False
    from prismquant.models.bind import bind

    with contextlib.suppress(ModelError, StorageError):
        return bind(folder).source is None
    return False


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
