"""Writes checkpoints in the compressed-tensors format, step by step.

Tensors keep the names of the source checkpoint, with ``weight`` replaced by ``weight_packed``,
``weight_scale``, ``weight_shape`` and, for asymmetric formats only, ``weight_zero_point``. Every
file of the source other than weights and ``config.json`` is copied byte for byte. ``config.json``
is written last: until then no reader takes the folder for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from prismquant.errors import StorageError
from prismquant.export.companions import files_to_copy
from prismquant.export.compressed_tensors.config_writer import written_config
from prismquant.export.compressed_tensors.layer_edits import (
    column_tensors,
    read_outlier_columns,
    rotation_tensors,
)
from prismquant.export.compressed_tensors.reader import StoredScheme, read_weight, static_scale
from prismquant.formats.packed import pack
from prismquant.formats.quantized_layer import (
    DenseWeight,
    KVScales,
    QuantizedLayer,
    QuantizedTensor,
    StoredWeight,
)
from prismquant.headers import read_header
from prismquant.models.bound import BoundModel, BoundStep
from prismquant.numerics.finite import nonfinite
from prismquant.plan.bit_layout import DENSE
from prismquant.plan.kv_plan import KVLayer
from prismquant.plan.plan import Plan, PlanRow
from prismquant.plan.source import source_reader
from prismquant.run.record import refuse_nonfinite
from prismquant.shards import INDEX_NAME, ShardReader
from prismquant.storage import copy_file, write_json, write_tensors


class CheckpointWriter:
    """Writes a run's shards as its steps finish, and the rest of the checkpoint at the end.

    Args:
        folder: The output folder.
        bound: The source model.
        plan: What is quantized, and in which layout.
        strict: Refuse tensors that stay in floating point and hold NaN or infinities.
        see: Is shown the quantized layers of each step, before they are written.

    Attributes:
        nonfinite: Those that were written all the same, by shard and name, with how many.
        last_files: Names of what :meth:`finish` has written.
    """

    def __init__(
        self,
        folder: Path,
        bound: BoundModel,
        plan: Plan,
        *,
        strict: bool = False,
        see: Callable[[Sequence[QuantizedLayer]], None] = lambda layers: None,
    ) -> None:
        self.folder = folder
        self.bound = bound
        self.plan = plan
        self.strict = strict
        self.nonfinite: dict[str, dict[str, str]] = {}
        self.last_files: list[str] = []
        self._see = see
        self._reader = source_reader(plan, bound)
        self._rows = {row.site.name: row for row in plan.quantized}

    def write_step(
        self, step: BoundStep, layers: Sequence[QuantizedLayer], changed: Mapping[str, Tensor]
    ) -> str:
        """Write one step's shard: its quantized layers, what was changed, the rest as it is."""
        self._see(layers)
        solved = {f"{self._rows[layer.name].site.disk_name}.weight": layer for layer in layers}
        shard = self._shard_name(self.bound.steps.index(step) + 1)
        plain = {self.bound.names.to_disk(name): tensor for name, tensor in changed.items()}
        tensors, kept = self._rotations(step), []
        for name in self._names_of(step):
            layer = solved.pop(name, None)
            if layer is not None:
                tensors |= _layer_tensors(layer, self._rows[layer.name])
            elif name not in plain:
                kept.append(name)
        # A stack of matrices of which none has changed stays one.
        whole = self._reader.whole(kept)
        for name in sorted(whole):
            stacked = name not in kept
            plain[name] = self._reader.read_stack(name) if stacked else self._reader.read(name)
        if solved:
            raise StorageError(f"the source has no tensor {next(iter(solved))!r}", where=step.name)
        self.nonfinite[shard] = self._nonfinite(plain)
        write_tensors(self.folder / shard, tensors | plain)
        return shard

    def read_step(self, shard: str, rows: Sequence[PlanRow]) -> list[QuantizedLayer]:
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

    def finish(self) -> dict[str, str]:
        """Write what belongs to no step, the index, the copied files, and ``config.json`` last.

        Returns:
            Tensors of no step that hold NaN or infinities, and how many.
        """
        loose = {name: self._reader.read(name) for name in self._loose_names()}
        found = self._nonfinite(loose)
        shard, source = self._shard_name(len(self.bound.steps) + 1), self.bound.folder
        write_tensors(self.folder / shard, loose)
        write_json(self.folder / INDEX_NAME, self._index())
        copied = [path.relative_to(source).as_posix() for path in files_to_copy(source)]
        for name in copied:
            copy_file(source / name, self.folder / name)
        write_json(self.folder / "config.json", written_config(self.plan, self.bound))
        self.last_files = [shard, INDEX_NAME, *copied, "config.json"]
        return found

    def _nonfinite(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Tensors that hold NaN or infinities, and how many; an error if that is not to be."""
        found = {name: said for name, tensor in tensors.items() if (said := nonfinite(tensor))}
        if self.strict:
            refuse_nonfinite(found, self.bound.folder)
        return found

    def _read_layer(self, reader: ShardReader, row: PlanRow) -> QuantizedLayer:
        prefix, weights = row.site.disk_name, row.config.weights
        shape = (row.site.out_features, row.site.in_features)
        if weights is None:
            raise StorageError("a layer without a weight format has no codes", where=row.site.name)
        weight: StoredWeight
        if row.layout == DENSE:
            # A dense layer is stored dequantized: its values stand for themselves.
            values = reader.read(f"{prefix}.weight").reshape(row.site.out_features, -1)
            weight = DenseWeight(values)
        else:
            weight = read_weight(reader, prefix, StoredScheme(weights, row.layout), shape)
        scales = {
            side: static_scale(reader, prefix, side, spec)
            for side, spec in (("input", row.config.activations), ("output", row.config.outputs))
            if spec is not None
        }
        return QuantizedLayer(
            row.site.name,
            weight,
            scales.get("input"),
            scales.get("output"),
            read_outlier_columns(reader, prefix, shape),
        )

    def _rotations(self, step: BoundStep) -> dict[str, Tensor]:
        """Tensors by which readers rotate the inputs of a step's layers."""
        return {
            f"{row.site.disk_name}.{suffix}": tensor
            for row in self.plan.rows
            if row.site.step == step.index and row.online is not None
            for suffix, tensor in rotation_tensors(row.online, row.site.dtype).items()
        }

    def _names_of(self, step: BoundStep) -> list[str]:
        names = self.bound.names
        return [n for n in sorted(self._reader.names) if names.lies_in(n, step.name)]

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


def _layer_tensors(layer: QuantizedLayer, row: PlanRow) -> dict[str, Tensor]:
    """A layer's tensors on disk; what is not in codes in the dtype of its weight."""
    prefix, dtype = row.site.disk_name, row.site.dtype
    if not isinstance(layer.weight, QuantizedTensor):
        raise StorageError("the layer's codes are not at hand", where=row.site.name)
    if row.layout == DENSE:
        tensors = {"weight": layer.weight.dequantize(dtype).reshape(row.site.weight_shape)}
    else:
        tensors = pack(layer.weight, row.layout)
    statics = (layer.input, layer.output)
    for side, spec, static in zip(("input", "output"), row.config.sides, statics, strict=True):
        # Layers that share an input share its scale in memory; on disk each has its own.
        if static is not None and spec is not None:
            tensors[f"{side}_global_scale" if spec.scale == "e4m3" else f"{side}_scale"] = (
                static.scale.clone()
            )
            if static.zero_point is not None:
                tensors[f"{side}_zero_point"] = static.zero_point.clone()
    if row.outliers is not None:
        room, kept = row.outliers.columns, layer.outlier_columns
        tensors |= column_tensors(kept, room, row.site.out_features, dtype)
    return {f"{prefix}.{suffix}": tensor for suffix, tensor in tensors.items()}
