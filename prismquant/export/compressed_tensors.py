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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prismquant.errors import FormatError, StorageError
from prismquant.export.arguments import arguments, private_section, specification
from prismquant.export.kv_cache import ROTATED_AT, key_rotation, kv_cache_scheme
from prismquant.formats.packed import QuantizedTensor, pack, unpack
from prismquant.formats.spec import NumberSpec
from prismquant.headers import TensorInfo, read_header
from prismquant.models.arch import SiteKind
from prismquant.models.bind import BoundModel, BoundSite, BoundStep
from prismquant.models.rotation import untied
from prismquant.numerics.hadamard import hadamard_matrix
from prismquant.pipeline.chain import source_reader
from prismquant.pipeline.group import SolvedLayer, SplitColumns, StaticScale
from prismquant.pipeline.kv import KVScales
from prismquant.pipeline.kv_plan import KVLayer
from prismquant.pipeline.layout import DENSE, is_declarable
from prismquant.pipeline.plan import Plan, PlanRow
from prismquant.storage import (
    INDEX_NAME,
    ShardReader,
    copy_file,
    read_json,
    write_json,
    write_tensors,
)

# The version of the configuration's grammar that is written; older readers know it too.
CONFIG_VERSION = "0.17.0"
CONFIG_KEY = "quantization_config"
METHOD = "compressed-tensors"
_SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
)
_SIDES = ("input_activations", "output_activations")
SIGNS, SPLIT_INDEX, SPLIT_WEIGHT = "input_signs", "split_index", "split_weight"
_ACTIVATION_SUFFIXES = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    SIGNS,
    SPLIT_INDEX,
    SPLIT_WEIGHT,
)
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
        self._reader = source_reader(plan, bound)

    def write_step(
        self, step: BoundStep, layers: Sequence[SolvedLayer], changed: Mapping[str, Tensor]
    ) -> str:
        """Write one step's shard: its quantized layers, what was changed, the rest as it is."""
        solved = {f"{layer.row.site.disk_name}.weight": layer for layer in layers}
        tensors = {self.bound.names.to_disk(name): tensor for name, tensor in changed.items()}
        for name in self._names_of(step):
            layer = solved.pop(name, None)
            if layer is not None:
                tensors |= _layer_tensors(layer)
            elif name not in tensors:
                tensors[name] = self._reader.read(name)
        if solved:
            raise StorageError(f"the source has no tensor {next(iter(solved))!r}", where=step.name)
        tensors |= self._rotations(step)
        shard = self._shard_name(self.bound.steps.index(step) + 1)
        write_tensors(self.folder / shard, tensors)
        return shard

    def read_step(self, shard: str, rows: Sequence[PlanRow]) -> list[SolvedLayer]:
        """The quantized layers of a shard that was written earlier."""
        reader = ShardReader(self.folder, files=[shard])
        return [self._read_layer(reader, row) for row in rows]

    def read_plain(self, shard: str, rows: Sequence[PlanRow]) -> dict[str, Tensor]:
        """All tensors of a shard that are not of these layers' weights and inputs."""
        reader = ShardReader(self.folder, files=[shard])
        known = {self.bound.names.to_disk(name) for name in self.bound.shapes}
        weights = {f"{row.site.disk_name}.weight" for row in rows}
        plain = sorted((reader.names & known) - weights)
        return {self.bound.names.to_module(name): reader.read(name) for name in plain}

    def read_kv(self, shard: str, layer: KVLayer) -> KVScales:
        """The scales of an attention layer's keys and values, of a shard written earlier."""
        reader = ShardReader(self.folder, files=[shard])
        key, value = (reader.read(self.bound.names.to_disk(name)) for name in layer.tensors)
        return KVScales(key, value)

    def finish(self) -> None:
        """Write what belongs to no step, the index, the copied files, and ``config.json`` last."""
        loose = {name: self._reader.read(name) for name in self._loose_names()}
        write_tensors(self.folder / self._shard_name(len(self.bound.steps) + 1), loose)
        write_json(self.folder / INDEX_NAME, self._index())
        for source in files_to_copy(self.bound.folder):
            copy_file(source, self.folder / source.relative_to(self.bound.folder))
        config = dict(read_json(self.bound.folder / "config.json"))
        # What was quantized already was refused: such a section is one that was left behind.
        config.pop(CONFIG_KEY, None)
        tied = self.bound.tied and not untied(self.bound, self.plan.rotations)
        if self.bound.config.tie_word_embeddings and not tied:
            config = _untied_config(config)
        if groups := quantization_config(self.plan, self.bound):
            config |= {CONFIG_KEY: groups}
        rows = ((_config_name(self.bound, row.site.name), row) for row in self.plan.quantized)
        write_json(self.folder / "config.json", config | private_section(rows))

    def _read_layer(self, reader: ShardReader, row: PlanRow) -> SolvedLayer:
        prefix, weights = row.site.disk_name, row.weights
        if weights is None:
            raise StorageError("a layer without a weight format has no codes", where=row.site.name)
        weight: DenseWeight | QuantizedTensor
        if row.layout == DENSE:
            # A dense layer is stored dequantized: its values stand for themselves.
            values = reader.read(f"{prefix}.weight").reshape(row.site.out_features, -1)
            weight = DenseWeight(values)
        else:
            weight = _unpack(reader, prefix, StoredScheme(weights, row.layout))
        return SolvedLayer(
            row,
            weight,
            _static_scale(reader, prefix, "input"),
            _static_scale(reader, prefix, "output"),
            _split_columns(reader, prefix),
        )

    def _rotations(self, step: BoundStep) -> dict[str, Tensor]:
        """What readers need to rotate the inputs of a step's layers: the matrix, the signs."""
        tensors: dict[str, Tensor] = {}
        for row in self.plan.rows:
            if row.site.step == step.index and row.online is not None:
                prefix, block = row.site.disk_name, row.online.block
                matrix = hadamard_matrix(block).to(row.site.dtype)
                tensors[f"{prefix}.{_transform_name(block)}_input.weight"] = matrix
                if row.online.signs is not None:
                    tensors[f"{prefix}.{SIGNS}"] = row.online.signs
        return tensors

    def _names_of(self, step: BoundStep) -> list[str]:
        prefix = f"{step.name}."
        return [
            n
            for n in sorted(self._reader.names)
            if self.bound.names.to_module(n).startswith(prefix)
        ]

    def _loose_names(self) -> list[str]:
        taken = {name for step in self.bound.steps for name in self._names_of(step)}
        # A step may have changed a tensor that belongs to none, such as a norm between towers.
        for number in range(1, len(self.bound.steps) + 1):
            taken |= read_header(self.folder / self._shard_name(number)).keys()
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


_Key = tuple[NumberSpec | None, NumberSpec | None, NumberSpec | None, str]


def quantization_config(plan: Plan, bound: BoundModel) -> dict[str, Any] | None:
    """The ``quantization_config`` of a plan; None where there is nothing to say.

    A rotation at run time, or a quantized key-value cache, is told even where no layer is stored
    quantized.
    """
    schemes: dict[_Key, list[str]] = {}
    for row in plan.quantized:
        if row.layout != DENSE:
            sides = [spec if spec and is_declarable(spec) else None for spec in row.sides]
            key = (row.weights, sides[0], sides[1], row.layout)
            schemes.setdefault(key, []).append(_config_name(bound, row.site.name))
    transforms = _transform_config(plan, bound)
    kv_cache = plan.kv_cache.spec if plan.kv_cache else None
    if not schemes and not transforms and kv_cache is None:
        return None
    groups = {
        f"group_{number}": {
            "targets": sorted(names),
            "format": layout,
            "weights": arguments(weights),
            "input_activations": arguments(activations),
            "output_activations": arguments(outputs),
        }
        for number, ((weights, activations, outputs, layout), names) in enumerate(schemes.items())
    }
    layouts = {group["format"] for group in groups.values()} or {DENSE}
    quantized = {name for names in schemes.values() for name in names}
    linears = {_config_name(bound, name) for name in _linears(bound)}
    return {
        "quant_method": METHOD,
        "version": CONFIG_VERSION,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": sorted(linears - quantized),
        "kv_cache_scheme": kv_cache_scheme(kv_cache),
        "sparsity_config": {},
        "transform_config": transforms,
        "config_groups": groups,
    }


@dataclass(frozen=True)
class StoredScheme:
    """How one layer of a checkpoint is stored, as its configuration says.

    Attributes:
        weights: The weight's number format.
        layout: ``pack-quantized``, ``int-quantized`` or ``float-quantized``.
        activations: The input's number format, or None.
        outputs: The output's, or None.
    """

    weights: NumberSpec
    layout: str
    activations: NumberSpec | None = None
    outputs: NumberSpec | None = None


def read_schemes(
    config: Mapping[str, Any],
    linears: Sequence[str],
    aliases: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> dict[str, StoredScheme]:
    """Which linear layers of a model are stored quantized, and how.

    Where several groups aim at a layer, its own name counts more than a pattern, and a pattern more
    than the name of a class, as in the compressed-tensors library.

    Args:
        config: The content of ``config.json``.
        linears: Names of the model's linear layers, as the configuration calls them.
        aliases: Other names that a layer goes by. llm-compressor's ``ignore`` and older releases'
            targets hold names on disk (``visual.blocks.0.attn.qkv``) where transformers 5 has
            other module paths (``model.visual.blocks.0.attn.qkv``).

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
    groups = list(section["config_groups"].values())
    read = [_read_scheme(group, section.get("format")) for group in groups]
    ignored = section.get("ignore") or []
    schemes: dict[str, StoredScheme] = {}
    for name in linears:
        names = (name, *aliases.get(name, ()))
        hits = [
            (hit, i) for i, group in enumerate(groups) if (hit := _hit(names, group["targets"]))
        ]
        if not hits or _hit(names, ignored):
            continue
        chosen = min(hits)[1]
        if (scheme := read[chosen]) is not None:
            schemes[name] = scheme
        elif any(groups[chosen].get(side) for side in _SIDES):
            raise FormatError(
                "a quantized input or output of a layer whose weight is not cannot be read",
                where=name,
                remedy="give the group weights, or ignore the layer",
            )
    return schemes


def _read_scheme(group: Mapping[str, Any], layout: str | None) -> StoredScheme | None:
    """The scheme of a group; None where it has no weights, as one of attention modules."""
    if not group.get("weights"):
        return None
    layout = group.get("format") or layout
    if layout is None:
        raise FormatError(
            "the configuration does not say how weights are laid out",
            where=f"quantization_config, targets {group['targets']}",
            remedy="write format in every group",
        )
    sides = (specification(group[side]) if group.get(side) else None for side in _SIDES)
    return StoredScheme(specification(group["weights"], layout), layout, *sides)


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
            for suffix in (*_SUFFIXES, *_ACTIVATION_SUFFIXES)
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
        reader = self._own(prefix)
        values = _unpack(reader, prefix, scheme).dequantize(torch.float32)
        columns = _split_columns(reader, prefix)
        if columns is None:
            return values
        return values.index_copy_(1, columns.index, columns.weight.float())

    def quantized(self, prefix: str) -> QuantizedTensor:
        """The codes and scales of the quantized layer of that name on disk."""
        return _unpack(self._own(prefix), prefix, self._schemes[prefix])

    def static_scale(self, prefix: str, side: str) -> StaticScale | None:
        """The static scale of a layer's ``input`` or ``output``, where the checkpoint has one."""
        return _static_scale(self._own(prefix), prefix, side)

    def split_columns(self, prefix: str) -> SplitColumns | None:
        """The columns of a layer that stay in floating point, where there are any."""
        return _split_columns(self._own(prefix), prefix)

    def _scheme(self, name: str) -> tuple[StoredScheme | None, str]:
        prefix, _, leaf = name.rpartition(".")
        return (self._schemes.get(prefix) if leaf == "weight" else None), prefix

    def _own(self, prefix: str) -> ShardReader:
        # Other writers cut shards by size: a layer's tensors may lie in two of them.
        files = {info.file for name, info in self._infos.items() if name.startswith(f"{prefix}.")}
        return ShardReader(self.folder, sorted(files))


def _config_name(bound: BoundModel, module_name: str) -> str:
    """Readers look a layer up by the path it has in their model."""
    if bound.arch.config_map is None:
        return module_name
    return bound.names.to_disk(f"{module_name}.weight").removesuffix(".weight")


def _linears(bound: BoundModel) -> list[str]:
    sites = [site.name for site in bound.sites if site.kind is SiteKind.LINEAR]
    return [*sites, *(name for name, _ in bound.left_alone)]


def _layer_tensors(layer: SolvedLayer) -> dict[str, Tensor]:
    """A layer's tensors on disk; what is not in codes in the dtype of its weight."""
    prefix, dtype, row = layer.row.site.disk_name, layer.row.site.dtype, layer.row
    if not isinstance(layer.weight, QuantizedTensor):
        raise StorageError("the layer's codes are not at hand", where=row.site.name)
    if row.layout == DENSE:
        tensors = {"weight": layer.weight.dequantize(dtype).reshape(row.site.weight_shape)}
    else:
        tensors = pack(layer.weight, row.layout)
    sides = (("input", row.activations, layer.input), ("output", row.outputs, layer.output))
    for side, spec, static in sides:
        # Layers that share an input share its scale in memory; on disk each has its own.
        if static is not None and spec is not None:
            tensors[f"{side}_global_scale" if spec.scale == "e4m3" else f"{side}_scale"] = (
                static.scale.clone()
            )
            if static.zero_point is not None:
                tensors[f"{side}_zero_point"] = static.zero_point.clone()
    named = {f"{prefix}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return named | _split_tensors(layer, dtype)


def _split_tensors(layer: SolvedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Columns in floating point, padded with index -1 to as many as the plan made room for."""
    row = layer.row
    if row.split is None or not isinstance(layer.weight, QuantizedTensor):
        return {}
    index = torch.full((row.split.columns,), -1, dtype=torch.int32)
    weight = torch.zeros(row.site.out_features, row.split.columns, dtype=dtype)
    if layer.columns is not None:
        count = len(layer.columns.index)
        index[:count] = layer.columns.index.to(index)
        weight[:, :count] = layer.columns.weight.to(weight)
    prefix = row.site.disk_name
    return {f"{prefix}.{SPLIT_INDEX}": index, f"{prefix}.{SPLIT_WEIGHT}": weight}


def _split_columns(reader: ShardReader, prefix: str) -> SplitColumns | None:
    if f"{prefix}.{SPLIT_INDEX}" not in reader.names:
        return None
    index = reader.read(f"{prefix}.{SPLIT_INDEX}").long()
    used = index >= 0
    if not bool(used.any()):
        return None
    return SplitColumns(index[used], reader.read(f"{prefix}.{SPLIT_WEIGHT}")[:, used])


def _static_scale(reader: ShardReader, prefix: str, side: str) -> StaticScale | None:
    if f"{prefix}.{side}_global_scale" in reader.names:
        return StaticScale(reader.read(f"{prefix}.{side}_global_scale").reshape(1), None)
    if f"{prefix}.{side}_scale" not in reader.names:
        return None
    zero = f"{prefix}.{side}_zero_point"
    zero_point = reader.read(zero) if zero in reader.names else None
    return StaticScale(reader.read(f"{prefix}.{side}_scale"), zero_point)


def _unpack(reader: ShardReader, prefix: str, scheme: StoredScheme) -> QuantizedTensor:
    names = {suffix: f"{prefix}.{suffix}" for suffix in _SUFFIXES}
    tensors = {s: reader.read(n) for s, n in names.items() if n in reader.names}
    try:
        return unpack(tensors, scheme.weights, scheme.layout)
    except FormatError as error:
        raise FormatError(error.what, where=prefix, remedy=error.remedy) from error


def _transform_config(plan: Plan, bound: BoundModel) -> dict[str, Any]:
    """Rotations at run time, as the ``hadamard`` transforms of compressed-tensors.

    Unlike those of schemes, targets of transforms are compared with a reader's own module paths,
    which begin differently in each: hence patterns for the end of the path.
    """
    blocks: dict[int, list[str]] = {}
    for row in plan.rows:
        if row.online is not None:
            target = _path_ending(bound, row.site)
            blocks.setdefault(row.online.block, []).append(target)
    keys = key_rotation(plan.kv_cache)
    if not blocks and not keys:
        return {}
    return {
        "config_groups": keys
        | {
            _transform_name(block): {
                "type": "hadamard",
                "head_dim": block,
                "randomize": False,
                "requires_grad": False,
                "apply": [
                    {"targets": sorted(names), "location": "input", "inverse": False, "ignore": []}
                ],
            }
            for block, names in blocks.items()
        }
    }


def _transform_name(block: int) -> str:
    return f"hadamard_{block}"


def _path_ending(bound: BoundModel, site: BoundSite) -> str:
    """A pattern for one layer that holds whatever a reader puts before the tower's blocks."""
    parts = site.name.split(".")
    blocks = next(
        tower.blocks
        for tower in bound.arch.towers
        if tower.blocks and f"{tower.blocks}." in site.name
    )
    ending = ".".join(parts[blocks.count(".") :])
    alike = [other.name for other in bound.sites if f".{other.name}".endswith(f".{ending}")]
    if len(alike) > 1:
        raise FormatError(
            f"{alike} end alike: the configuration cannot tell their rotations apart",
            where=site.name,
            remedy="rotate only one of the two towers online",
        )
    return f"re:(.*[.])?{re.escape(ending)}$"


def read_rotations(
    config: Mapping[str, Any],
    linears: Mapping[str, int],
    aliases: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> dict[str, int]:
    """Which linear layers of a model rotate their input, and in blocks of what width.

    Transforms of weights were applied before these were stored, and need nothing of a reader.

    Args:
        config: The content of ``config.json``.
        linears: Input features of the model's linear layers, by what the configuration calls them.
        aliases: Other names that a layer goes by.

    Raises:
        FormatError: A transform is one that PrismQuant does not have.
    """
    section = (config.get(CONFIG_KEY) or {}).get("transform_config") or {}
    found: dict[str, int] = {}
    for name, group in (section.get("config_groups") or {}).items():
        for apply in group["apply"]:
            known = group["type"] == "hadamard" and not group.get("randomize")
            where = apply["location"]
            if where.startswith("weight_") or (known and where in ROTATED_AT):
                continue  # done, or of queries and keys: the key-value cache's affair
            if not known or where != "input":
                raise _unread_transform(name, group, where)
            for linear, width in linears.items():
                names = (linear, *aliases.get(linear, ()))
                if _hit(names, apply["targets"]) and not _hit(names, apply.get("ignore") or []):
                    block = group.get("head_dim") or width
                    if not _is_sylvester(group, block):
                        raise _unread_transform(name, group, where)
                    found[linear] = int(block)
    return found


def _is_sylvester(group: Mapping[str, Any], block: int) -> bool:
    """Whether a transform's matrix is the one that we have too.

    Across a whole width the library takes other matrices where this is no power of two.
    """
    return bool(group.get("head_dim")) or block & (block - 1) == 0


def _unread_transform(name: str, group: Mapping[str, Any], where: str) -> FormatError:
    return FormatError(
        f"transform {name!r} ({group['type']} at {where}) cannot be read",
        remedy="only hadamard transforms of inputs are supported, in blocks or across a width that "
        "is a power of two",
    )


def _untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose head has a weight of its own."""
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        config = config | {"text_config": text | {"tie_word_embeddings": False}}
    return config | {"tie_word_embeddings": False}


# What a target is, the most exact first.
_NAME, _PATTERN, _CLASS = 1, 2, 3


def _hit(names: Collection[str], targets: Sequence[str]) -> int | None:
    """How exactly targets mean the linear layer of these names; None: they do not."""

    def kind(target: str) -> int | None:
        if target.startswith("re:"):
            return _PATTERN if any(re.match(target[3:], name) for name in names) else None
        return _NAME if target in names else _CLASS if target == "Linear" else None

    return min(filter(None, map(kind, targets)), default=None)


def files_to_copy(folder: Path) -> Iterator[Path]:
    """Tokenizer, processor, template and code files; some templates lie one level down."""
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        about_weights = path.name == "config.json" or path.name.endswith(".index.json")
        hidden = path.name.startswith(".")
        if path.is_file() and path.suffix in _COPIED and not about_weights and not hidden:
            yield path
