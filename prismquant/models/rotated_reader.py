"""Checkpoints seen as if they had been rotated, tensor by tensor.

Nothing is written and nothing is held: :class:`RotatedReader` rotates each tensor when it is read,
in float64. Between its parts a rotation leaves one invariant: the outputs of the model, up to the
rounding of the stored weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from prismquant.algorithms.rotation import RotatedTower
from prismquant.errors import ModelError
from prismquant.headers import TensorInfo
from prismquant.models.arch import EdgeKind
from prismquant.models.bound import BoundModel, BoundStream
from prismquant.models.rotated_towers import (
    by_modality,
    edges_of,
    gated_by,
    online_block,
    online_signs,
    online_sites,
    untied,
)
from prismquant.numerics.hadamard import Orthogonal, block_hadamard, orthogonal
from prismquant.shards import ShardReader

# Numbers of a tensor that are in float64 at one time, unless both its sides are rotated.
_CHUNK = 2**22
_Operation = Callable[[Tensor], Tensor]


class RotatedReader(ShardReader):
    """A checkpoint seen as if it had been rotated.

    Args:
        folder: The checkpoint.
        bound: What it is bound to.
        towers: Each tower once at most.
        exact: Names of module tensors that are returned in float32 even where fewer bits are
            stored: those that will be quantized, which need not be rounded twice.

    Raises:
        RecipeError: Two rotations are for one tower.
        ModelError: The architecture or the checkpoint does not allow a rotation.
        StorageError: As for :class:`~prismquant.shards.ShardReader`.
    """

    def __init__(
        self,
        folder: Path,
        bound: BoundModel,
        towers: Sequence[RotatedTower],
        exact: Collection[str] = (),
    ) -> None:
        super().__init__(folder, views=bound.views)
        self._bound, self._stored = bound, bound.shards()
        self._exact = frozenset(exact)
        self._edits = _edits(bound, towers)
        head = f"{bound.arch.head}.weight"
        self._head = bound.names.to_disk(head) if untied(bound, towers) else None
        self._embedding = bound.names.to_disk(f"{bound.arch.embeddings}.weight")

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors; a head that is no longer tied has its own."""
        return self._stored.names | ({self._head} if self._head else frozenset())

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        info = self._stored.info(self._embedding if name == self._head else name)
        if self._module_name(name) in self._exact:
            dtype = torch.promote_types(info.dtype, torch.float32)
            return TensorInfo(dtype, info.shape, info.file)
        return info

    def read(self, name: str) -> Tensor:
        """The tensor, rotated."""
        dtype = self.info(name).dtype
        owner, _, leaf = self._module_name(name).rpartition(".")
        edit = self._edits.get(owner)
        if edit is None:
            return self._stored.read(name).to(dtype)
        stored = self._stored.read(self._embedding if name == self._head else name)
        if edit.plain_norm:
            plain = leaf == "weight" and not edit.from_one
            return torch.full_like(stored, float(plain), dtype=dtype)
        if leaf == "weight":
            matrix = self._columns(edit, stored.flatten(1), torch.float64 if edit.rows else dtype)
            if edit.rows:
                matrix = _apply(matrix.mT, edit.rows, dtype).mT
            return matrix.reshape(stored.shape).contiguous()
        return _apply(self._bias(edit, stored.double(), owner)[None], edit.rows, dtype)[0]

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Lines of the rotated tensor; of the whole one, where its lines are mixed."""
        self._require_rows(name, rows)
        edit = self._edits.get(self._module_name(name).rpartition(".")[0])
        if name == self._head or (edit is not None and (edit.rows or edit.plain_norm)):
            return self.read(name)[rows]
        lines = self._stored.read_rows(name, rows)
        dtype = self.info(name).dtype
        return lines.to(dtype) if edit is None else self._columns(edit, lines, dtype)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Let the system fetch what the tensors are made of."""
        self._stored.read_ahead(names)

    def _columns(self, edit: _Edit, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        operations = list(edit.columns)
        if edit.norm is not None:
            scale = self._norm(edit.norm, "weight") + float(edit.from_one)
            scale = scale.repeat(matrix.shape[1] // edit.norm_size)
            operations.insert(0, lambda x: x * scale)
        return _apply(matrix, operations, dtype) if operations else matrix.to(dtype)

    def _bias(self, edit: _Edit, bias: Tensor, owner: str) -> Tensor:
        """With what the norm's shift contributes."""
        if edit.norm is None or f"{edit.norm}.bias" not in self._bound.shapes:
            return bias
        weight = self._stored.read(self._bound.names.to_disk(f"{owner}.weight")).flatten(1)
        shift = self._norm(edit.norm, "bias").repeat(weight.shape[1] // edit.norm_size)
        return bias + _apply(weight, [lambda x: x * shift], torch.float64).sum(1)

    def _norm(self, name: str, leaf: str) -> Tensor:
        return self._stored.read(self._bound.names.to_disk(f"{name}.{leaf}")).double()

    def _module_name(self, name: str) -> str:
        names = self._bound.names
        return names.to_module(name) if names.knows(name) else name


@dataclass
class _Edit:
    """Operations on the tensors of one module, in this order.

    Attributes:
        plain_norm: The module is a norm whose scale and shift went elsewhere.
        norm: The norm whose scale goes into the columns, and whose shift into the bias.
        norm_size: Its channels.
        from_one: Whether that norm, or the module itself, multiplies by one plus its weight.
        columns: Operations on the input side of the weight.
        rows: Operations on the output side of the weight, and on the bias.
    """

    plain_norm: bool = False
    norm: str | None = None
    norm_size: int = 0
    from_one: bool = False
    columns: list[_Operation] = field(default_factory=list)
    rows: list[_Operation] = field(default_factory=list)


class _Edits(dict[str, _Edit]):
    def __missing__(self, name: str) -> _Edit:
        return self.setdefault(name, _Edit())


def _edits(bound: BoundModel, towers: Sequence[RotatedTower]) -> dict[str, _Edit]:
    """Module path -> what happens to it, for every module that is touched."""
    edits = _Edits()
    for tower in by_modality(towers).values():
        if tower.rotation.residual:
            _edit_stream(edits, bound, tower)
        if tower.rotation.values:
            _edit_values(edits, bound, tower)
        if tower.rotation.online:
            _edit_online(edits, bound, tower)
    return dict(edits)


def _edit_stream(edits: _Edits, bound: BoundModel, tower: RotatedTower) -> None:
    stream = _stream(bound, tower.modality)
    turn = _rotator(tower, stream.width, "residual", fix_ones=stream.centred)
    for name in stream.writers:
        edits[name].rows.append(turn)
    for name in stream.embeddings:
        edits[name].columns.append(turn)
    for edge in bound.edges:
        if edge.norm not in stream.norms:
            continue
        edits[edge.source].plain_norm, edits[edge.source].from_one = True, edge.from_one
        for reader in edge.readers:
            _check_bias(bound, edge.source, reader)
            edit = edits[reader]
            edit.norm, edit.norm_size, edit.from_one = edge.norm, edge.size, edge.from_one
            edit.columns.append(turn)


def _edit_values(edits: _Edits, bound: BoundModel, tower: RotatedTower) -> None:
    for edge in edges_of(bound, EdgeKind.VALUE, tower.modality):
        if edge.gated:
            continue
        turn = _rotator(tower, edge.size // edge.kv_heads, "values")
        rows = slice(edge.first_row, edge.first_row + edge.size)
        edits[edge.source].rows.append(functools.partial(_on_slice, rows, turn))
        for consumer in edge.consumers:
            edits[consumer].columns.append(turn)


def _edit_online(edits: _Edits, bound: BoundModel, tower: RotatedTower) -> None:
    for site in online_sites(bound, tower):
        signs = online_signs(tower.rotation, site)
        edit = edits[site.name]
        if signs is not None:
            flip = functools.partial(torch.mul, signs.double())
            edit.columns.append(flip)
            if (edge := gated_by(bound, site)) is not None:
                rows = slice(edge.first_row, edge.first_row + edge.size)
                edits[edge.source].rows.append(functools.partial(_on_slice, rows, flip))
        block = online_block(tower.rotation, site)
        edit.columns.append(functools.partial(block_hadamard, block=block))


def _rotator(tower: RotatedTower, width: int, part: str, *, fix_ones: bool = False) -> _Operation:
    """Rotates each piece of ``width`` along the last axis. The matrix is built when needed."""

    @functools.cache
    def matrix() -> Orthogonal:
        rotation = tower.rotation
        seed = f"{rotation.seed}:{tower.modality}:{part}"
        return orthogonal(width, seed, kind=rotation.kind, signs=rotation.signs, fix_ones=fix_ones)

    def turn(x: Tensor) -> Tensor:
        return matrix().rotate(x.unflatten(-1, (-1, width))).flatten(-2)

    return turn


def _stream(bound: BoundModel, modality: str) -> BoundStream:
    for stream in bound.streams:
        if stream.modality == modality:
            return stream
    raise ModelError(
        f"{bound.arch.title} describes no residual stream of its {modality} tower",
        where=f"{bound.arch.name}.toml",
        remedy="rotate with residual: false",
    )


def _check_bias(bound: BoundModel, norm: str, consumer: str) -> None:
    if f"{norm}.bias" in bound.shapes and f"{consumer}.bias" not in bound.shapes:
        raise ModelError(
            f"{norm} has a shift, and {consumer} has no bias that could take it",
            where=str(bound.folder),
            remedy="rotate this tower with residual: false",
        )


def _apply(matrix: Tensor, operations: Sequence[_Operation], dtype: torch.dtype) -> Tensor:
    """Operations on the last axis of ``[n, k]``, in float64, some rows at a time."""
    result = torch.empty(matrix.shape, dtype=dtype)
    rows = max(1, _CHUNK // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        piece = matrix[start : start + rows].double()
        for operation in operations:
            piece = operation(piece)
        result[start : start + rows] = piece
    return result


def _on_slice(where: slice, operation: _Operation, x: Tensor) -> Tensor:
    x = x.clone()
    x[..., where] = operation(x[..., where])
    return x
