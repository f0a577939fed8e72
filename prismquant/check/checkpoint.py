"""A checkpoint as the rules see it: configuration, headers, and the model's layers by both names.

Everything is read once and leniently: a shard that is cut short, an index that lies or an
architecture that is not known is remembered for the rules to tell, and what can be checked without
it still is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prismquant.check import vllm_view as vllm
from prismquant.check.target_reader import TargetReader
from prismquant.errors import FormatError, PrismQuantError
from prismquant.export.compressed_tensors.expected import (
    by_layer,
    is_stored_packed,
    layer_faults,
    plain_faults,
    ungrouped_fault,
)
from prismquant.export.compressed_tensors.private_section import read_private
from prismquant.formats.section import (
    DENSE,
    METHOD,
    Fault,
    Matcher,
    SchemeGroup,
    Section,
    Targets,
)
from prismquant.headers import TensorInfo
from prismquant.models.arch import Cached, Parallel
from prismquant.models.bound import BoundModel, BoundSite
from prismquant.shards import ShardReader

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


@dataclass(frozen=True)
class CheckedLayer:
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
        """Role of the layer; empty for a linear without one."""
        return self.site.role if self.site else ""

    @property
    def row_parallel(self) -> bool:
        """Whether servers split its input, rather than its output, over GPUs."""
        return self.site is not None and self.site.parallel is Parallel.ROW


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint with all that rules look at.

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
    target: TargetReader | None
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
    layers: tuple[CheckedLayer, ...] = ()
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
        """Layers that a compressed-tensors configuration leaves alone."""
        return self.read.ignore

    @property
    def quantized(self) -> tuple[CheckedLayer, ...]:
        """Layers that belong to a group."""
        return tuple(layer for layer in self.layers if layer.group is not None)

    def of_group(self) -> Iterator[tuple[SchemeGroup, tuple[CheckedLayer, ...]]]:
        """Well-formed groups that have layers, with them."""
        for group in self.groups:
            members = tuple(layer for layer in self.layers if layer.group is group)
            if members and group.well_formed:
                yield group, members

    def fused(self) -> Iterator[tuple[CheckedLayer, ...]]:
        """Sets of layers that servers fuse."""
        sets: dict[str, list[CheckedLayer]] = {}
        for layer in self.layers:
            if layer.fuse_key is not None:
                sets.setdefault(layer.fuse_key, []).append(layer)
        return (tuple(members) for members in sets.values())

    def attentions(self) -> dict[str, CheckedLayer]:
        """Prefix on disk of each attention module of the language model -> its key projection."""
        return {
            layer.disk.rpartition(".")[0]: layer
            for layer in self.layers
            if layer.site is not None and layer.site.cache is Cached.KEYS
        }

    @functools.cached_property
    def faults(self) -> tuple[Fault, ...]:
        """Faults that loading refuses, of the configuration and of the tensors' headers."""
        return (*self.read.faults, *_header_faults(self))

    @functools.cached_property
    def private(self) -> Mapping[str, tuple[str, ...]]:
        """Layer name -> sides (``input``, ``output``) whose format our own section tells."""
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
        """Names of values that may be read: the smallest ones, all together in moments."""
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
    """Faults of the tensors that loading refuses, from their headers."""
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


def _has_codes(checkpoint: Checkpoint, layer: CheckedLayer) -> bool:
    """Whether a layer's weight is another rule's matter: quantized, or of another method."""
    if checkpoint.method not in ("", METHOD):
        return True
    return layer.group is not None and layer.group.layout != DENSE
