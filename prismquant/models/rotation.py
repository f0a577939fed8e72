"""Checkpoints seen as if they had been rotated: same function, no outlier channels.

The residual stream, the values of attention and the input of the last MLP layer can each be
multiplied by an orthogonal matrix, when its inverse goes into whatever reads them (Ashkboos et al.,
QuaRot, 2024, sections 3 and 4). In a rotated basis no channel is much larger than the others, and
weights and activations lose less when they are rounded. The first two rotations live in the weights
alone. The third, behind a nonlinearity, is *online*: the weights hold one half, and whoever runs
the model multiplies the layer's input with the other; :class:`OnlineRotation` says how.

RMSNorm commutes with any rotation once its scale has moved into its readers. LayerNorm subtracts
the mean over channels as well, and still commutes with a rotation that fixes the vector of ones:
that is what vision towers get, so that every layer keeps its type and the model's own code runs the
result.

Nothing is written and nothing is held: :class:`RotatedReader` rotates each tensor when it is read,
in float64. Between its parts a rotation leaves one invariant: the outputs of the model, up to the
rounding of the stored weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from prismquant.errors import ModelError, RecipeError, suggest
from prismquant.headers import TensorInfo
from prismquant.models.arch import EdgeKind, Modality
from prismquant.models.bound import BoundEdge, BoundModel, BoundSite, BoundStream
from prismquant.numerics.hadamard import (
    KINDS,
    Kind,
    Orthogonal,
    block_hadamard,
    orthogonal,
    power_of_two_block,
    random_signs,
)
from prismquant.storage import ShardReader

__all__ = ["OnlineRotation", "RotatedReader", "Rotation", "online_rotations", "untied"]

# Checkpoints hold the matrix of each layer: a block of 4096 would take 32 MB a layer.
_WIDEST_BLOCK = 1024
# Numbers of a tensor that are in float64 at one time, unless both its sides are rotated.
_CHUNK = 2**22

_Operation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rotation:
    """How one tower is rotated.

    Attributes:
        modality: ``vision`` or ``llm``.
        residual: Rotate the residual stream.
        values: Rotate each attention head's values.
        online: Rotate the input of every block's last MLP layer, while the model runs.
        online_block: Width of the blocks of the online rotation, a power of two that divides the
            layer's input; None takes the largest up to 1024.
        signs: Random signs beside each Hadamard matrix, so that a constant part of the input does
            not pile up in one channel.
        kind: ``hadamard`` or ``random``; the online rotation is always a Hadamard matrix.
        seed: Of all that is random.

    Raises:
        RecipeError: An option is out of range, or nothing is rotated.
    """

    modality: Modality
    residual: bool = True
    values: bool = True
    online: bool = False
    online_block: int | None = None
    signs: bool = True
    kind: Kind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = (Modality.VISION, Modality.LLM)
        if self.modality not in allowed:
            raise RecipeError(
                f"the {self.modality} modality cannot be rotated",
                remedy="rotate vision or llm; the projector follows both of its neighbours",
            )
        object.__setattr__(self, "modality", Modality(self.modality))
        if self.kind not in KINDS:
            raise RecipeError(f"unknown kind {self.kind!r}", remedy=suggest(self.kind, KINDS))
        if not (self.residual or self.values or self.online):
            raise RecipeError(
                "a rotation of nothing", remedy="set residual, values or online, or leave it out"
            )
        block = self.online_block
        if block is not None and (not self.online or block < 2 or block & (block - 1)):
            raise RecipeError(
                f"online_block {block} needs online: true and a power of two from 2 up",
                remedy="leave it out for the largest block that fits",
            )

    @property
    def idle(self) -> dict[str, str]:
        """Options that change nothing as the others stand, and why."""
        if not (self.residual or self.values):
            return {"kind": "only the online rotation is on, which is always a Hadamard matrix"}
        unsigned = self.kind == "random" and not self.online
        return {"signs": "a random matrix has none"} if unsigned else {}


@dataclass(frozen=True)
class OnlineRotation:
    """Rotation of a layer's input at run time: ``block_hadamard(x * signs, block)``.

    Attributes:
        block: Width of the blocks.
        features: Features of the input.
        seed: Decides the signs; None where there are none, or the layer before has them in its
            weights.
    """

    block: int
    features: int
    seed: str | None = None

    @property
    def signs(self) -> Tensor | None:
        """int8 ``[in]`` of one and minus one; None: not applied at run time."""
        return None if self.seed is None else random_signs(self.features, self.seed)

    def apply(self, x: Tensor) -> Tensor:
        """The rotated input; ``[..., in]`` of any floating dtype."""
        signs = self.signs
        return block_hadamard(x if signs is None else x * signs.to(x), self.block)


def online_rotations(bound: BoundModel, rotations: Sequence[Rotation]) -> dict[str, OnlineRotation]:
    """Site name -> what must be done to its input when the rotated model runs.

    Raises:
        RecipeError: Two rotations are for one tower.
        ModelError: A block does not divide a layer's input.
    """
    result: dict[str, OnlineRotation] = {}
    for rotation in _by_modality(rotations).values():
        for site in _online_sites(bound, rotation):
            folded = not rotation.signs or _gated_by(bound, site) is not None
            seed = None if folded else _online_seed(rotation, site)
            block = _online_block(rotation, site)
            result[site.name] = OnlineRotation(block, site.in_features, seed)
    return result


def untied(bound: BoundModel, rotations: Sequence[Rotation]) -> bool:
    """Whether the head stops being the embedding: only the head takes the final norm's scale."""
    return bound.tied and any(
        rotation.residual and rotation.modality is Modality.LLM for rotation in rotations
    )


class RotatedReader(ShardReader):
    """A checkpoint seen as if it had been rotated.

    Args:
        folder: The checkpoint.
        bound: What it is bound to.
        rotations: One for each tower at most.
        exact: Names of module tensors that are returned in float32 even where fewer bits are
            stored: those that will be quantized, which need not be rounded twice.

    Raises:
        RecipeError: Two rotations are for one tower.
        ModelError: The architecture or the checkpoint does not allow a rotation.
        StorageError: As for :class:`~prismquant.storage.ShardReader`.
    """

    def __init__(
        self,
        folder: Path,
        bound: BoundModel,
        rotations: Sequence[Rotation],
        exact: Collection[str] = (),
    ) -> None:
        super().__init__(folder)
        self._bound = bound
        self._exact = frozenset(exact)
        self._edits = _edits(bound, rotations)
        head = f"{bound.arch.head}.weight"
        self._head = bound.names.to_disk(head) if untied(bound, rotations) else None
        self._embedding = bound.names.to_disk(f"{bound.arch.embeddings}.weight")

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors; a head that is no longer tied has its own."""
        return super().names | ({self._head} if self._head else frozenset())

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        info = super().info(self._embedding if name == self._head else name)
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
            return super().read(name).to(dtype)
        stored = super().read(self._embedding if name == self._head else name)
        if edit.plain_norm:
            return torch.full_like(stored, 1.0 if leaf == "weight" else 0.0, dtype=dtype)
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
        lines = super().read_rows(name, rows)
        dtype = self.info(name).dtype
        return lines.to(dtype) if edit is None else self._columns(edit, lines, dtype)

    def _columns(self, edit: _Edit, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        operations = list(edit.columns)
        if edit.norm is not None:
            scale = self._norm(edit.norm, "weight").repeat(matrix.shape[1] // edit.norm_size)
            operations.insert(0, lambda x: x * scale)
        return _apply(matrix, operations, dtype) if operations else matrix.to(dtype)

    def _bias(self, edit: _Edit, bias: Tensor, owner: str) -> Tensor:
        """With what the norm's shift contributes."""
        if edit.norm is None or f"{edit.norm}.bias" not in self._bound.shapes:
            return bias
        weight = super().read(self._bound.names.to_disk(f"{owner}.weight")).flatten(1)
        shift = self._norm(edit.norm, "bias").repeat(weight.shape[1] // edit.norm_size)
        return bias + _apply(weight, [lambda x: x * shift], torch.float64).sum(1)

    def _norm(self, name: str, leaf: str) -> Tensor:
        return super().read(self._bound.names.to_disk(f"{name}.{leaf}")).double()

    def _module_name(self, name: str) -> str:
        names = self._bound.names
        return names.to_module(name) if names.knows(name) else name


# -------------------------------------------------------------------------------- what is edited


@dataclass
class _Edit:
    """What happens to the tensors of one module, in this order.

    Attributes:
        plain_norm: The module is a norm whose scale and shift went elsewhere.
        norm: The norm whose scale goes into the columns, and whose shift into the bias.
        norm_size: Its channels.
        columns: Operations on the input side of the weight.
        rows: Operations on the output side of the weight, and on the bias.
    """

    plain_norm: bool = False
    norm: str | None = None
    norm_size: int = 0
    columns: list[_Operation] = field(default_factory=list)
    rows: list[_Operation] = field(default_factory=list)


class _Edits(dict[str, _Edit]):
    def __missing__(self, name: str) -> _Edit:
        return self.setdefault(name, _Edit())


def _edits(bound: BoundModel, rotations: Sequence[Rotation]) -> dict[str, _Edit]:
    """Module path -> what happens to it, for every module that is touched."""
    edits = _Edits()
    for rotation in _by_modality(rotations).values():
        if rotation.residual:
            _edit_stream(edits, bound, rotation)
        if rotation.values:
            _edit_values(edits, bound, rotation)
        if rotation.online:
            _edit_online(edits, bound, rotation)
    return dict(edits)


def _edit_stream(edits: _Edits, bound: BoundModel, rotation: Rotation) -> None:
    stream = _stream(bound, rotation.modality)
    turn = _rotator(rotation, stream.width, "residual", fix_ones=stream.centred)
    for name in stream.writers:
        edits[name].rows.append(turn)
    for name in stream.embeddings:
        edits[name].columns.append(turn)
    for edge in bound.edges:
        if edge.norm not in stream.norms:
            continue
        edits[edge.source].plain_norm = True
        for consumer in edge.consumers:
            _check_bias(bound, edge.source, consumer)
            edits[consumer].norm, edits[consumer].norm_size = edge.norm, edge.size
            edits[consumer].columns.append(turn)


def _edit_values(edits: _Edits, bound: BoundModel, rotation: Rotation) -> None:
    edges = _edges(bound, EdgeKind.VALUE, rotation.modality)
    for edge in edges:
        turn = _rotator(rotation, edge.size // edge.kv_heads, "values")
        rows = slice(edge.first_row, edge.first_row + edge.size)
        edits[edge.source].rows.append(functools.partial(_on_slice, rows, turn))
        for consumer in edge.consumers:
            edits[consumer].columns.append(turn)


def _edit_online(edits: _Edits, bound: BoundModel, rotation: Rotation) -> None:
    for site in _online_sites(bound, rotation):
        signs = _online_signs(rotation, site)
        edit = edits[site.name]
        if signs is not None:
            flip = functools.partial(torch.mul, signs.double())
            edit.columns.append(flip)
            if (producer := _gated_by(bound, site)) is not None:
                edits[producer].rows.append(flip)
        block = _online_block(rotation, site)
        edit.columns.append(functools.partial(block_hadamard, block=block))


def _by_modality(rotations: Sequence[Rotation]) -> dict[Modality, Rotation]:
    result: dict[Modality, Rotation] = {}
    for rotation in rotations:
        if rotation.modality in result:
            raise RecipeError(
                f"two rotations for {rotation.modality}", remedy="join their options in one"
            )
        result[rotation.modality] = rotation
    return result


def _rotator(rotation: Rotation, width: int, part: str, *, fix_ones: bool = False) -> _Operation:
    """Rotates each piece of ``width`` along the last axis. The matrix is built when needed."""

    @functools.cache
    def matrix() -> Orthogonal:
        seed = f"{rotation.seed}:{rotation.modality}:{part}"
        return orthogonal(width, seed, kind=rotation.kind, signs=rotation.signs, fix_ones=fix_ones)

    def turn(x: Tensor) -> Tensor:
        return matrix().rotate(x.unflatten(-1, (-1, width))).flatten(-2)

    return turn


def _stream(bound: BoundModel, modality: Modality) -> BoundStream:
    for stream in bound.streams:
        if stream.modality is modality:
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


def _edges(bound: BoundModel, kind: EdgeKind, modality: Modality) -> Iterator[BoundEdge]:
    for edge in bound.edges:
        if edge.kind is kind and bound.steps[edge.step].modality is modality:
            yield edge


# ------------------------------------------------------------------------------------- online


def _online_sites(bound: BoundModel, rotation: Rotation) -> Iterator[BoundSite]:
    for site in bound.sites:
        if rotation.online and site.online_rotation and site.modality is rotation.modality:
            yield site


def _online_block(rotation: Rotation, site: BoundSite) -> int:
    widest = min(power_of_two_block(site.in_features), _WIDEST_BLOCK)
    block = rotation.online_block or widest
    if site.in_features % block:
        raise ModelError(
            f"blocks of {block} do not divide the {site.in_features} inputs of {site.name}",
            remedy=f"use an online_block of {power_of_two_block(site.in_features)} at most",
        )
    return block


def _online_signs(rotation: Rotation, site: BoundSite) -> Tensor | None:
    seed = _online_seed(rotation, site)
    return random_signs(site.in_features, seed) if rotation.signs else None


def _online_seed(rotation: Rotation, site: BoundSite) -> str:
    return f"{rotation.seed}:{site.name}"


def _gated_by(bound: BoundModel, site: BoundSite) -> str | None:
    """The layer whose rows can take the signs: only products lie between it and the site."""
    for edge in _edges(bound, EdgeKind.LINEAR, site.modality):
        if edge.consumers == (site.name,) and edge.size == site.in_features:
            return edge.producer
    return None


# ---------------------------------------------------------------------------------- arithmetic


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
