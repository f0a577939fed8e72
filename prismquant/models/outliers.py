"""Activation outliers for a model that has none, without changing its function.

Large language models have a few channels whose activations are tens of times larger than the rest,
and that is what makes activation quantization hard. Small models do not have them. Along an edge (a
norm and all layers that read it, or the two ends of a gated product) scale can move: here it moves
up at chosen channels and down in the readers. Every factor is a power of two, so each product keeps
its bits and the outputs are equal bit for bit, in float32 and in bfloat16 (checked: nothing
overflows and no digit is lost in a subnormal).

The channels are mostly the same in all blocks, as in real models, where they live in the residual
stream (Dettmers et al., LLM.int8(), 2022, section 4).
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch

from prismquant.errors import ModelError, NumericsError
from prismquant.models.arch import EdgeKind, Modality
from prismquant.models.bind import bind
from prismquant.models.bound import BoundEdge, BoundModel
from prismquant.shards import INDEX_NAME
from prismquant.storage import copy_file, write_tensors

# How often a block has a channel of its own in place of a common one.
_OWN = 0.2


def add_outliers(
    source: Path | str,
    out: Path | str,
    *,
    factor: float = 32.0,
    channels: int = 2,
    seed: int = 0,
    modality: Modality | str | None = None,
) -> dict[str, tuple[int, ...]]:
    """Write a copy of a checkpoint whose activations have outlier channels.

    Args:
        source: An unquantized checkpoint.
        out: Folder of the copy; other files are copied byte for byte.
        factor: A power of two above one.
        channels: Outlier channels at each norm and gated product.
        seed: Of their choice.
        modality: Only this part of the model; None is all of it.

    Returns:
        Module path of each touched norm or linear -> its channels.

    Raises:
        ModelError: The checkpoint does not fit its architecture, or an argument is out of range.
        NumericsError: A dtype cannot hold the scaled values exactly.
    """
    bound = bind(source)
    out = Path(out)
    if out.resolve() == bound.folder.resolve():
        raise ModelError("the copy would overwrite its source", where=str(out))
    reader = bound.shards()
    names, others = bound.names, {n for n in reader.names if not bound.names.knows(n)}
    tensors = {names.to_module(name): reader.read(name) for name in reader.names - others}
    chosen = scale_edges(
        tensors, bound, factor=factor, channels=channels, seed=seed, modality=modality
    )
    for path in sorted(bound.folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX_NAME:
            copy_file(path, out / path.name)
    stored = {names.to_disk(name): tensor for name, tensor in tensors.items()}
    # Of another model beside this one.
    stored |= {name: reader.read(name) for name in others}
    write_tensors(out / "model.safetensors", reader.put_together(stored))
    return chosen


def scale_edges(
    tensors: dict[str, torch.Tensor],
    bound: BoundModel,
    *,
    factor: float,
    channels: int,
    seed: int,
    modality: Modality | str | None = None,
) -> dict[str, tuple[int, ...]]:
    """Move scale along the edges of a state dict, in place of its entries.

    Args:
        tensors: Module tensor name -> tensor; touched entries are replaced, tensors are not written
            to.
        bound: Says where the edges are.
        factor, channels, seed, modality: As for :func:`add_outliers`.

    Returns:
        Module path of each touched norm or linear -> its channels.

    Raises:
        ModelError: An argument is out of range.
        NumericsError: A dtype cannot hold the scaled values exactly.
    """
    if not (factor > 1 and math.isfinite(factor) and math.frexp(factor)[0] == 0.5):
        raise ModelError(
            f"the outlier factor {factor} is not a power of two above one",
            remedy="use 8, 16, 32 or 64; only powers of two leave every bit of the outputs",
        )
    edges = [edge for edge in bound.edges if _wanted(edge, bound, modality)]
    if not edges:
        raise ModelError(
            f"no edge of {bound.arch.title} belongs to modality {modality!r}",
            remedy=f"use one of {', '.join(Modality)}, or None",
        )
    chosen: dict[str, tuple[int, ...]] = {}
    for edge in edges:
        if not 0 < channels <= edge.size:
            raise ModelError(f"{channels} outlier channels do not fit {edge.size} channels")
        picked = _pick(edge, bound, channels, seed)
        _scale(tensors, edge, picked, factor)
        chosen[edge.source] = picked
    return chosen


def _wanted(edge: BoundEdge, bound: BoundModel, modality: Modality | str | None) -> bool:
    if edge.kind is EdgeKind.VALUE:
        return False
    # A tied head is also the embedding: its columns cannot shrink alone.
    if any(bound.site(name).tied for name in edge.consumers):
        return False
    return modality is None or bound.steps[edge.step].modality == modality


def _pick(edge: BoundEdge, bound: BoundModel, channels: int, seed: int) -> tuple[int, ...]:
    tower = bound.steps[edge.step].modality
    common = random.Random(f"{seed}:{tower}:{edge.kind}:{edge.size}")
    picked = common.sample(range(edge.size), channels)
    own = random.Random(f"{seed}:{edge.source}")
    for index in range(channels):
        free = edge.size - channels
        if free and own.random() < _OWN:
            taken = set(picked)
            picked[index] = own.choice([c for c in range(edge.size) if c not in taken])
    return tuple(sorted(picked))


def _scale(
    tensors: dict[str, torch.Tensor], edge: BoundEdge, channels: tuple[int, ...], factor: float
) -> None:
    rows = torch.tensor(channels) + edge.first_row
    for leaf in ("weight", "bias"):
        name = f"{edge.source}.{leaf}"
        if name in tensors:
            from_one = edge.from_one and leaf == "weight"
            tensors[name] = _multiplied(tensors[name], name, rows, 0, factor, from_one=from_one)
    # Behind a concatenation channel c feeds the columns c, c + size, c + 2 size ...
    columns = torch.cat([torch.tensor(channels) + k * edge.size for k in range(edge.tile)])
    for consumer in edge.readers:
        name = f"{consumer}.weight"
        tensors[name] = _multiplied(tensors[name], name, columns, 1, 1.0 / factor)


def _multiplied(
    tensor: torch.Tensor,
    name: str,
    index: torch.Tensor,
    axis: int,
    factor: float,
    *,
    from_one: bool = False,
) -> torch.Tensor:
    """A tensor with some entries times a factor; of one plus the entries, where that counts."""
    old = tensor.index_select(axis, index)
    if from_one:
        # Norms add one in float32.
        gain = (1 + old.float()) * factor
        new = (gain.double() - 1).to(old.dtype)
        exact = torch.equal(1 + new.float(), gain)
    else:
        new = old * factor
        exact = torch.equal(new * (1.0 / factor), old)
    if not exact:
        raise NumericsError(
            f"{tensor.dtype} cannot hold {name} times {factor} exactly",
            where=name,
            remedy="use a smaller factor, or a checkpoint in bfloat16 or float32",
        )
    return tensor.clone().index_copy_(axis, index, new)
