"""Checkpoints in the compressed-tensors format, written step by step and read back.

The rules that readers (vLLM, transformers with the compressed-tensors library) enforce, and that
this module keeps:

- ``quantization_config`` sits at the top level of ``config.json``; inside a group only known keys
  are allowed, and every group says its own ``format``.
- Targets and ignores are explicit module paths, disjoint, never overlapping patterns: the readers
  order overlapping patterns differently.
- Tensors keep the names of the source checkpoint, with ``weight`` replaced by ``weight_packed``,
  ``weight_scale``, ``weight_shape`` and, for asymmetric formats only, ``weight_zero_point``.
- Every file of the source other than weights and ``config.json`` is copied byte for byte.

``config.json`` is written last: until then no reader takes the folder for a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prismquant.errors import FormatError, StorageError
from prismquant.formats.packed import QuantizedTensor, pack, unpack
from prismquant.formats.spec import NumberSpec
from prismquant.models.arch import SiteKind
from prismquant.models.bind import BoundModel, BoundStep
from prismquant.pipeline.engine import SolvedLayer
from prismquant.pipeline.plan import DENSE, Plan, PlanRow
from prismquant.storage import (
    INDEX_NAME,
    ShardReader,
    TensorInfo,
    copy_file,
    read_header,
    read_json,
    write_json,
    write_tensors,
)

# The version of the configuration's grammar that is written; older readers know it too.
CONFIG_VERSION = "0.17.0"
CONFIG_KEY = "quantization_config"
METHOD = "compressed-tensors"
_SUFFIXES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_INPUT_SUFFIXES = ("input_scale", "input_zero_point")
_COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}


class CheckpointWriter:
    """Writes a run's shards as its steps finish, and the rest of the checkpoint at the end.

    Args:
        folder: The output folder.
        bound: The source model.
        plan: What is quantized, and in which layout.
    """

    def __init__(self, folder: Path, bound: BoundModel, plan: Plan) -> None:
        self.folder = folder
        self.bound = bound
        self.plan = plan
        self._reader = ShardReader(bound.folder)

    def write_step(self, step: BoundStep, layers: Sequence[SolvedLayer]) -> str:
        """Write one step's shard: its quantized layers, and its other tensors as they are."""
        solved = {f"{layer.row.site.disk_name}.weight": layer for layer in layers}
        tensors: dict[str, Tensor] = {}
        for name in self._names_of(step):
            layer = solved.pop(name, None)
            tensors |= {name: self._reader.read(name)} if layer is None else _layer_tensors(layer)
        if solved:
            raise StorageError(f"the source has no tensor {next(iter(solved))!r}", where=step.name)
        shard = self._shard_name(self.bound.steps.index(step) + 1)
        write_tensors(self.folder / shard, tensors)
        return shard

    def read_step(self, shard: str, rows: Sequence[PlanRow]) -> list[SolvedLayer]:
        """The quantized layers of a shard that was written earlier."""
        reader = ShardReader(self.folder, files=[shard])
        return [self._read_layer(reader, row) for row in rows]

    def finish(self) -> None:
        """Write what belongs to no step, the index, the copied files, and ``config.json`` last."""
        loose = {name: self._reader.read(name) for name in self._loose_names()}
        write_tensors(self.folder / self._shard_name(len(self.bound.steps) + 1), loose)
        write_json(self.folder / INDEX_NAME, self._index())
        for source in _files_to_copy(self.bound.folder):
            copy_file(source, self.folder / source.relative_to(self.bound.folder))
        config = dict(read_json(self.bound.folder / "config.json"))
        groups = quantization_config(self.plan, self.bound)
        write_json(self.folder / "config.json", config | ({CONFIG_KEY: groups} if groups else {}))

    def _read_layer(self, reader: ShardReader, row: PlanRow) -> SolvedLayer:
        prefix, weights = row.site.disk_name, row.weights
        if weights is None:
            raise StorageError("a layer without a weight format has no codes", where=row.site.name)
        if row.layout == DENSE:
            codes = reader.read(f"{prefix}.weight").reshape(row.site.out_features, -1)
            # A dense layer is stored dequantized: its values stand for themselves.
            return SolvedLayer(row, DenseWeight(codes), None, None)
        weight = _unpack(reader, prefix, StoredScheme(weights, row.activations, row.layout))
        return SolvedLayer(row, weight, *_input_parameters(reader, prefix))

    def _names_of(self, step: BoundStep) -> list[str]:
        prefix = f"{step.name}."
        return [
            n
            for n in sorted(self._reader.names)
            if self.bound.names.to_module(n).startswith(prefix)
        ]

    def _loose_names(self) -> list[str]:
        taken = {name for step in self.bound.steps for name in self._names_of(step)}
        return sorted(self._reader.names - taken)

    def _shard_name(self, number: int) -> str:
        return f"model-{number:05d}-of-{len(self.bound.steps) + 1:05d}.safetensors"

    def _index(self) -> dict[str, Any]:
        weight_map: dict[str, str] = {}
        size = 0
        for number in range(1, len(self.bound.steps) + 2):
            shard = self._shard_name(number)
            infos = read_header(self.folder / shard)
            weight_map |= dict.fromkeys(infos, shard)
            size += sum(info.nbytes for info in infos.values())
        return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


@dataclass(frozen=True)
class DenseWeight:
    """A weight that is stored as the values it stands for.

    Attributes:
        values: [out, in] in the checkpoint's dtype.
    """

    values: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values in ``dtype``."""
        return self.values.to(dtype)


def quantization_config(plan: Plan, bound: BoundModel) -> dict[str, Any] | None:
    """The ``quantization_config`` of a plan; None where nothing is stored quantized."""
    schemes: dict[tuple[NumberSpec | None, NumberSpec | None, str], list[str]] = {}
    for row in plan.quantized:
        if row.layout != DENSE:
            key = (row.weights, row.activations, row.layout)
            schemes.setdefault(key, []).append(_config_name(bound, row.site.name))
    if not schemes:
        return None
    groups = {
        f"group_{number}": {
            "targets": sorted(names),
            "format": layout,
            "weights": _arguments(weights),
            "input_activations": _arguments(activations),
            "output_activations": None,
        }
        for number, ((weights, activations, layout), names) in enumerate(schemes.items())
    }
    layouts = {group["format"] for group in groups.values()}
    quantized = {name for names in schemes.values() for name in names}
    linears = {_config_name(bound, name) for name in _linears(bound)}
    return {
        "quant_method": METHOD,
        "version": CONFIG_VERSION,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": sorted(linears - quantized),
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": groups,
    }


@dataclass(frozen=True)
class StoredScheme:
    """How one layer of a checkpoint is stored, as its configuration says.

    Attributes:
        weights: The weight's number format.
        activations: The input's, or None.
        layout: ``pack-quantized`` or ``int-quantized``.
    """

    weights: NumberSpec
    activations: NumberSpec | None
    layout: str


def read_schemes(config: Mapping[str, Any], linears: Sequence[str]) -> dict[str, StoredScheme]:
    """Which linear layers of a model are stored quantized, and how.

    Args:
        config: The content of ``config.json``.
        linears: Names of the model's linear layers, as the configuration calls them.

    Raises:
        FormatError: The method or a format is one that PrismQuant does not read.
    """
    section = config.get(CONFIG_KEY)
    if not section:
        return {}
    if section.get("quant_method") != METHOD:
        raise FormatError(
            f"quantization method {section.get('quant_method')!r} cannot be read",
            remedy=f"only {METHOD} checkpoints and unquantized ones can be loaded",
        )
    ignored = section.get("ignore") or []
    schemes: dict[str, StoredScheme] = {}
    for group in section["config_groups"].values():
        scheme = StoredScheme(
            _specification(group["weights"]),
            _specification(group["input_activations"]) if group.get("input_activations") else None,
            group.get("format") or section["format"],
        )
        for name in linears:
            if _hit(name, group["targets"]) and not _hit(name, ignored):
                schemes.setdefault(name, scheme)
    return schemes


class DequantizingReader(ShardReader):
    """A checkpoint seen as if it were in floating point: packed weights are unpacked when they are
    read.

    Args:
        folder: The checkpoint.
        schemes: How layers are stored, by prefix of their names on disk.
    """

    def __init__(self, folder: Path, schemes: Mapping[str, StoredScheme]) -> None:
        super().__init__(folder)
        self._schemes = schemes

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, each quantized layer's as one ``weight``."""
        hidden = {
            f"{prefix}.{suffix}"
            for prefix in self._schemes
            for suffix in (*_SUFFIXES, *_INPUT_SUFFIXES)
        }
        return (super().names - hidden) | {f"{prefix}.weight" for prefix in self._schemes}

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        scheme, prefix = self._scheme(name)
        if scheme is None:
            return super().info(name)
        scale = super().info(f"{prefix}.weight_scale")
        return TensorInfo(scale.dtype, tuple(self.read(name).shape), scale.file)

    def read(self, name: str) -> Tensor:
        """The tensor; a quantized weight dequantized in float32."""
        scheme, prefix = self._scheme(name)
        if scheme is None:
            return super().read(name)
        weight = _unpack(ShardReader(self.folder, [self._shard(prefix)]), prefix, scheme)
        return weight.dequantize(torch.float32)

    def input_parameters(self, prefix: str) -> tuple[Tensor | None, Tensor | None]:
        """The static scale and zero point of a layer's input, where the checkpoint has them."""
        return _input_parameters(ShardReader(self.folder, [self._shard(prefix)]), prefix)

    def _scheme(self, name: str) -> tuple[StoredScheme | None, str]:
        prefix, _, leaf = name.rpartition(".")
        return (self._schemes.get(prefix) if leaf == "weight" else None), prefix

    def _shard(self, prefix: str) -> str:
        return super().info(f"{prefix}.weight_scale").file


def _config_name(bound: BoundModel, module_name: str) -> str:
    """Readers look a layer up by the path it has in their model."""
    if bound.arch.config_map is None:
        return module_name
    return bound.names.to_disk(f"{module_name}.weight").removesuffix(".weight")


def _linears(bound: BoundModel) -> list[str]:
    sites = [site.name for site in bound.sites if site.kind is SiteKind.LINEAR]
    return [*sites, *(name for name, _ in bound.left_alone)]


def _layer_tensors(layer: SolvedLayer) -> dict[str, Tensor]:
    prefix, row = layer.row.site.disk_name, layer.row
    if not isinstance(layer.weight, QuantizedTensor):
        raise StorageError("the layer's codes are not at hand", where=row.site.name)
    if row.layout == DENSE:
        values = layer.weight.dequantize(layer.weight.scale.dtype).reshape(row.site.weight_shape)
        return {f"{prefix}.weight": values}
    tensors = {f"{prefix}.{k}": v for k, v in pack(layer.weight, row.layout).items()}
    # Layers that share an input share its scale in memory; on disk each has its own.
    if layer.input_scale is not None:
        tensors[f"{prefix}.input_scale"] = layer.input_scale.clone()
    if layer.input_zero_point is not None:
        tensors[f"{prefix}.input_zero_point"] = layer.input_zero_point.clone()
    return tensors


def _input_parameters(reader: ShardReader, prefix: str) -> tuple[Tensor | None, Tensor | None]:
    scale, zero_point = (
        reader.read(name) if name in reader.names else None
        for name in (f"{prefix}.{suffix}" for suffix in _INPUT_SUFFIXES)
    )
    return scale, zero_point


def _unpack(reader: ShardReader, prefix: str, scheme: StoredScheme) -> QuantizedTensor:
    names = {suffix: f"{prefix}.{suffix}" for suffix in _SUFFIXES}
    tensors = {s: reader.read(n) for s, n in names.items() if n in reader.names}
    try:
        return unpack(tensors, scheme.weights, scheme.layout)
    except FormatError as error:
        raise FormatError(error.what, where=prefix, remedy=error.remedy) from error


def _arguments(spec: NumberSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": str(spec.granularity),
        "group_size": spec.group_size,
        "dynamic": spec.dynamic,
    }


def _specification(arguments: Mapping[str, Any]) -> NumberSpec:
    if arguments.get("type", "int") != "int":
        raise FormatError(f"numbers of type {arguments['type']!r} cannot be read yet")
    group_size = arguments.get("group_size")
    inferred = (
        "group" if group_size and group_size > 0 else "channel" if group_size == -1 else "tensor"
    )
    granularity = arguments.get("strategy") or inferred
    return NumberSpec.from_dict(
        {
            "bits": arguments["num_bits"],
            "granularity": granularity,
            "group_size": group_size if granularity == "group" else None,
            "symmetric": arguments.get("symmetric", True),
            "dynamic": bool(arguments.get("dynamic", False)),
        }
    )


def _hit(name: str, patterns: Sequence[str]) -> bool:

    return any(
        re.match(p[3:], name) if p.startswith("re:") else p in (name, "Linear") for p in patterns
    )


def _files_to_copy(folder: Path) -> Iterator[Path]:
    """Tokenizer, processor, template and code files; some templates lie one level down."""
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        about_weights = path.name == "config.json" or path.name.endswith(".index.json")
        hidden = path.name.startswith(".")
        if path.is_file() and path.suffix in _COPIED and not about_weights and not hidden:
            yield path
