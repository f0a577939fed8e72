"""A checkpoint as the rules see it: configuration, headers, and the model's layers by both names.

Everything is read once and leniently: a shard that is cut short, an index that lies or an
architecture that is not known is remembered for the rules to tell, and what can be checked without
it still is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prismquant.check import vllm_view as vllm
from prismquant.check.findings import Reader
from prismquant.errors import FormatError, ModelError, PrismQuantError, StorageError
from prismquant.export.compressed_tensors.expected import (
    by_layer,
    is_stored_packed,
    layer_faults,
    plain_faults,
    ungrouped_fault,
)
from prismquant.export.compressed_tensors.private_section import read_private
from prismquant.export.compressed_tensors.section import (
    CONFIG_KEY,
    DENSE,
    METHOD,
    Fault,
    Matcher,
    SchemeGroup,
    Section,
    Targets,
    group_in_prismquant,
    group_in_transformers,
)
from prismquant.export.compressed_tensors.section_grammar import read_section
from prismquant.export.compressed_tensors.stored import other_names
from prismquant.headers import TensorInfo, read_header
from prismquant.models.arch import Cached, Parallel, SiteKind
from prismquant.models.arch_files import known_archs
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel, BoundSite
from prismquant.storage import INDEX_NAME, ShardReader, read_index, read_json

COMPRESSED_TENSORS = METHOD
GGUF = "gguf"
MODELOPT_FILE = "hf_quant_config.json"
# Tensors of which the values are told, such as static scales.
_SCALAR_BYTES = 1024
# What else is read of scales and norms: of a tensor, and in all.
_MOST_BYTES, _MOST_BYTES_IN_ALL = 16 << 20, 256 << 20
SCALE_SUFFIXES = frozenset(
    {
        *("weight_scale", "weight_scale_2", "weight_global_scale", "k_scale", "v_scale", "scales"),
        *("input_scale", "output_scale", "input_global_scale", "output_global_scale"),
    }
)
_VALUES = SCALE_SUFFIXES | {"weight_shape", "weight_g_idx", "input_zero_point"}
# Far more shards than any real checkpoint has.
_MOST_SHARDS = 10_000


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    Attributes:
        name: Its module path.
        called: What a configuration calls it.
        disk: Prefix of its tensors.
        out_features, in_features: Shape of its weight.
        site: Its site; None for a linear that is never quantized.
        is_head: Whether it is the language model's head.
        group: The group that it belongs to, as the reader in question finds it.
        in_vllm: What vLLM finds; None where vLLM does not know the architecture.
        in_transformers: The group that transformers finds.
    """

    name: str
    called: str
    disk: str
    out_features: int
    in_features: int
    site: BoundSite | None
    is_head: bool
    group: SchemeGroup | None
    in_vllm: vllm.Found | None
    in_transformers: SchemeGroup | None

    @property
    def fuse_key(self) -> str | None:
        """Equal for layers that servers fuse."""
        return self.site.fuse_key if self.site else None

    @property
    def role(self) -> str:
        """Its role; empty for a linear without one."""
        return self.site.role if self.site else ""

    @property
    def row_parallel(self) -> bool:
        """Whether servers split its input, rather than its output, over GPUs."""
        return self.site is not None and self.site.parallel is Parallel.ROW


@dataclass(frozen=True)
class Checkpoint:
    """What the rules look at.

    Attributes:
        folder: Where it is.
        target: The reader in question.
        config: ``config.json``; empty for GGUF files, which have none.
        section: Its ``quantization_config`` as it stands; empty where there is none.
        read: What is read of it.
        headers: Shard -> what its header says.
        unreadable: Shard -> why its header cannot be read.
        index: The index file's content; None where there is none.
        modelopt_file: ModelOpt's own file; None where there is none.
        model: The model as its architecture describes it; None where it is not known.
        model_fault: Why not.
        model_known: Whether its architecture is one that PrismQuant knows.
        layers: Its linear layers.
    """

    folder: Path
    target: Reader | None
    config: Mapping[str, Any]
    section: Mapping[str, Any]
    read: Section
    headers: Mapping[str, Mapping[str, TensorInfo]]
    unreadable: Mapping[str, str]
    index: Mapping[str, Any] | None
    modelopt_file: Mapping[str, Any] | None
    model: BoundModel | None
    model_fault: str
    model_known: bool
    layers: tuple[Layer, ...] = ()
    _values: dict[str, tuple[float, ...] | None] = field(
        default_factory=dict, repr=False, compare=False
    )
    _readers: dict[str, ShardReader] = field(default_factory=dict, repr=False, compare=False)

    @property
    def method(self) -> str:
        """The quantization method in lower case; empty where there is none."""
        return self.read.method

    @property
    def groups(self) -> tuple[SchemeGroup, ...]:
        """The groups of a compressed-tensors configuration."""
        return self.read.groups

    @property
    def matcher(self) -> Matcher:
        """Compares names with the configuration's targets."""
        return self.read.matcher

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        return {name: info for header in self.headers.values() for name, info in header.items()}

    @property
    def ignore(self) -> Targets:
        """What a compressed-tensors configuration leaves alone."""
        return self.read.ignore

    @property
    def quantized(self) -> tuple[Layer, ...]:
        """Layers that belong to a group."""
        return tuple(layer for layer in self.layers if layer.group is not None)

    def of_group(self) -> Iterator[tuple[SchemeGroup, tuple[Layer, ...]]]:
        """Well-formed groups that have layers, with them."""
        for group in self.groups:
            members = tuple(layer for layer in self.layers if layer.group is group)
            if members and group.well_formed:
                yield group, members

    def fused(self) -> Iterator[tuple[Layer, ...]]:
        """Sets of layers that servers fuse."""
        sets: dict[str, list[Layer]] = {}
        for layer in self.layers:
            if layer.fuse_key is not None:
                sets.setdefault(layer.fuse_key, []).append(layer)
        return (tuple(members) for members in sets.values())

    def attentions(self) -> dict[str, Layer]:
        """Prefix on disk of each attention module of the language model -> its key projection."""
        return {
            layer.disk.rpartition(".")[0]: layer
            for layer in self.layers
            if layer.site is not None and layer.site.cache is Cached.KEYS
        }

    @functools.cached_property
    def faults(self) -> tuple[Fault, ...]:
        """What loading refuses of the configuration and of the tensors, from their headers."""
        return (*self.read.faults, *_header_faults(self))

    @functools.cached_property
    def private(self) -> Mapping[str, tuple[str, ...]]:
        """Layer -> sides (``input``, ``output``) of which our own section tells the format."""
        try:
            found = read_private(self.config, {layer.called for layer in self.layers})
        except FormatError:
            return {}  # another rule tells
        sides = ("input", "output")
        return {
            name: tuple(side for side, spec in zip(sides, specs, strict=True) if spec is not None)
            for name, specs in found.items()
        }

    @functools.cached_property
    def of_values(self) -> frozenset[str]:
        """Scales, norms, biases, and what else is small beside a weight."""
        return frozenset(
            name
            for name, info in self.tensors.items()
            if name.rpartition(".")[2] in _VALUES
            or (len(info.shape) < 2 and info.dtype.is_floating_point)
        )

    @functools.cached_property
    def small(self) -> frozenset[str]:
        """Those of them that may be read: the smallest ones, all together in moments."""
        sizes = sorted((self.tensors[name].nbytes, name) for name in self.of_values)
        held = itertools.accumulate(size for size, _ in sizes)
        return frozenset(
            name
            for (size, name), total in zip(sizes, held, strict=True)
            if size <= _MOST_BYTES and total <= _MOST_BYTES_IN_ALL
        )

    def scalar(self, name: str) -> tuple[float, ...] | None:
        """The values of a small tensor; None where it is missing, large or not readable."""
        if name not in self._values:
            info = self.tensors.get(name)
            small = info is not None and info.nbytes <= _SCALAR_BYTES
            tensor = self.read_tensor(name) if small else None
            values = None if tensor is None else tensor.to(torch.float64).flatten().tolist()
            self._values[name] = None if values is None else tuple(values)
        return self._values[name]

    def read_tensor(self, name: str) -> Tensor | None:
        """A tensor of any size; None where it is missing or not readable."""
        info = self.tensors.get(name)
        if info is None:
            return None
        try:
            return self._reader(info.file).read(name)
        except PrismQuantError:
            return None

    def _reader(self, file: str) -> ShardReader:
        if file not in self._readers:
            self._readers[file] = ShardReader(self.folder, [file])
        return self._readers[file]


def _header_faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """What loading refuses of the tensors, from their headers."""
    held, coded = by_layer(checkpoint.tensors), checkpoint.method in ("", METHOD)
    for layer in checkpoint.layers:
        group = layer.group
        if group is not None and group.well_formed:
            shape = (layer.out_features, layer.in_features)
            own = held.get(layer.disk, {})
            private = checkpoint.private.get(layer.called, ())
            yield from layer_faults(layer.disk, group, shape, own, private)
        elif group is None and coded and is_stored_packed(layer.disk, checkpoint.tensors):
            yield ungrouped_fault(layer.disk)
    yield from plain_faults(_plain(checkpoint), checkpoint.tensors)


def _plain(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names on disk and shapes of what is not quantized."""
    model = checkpoint.model
    if model is None:
        return
    packed = {
        f"{layer.name}.weight" for layer in checkpoint.layers if _has_codes(checkpoint, layer)
    }
    tied = f"{model.arch.head}.weight" if model.tied else None
    for name, shape in model.shapes.items():
        if name not in packed and name != tied:
            yield model.names.to_disk(name), shape


def _has_codes(checkpoint: Checkpoint, layer: Layer) -> bool:
    """Whether a layer's weight is another rule's matter: quantized, or of another method."""
    if checkpoint.method not in ("", METHOD):
        return True
    return layer.group is not None and layer.group.layout != DENSE


def open_checkpoint(folder: Path, target: Reader | None) -> Checkpoint:
    """Read what the rules look at.

    Raises:
        ModelError: There is no folder, or no readable ``config.json`` in it.
    """
    config = _config(folder)
    modelopt_file = _modelopt_file(folder)
    read, section = read_section(config), config.get(CONFIG_KEY)
    section = section if isinstance(section, Mapping) else {}
    if not section and modelopt_file and not read.faults:
        # Older exports of ModelOpt say how they are quantized in a file of their own only.
        read, section = Section("modelopt"), {"quant_method": "modelopt"}
    if not config:
        read, section = Section(GGUF), {"quant_method": GGUF}
    headers: dict[str, Mapping[str, TensorInfo]] = {}
    unreadable: dict[str, str] = {}
    index = _index(folder, unreadable)
    for name in _shards(folder, index, unreadable):
        try:
            headers[name] = read_header(folder / name)
        except StorageError as error:
            unreadable[name] = error.what
    model, fault = _model(folder)
    checkpoint = Checkpoint(
        folder=folder,
        target=target,
        config=config,
        section=section,
        read=read,
        headers=headers,
        unreadable=unreadable,
        index=index,
        modelopt_file=modelopt_file,
        model=model,
        model_fault=fault,
        model_known=_is_known(config),
    )
    if model is None:
        return checkpoint
    try:
        return replace(checkpoint, layers=tuple(_layers(checkpoint, model)))
    except PrismQuantError as error:
        # Its patterns take too long: the grammar is told, and nothing about layers.
        faults = (*read.faults, Fault("config.pattern", error.what, CONFIG_KEY, error.remedy or ""))
        return replace(
            checkpoint,
            read=replace(read, faults=faults),
            model=None,
            model_fault=error.what,
            model_known=False,
        )


def _config(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"there is no folder {str(folder)!r}")
    if not (folder / "config.json").exists() and any(folder.glob("*.gguf")):
        return {}
    try:
        config = read_json(folder / "config.json")
    except StorageError as error:
        raise ModelError(
            error.what,
            where=str(folder),
            remedy="config.json is written last: without it the run is unfinished, run it "
            "again with --resume; or restore it from the original checkpoint",
        ) from error
    if not isinstance(config, Mapping) or not config:
        raise ModelError(
            "config.json is not an object with keys", where=str(folder / "config.json")
        )
    return config


def _modelopt_file(folder: Path) -> Mapping[str, Any] | None:
    if not (folder / MODELOPT_FILE).is_file():
        return None
    try:
        content = read_json(folder / MODELOPT_FILE)
    except StorageError:
        return {}
    return content if isinstance(content, Mapping) else {}


def _index(folder: Path, unreadable: dict[str, str]) -> Mapping[str, Any] | None:
    try:
        if (weight_map := read_index(folder)) is None:
            return None
        metadata = read_json(folder / INDEX_NAME).get("metadata")
    except StorageError as error:
        unreadable[INDEX_NAME] = error.what
        return None
    return {"weight_map": weight_map, "metadata": metadata}


def _shards(folder: Path, index: Mapping[str, Any] | None, unreadable: dict[str, str]) -> list[str]:
    """Names of shards: those of the index, and those that lie there besides."""
    named = set(index["weight_map"].values()) if index else set()
    if len(named) > _MOST_SHARDS:
        unreadable[INDEX_NAME] = f"the index names {len(named)} shards"
        named = set()
    lying = {path.name for path in folder.glob("*.safetensors") if not path.name.startswith(".")}
    return sorted(named | lying)


def _model(folder: Path) -> tuple[BoundModel | None, str]:
    try:
        return bind(folder, headers_required=False, quantized=True), ""
    except PrismQuantError as error:
        return None, error.what


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether the folder claims to be a model that PrismQuant knows, or claims nothing."""
    kind = config.get("model_type")
    return not isinstance(kind, str) or any(
        kind in arch.model_types for arch in known_archs().values()
    )


def _layers(checkpoint: Checkpoint, model: BoundModel) -> Iterator[Layer]:
    sites = {site.name: site for site in model.sites if site.kind is SiteKind.LINEAR}
    spare = [item.name for item in model.left_alone if item.is_linear]
    found = _found_in_vllm(checkpoint, model, [*sites, *spare])
    for name in [*sites, *spare]:
        disk = _disk(model, name)
        called = disk if model.arch.config_map is not None else name
        out_features, in_features = model.shapes[f"{name}.weight"]
        in_transformers = group_in_transformers(called, checkpoint.read)
        in_vllm, group = found.get(name), in_transformers
        if checkpoint.target in (Reader.VLLM, Reader.SGLANG) and in_vllm is not None:
            group = in_vllm.group
        elif checkpoint.target is Reader.PRISMQUANT:
            (names,) = other_names({called: name}, model.arch).values()
            group = group_in_prismquant((called, *names), checkpoint.read)
        yield Layer(
            name=name,
            called=called,
            disk=disk,
            out_features=out_features,
            in_features=in_features,
            site=sites.get(name),
            is_head=name == model.arch.head,
            group=group,
            in_vllm=in_vllm,
            in_transformers=in_transformers,
        )


def _found_in_vllm(
    checkpoint: Checkpoint, model: BoundModel, names: list[str]
) -> dict[str, vllm.Found]:
    own_names = model.arch.vllm
    if own_names is None or model.arch.config_map is not None:
        return {}
    keys = {site.name: site.fuse_key for site in model.sites}
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(keys.get(name) or name, []).append(name)
    found: dict[str, vllm.Found] = {}
    section = vllm.renamed(checkpoint.read, own_names)
    for key, members in parts.items():
        label = key.rpartition(":")[2] if keys.get(members[0]) else None
        one = vllm.find_group(
            members,
            model.arch.fused.get(label or ""),
            section,
            own_names,
            head=members[0] == model.arch.head,
        )
        found |= dict.fromkeys(members, one)
    return found


def _disk(model: BoundModel, name: str) -> str:
    return model.names.to_disk(f"{name}.weight").removesuffix(".weight")
