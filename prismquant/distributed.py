"""Several processes at work on one model: what each knows of the others, and how they exchange.

Each rank runs the same program over its own share of the calibration data. Statistics are added up
over the ranks, what a rank has solved is handed to all, and so every rank holds the same quantized
weights at every step. Tensors travel as they are, or as safetensors bytes; nothing is pickled.

``torchrun`` starts the processes and tells each its place through the environment.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch import distributed as dist

from prismquant.errors import PrismQuantError

# The others wait while one rank solves the largest layer.
_PATIENCE = datetime.timedelta(hours=2)


class Ranks(Protocol):
    """All processes of a run, seen from one of them."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def device(self) -> str:
        """The accelerator of this process."""

    def sum_(self, x: Tensor) -> None:
        """Replace ``x`` by its sum over all ranks; equal shapes, and an equal result, on all."""

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Tensors of each rank, in their order, on the CPU; names and shapes may differ."""

    def gather_json(self, value: Any) -> list[Any]:
        """Values of each rank, in their order; anything that JSON holds."""


@dataclass(frozen=True)
class Alone:
    """The only process there is."""

    rank: int = 0
    size: int = 1
    device: str = "cuda"

    def sum_(self, x: Tensor) -> None:
        """It is its own sum."""

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """See :class:`Ranks`."""
        return [dict(tensors)]

    def gather_json(self, value: Any) -> list[Any]:
        """See :class:`Ranks`."""
        return [value]


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of torch's default group.

    Attributes:
        rank: The number of this process.
        size: How many there are.
        device: Its accelerator: each process of a node has one of its own.
    """

    rank: int
    size: int
    device: str

    def sum_(self, x: Tensor) -> None:
        """See :class:`Ranks`."""
        with _others_present():
            dist.all_reduce(x)

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """See :class:`Ranks`."""
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return [load(data) for data in self._gather_bytes(save(whole))]

    def gather_json(self, value: Any) -> list[Any]:
        """See :class:`Ranks`."""
        return [json.loads(data) for data in self._gather_bytes(json.dumps(value).encode())]

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _others_present():
            dist.all_gather(sizes, torch.tensor([len(mine)]))
            longest = int(max(sizes))
            padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, padded)
        return [
            part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)
        ]


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` has started, or be alone where it has not.

    Raises:
        PrismQuantError: The others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Alone()
        return
    rank = int(os.environ["RANK"])
    # What is exchanged lies on the CPU, but for sums over accelerators.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise PrismQuantError(
            f"rank {rank} of {size} cannot reach the others: {error}",
            remedy="start all ranks with torchrun; see docs/scaling.md",
        ) from error
    try:
        yield ProcessGroup(rank, size, f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _others_present() -> Iterator[None]:
    """Say what a failed exchange means."""
    try:
        yield
    except RuntimeError as error:
        raise PrismQuantError(
            f"another rank is gone: {str(error).splitlines()[0]}",
            remedy="see what it printed last, then start all ranks again with --resume",
        ) from error
