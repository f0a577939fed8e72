"""Tables of tokens: the rows of the tokens at hand are read, as a whole table is far larger."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prismquant.engine.placement import Placement
from prismquant.models.arch import ArchSpec

Lookups = Mapping[str, Callable[[Tensor], Tensor]]
"""Tables by their module paths; each gives ``[.., features]`` for ids ``[..]``."""


def token_tables(model: nn.Module, arch: ArchSpec) -> dict[str, nn.Embedding]:
    """Modules that are looked up by the ids of tokens, by their paths: the embeddings first."""
    modules = {name: _submodule(model, name) for name in (arch.embeddings, *arch.tables)}
    return {name: table for name, table in modules.items() if isinstance(table, nn.Embedding)}


class TableRows:
    """A table that has the rows of some tokens, and reads more when it is asked for others.

    It computes as the model's own does: some multiply by a scale what they look up.

    Args:
        table: The model's own.
        ids: Tokens that it will be asked for, sorted, int64 ``[n]``.
        read: Gives the rows of tokens, ``[n, features]``.
        placement: Where, and in which dtype, they are wanted.
    """

    def __init__(
        self,
        table: nn.Embedding,
        ids: Tensor,
        read: Callable[[Tensor], Tensor],
        placement: Placement,
    ) -> None:
        self._table: Any = copy.copy(table)
        # Of padding only the gradient is special, and its row may not be among these.
        self._table.padding_idx = None
        self._read, self._placement = read, placement
        self._take(ids)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Rows of tokens, ``[.., features]``."""
        if not torch.isin(tokens, self._ids).all():
            # The model's own code asks for others than the batches have, such as padding.
            self._take(torch.cat([self._ids, tokens.flatten()]).unique())
        places = torch.searchsorted(self._ids, tokens)
        found: Tensor = functional_call(self._table, {"weight": self._rows}, (places,))
        return found

    def _take(self, ids: Tensor) -> None:
        rows = self._read(ids.cpu())
        self._rows = rows.to(self._placement.device, self._placement.precision.dtype)
        self._ids = ids


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    """A module by its path; None where the model has none there."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
