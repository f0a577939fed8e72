"""Held-out loss of a model that is walked through: its KL divergence from the float model.

The held-out samples follow the walk. The float model is walked through once; its inputs of the
head are kept at the places that count, and its logits there as far as there is room. At the end of
each further walk the head gives the logits of the quantized model, a few places at a time. One unit
is in memory at a time in either walk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prismquant.data.batches import Batch
from prismquant.distributed import Ranks
from prismquant.engine.activation_store import ActivationStore
from prismquant.engine.placement import Placement
from prismquant.engine.streamed_model import StreamedModel
from prismquant.engine.walk import ModelWalk, Unit
from prismquant.models.bound import BoundModel
from prismquant.search.divergence import UnchangedLogits
from prismquant.search.sensitivity import TOKEN_CLASSES, TokenClass
from prismquant.search.token_places import token_places

CHUNK = 64
"""Places whose logits are looked at together."""

Sums = Mapping[str, Mapping[TokenClass, tuple[float, int]]]
"""Divergence and places of each sample by class of token, by the sample's id."""


@dataclass(frozen=True, eq=False)
class _FloatBatch:
    """The float model at the places of a batch that count.

    Attributes:
        rows, columns, classes: Int64 ``[P]``: the places, and the class of each.
        hidden: Gives the head's inputs there, ``[P, hidden]``.
        logits: Logits there, ``[P, vocabulary]``; None where there was no room.
    """

    rows: Tensor
    columns: Tensor
    classes: Tensor
    hidden: Callable[[], Tensor]
    logits: Tensor | None


class HeldOutLoss:
    """Measures how far quantized models are from the float one on batches held out.

    Args:
        bound: The model.
        batches: Of this rank; there may be none.
        weights: Weight of each class of token; places of classes without one are not looked at.
        placement: Where units run.
        store: Keeps states of the float model.
        most_bytes: Of the float model's logits that are kept.
        ranks: Processes that share the batches.
    """

    def __init__(
        self,
        bound: BoundModel,
        batches: Sequence[Batch],
        weights: Mapping[TokenClass, float],
        placement: Placement,
        store: ActivationStore,
        most_bytes: int,
        ranks: Ranks,
    ) -> None:
        self.batches = batches
        self._bound, self._placement, self._store, self._ranks = bound, placement, store, ranks
        self._left = most_bytes
        self._weights = {name: weight for name, weight in weights.items() if weight}
        self._float: StreamedModel | None = None
        self._known: list[_FloatBatch] = []

    @torch.no_grad()
    def look_at_float(self) -> None:
        """Walk through the float model."""
        walk = ModelWalk(
            self._bound,
            self._bound.shards(),
            placement=self._placement,
            store=self._store,
            ranks=self._ranks,
            followers=self.batches,
        )
        self._float = walk.main
        with contextlib.closing(walk.units()) as units:
            for unit in units:
                with unit.loaded():
                    unit.advance()
                    if unit.step.kind == "head" and self.batches:
                        self._known = list(self._float_batches(unit))

    @torch.no_grad()
    def sums(self, unit: Unit) -> Sums:
        """Divergences of a model that is walked through with the batches as followers.

        Args:
            unit: Its head, loaded, as it will be served.

        Returns:
            Sums over all ranks.
        """
        own: dict[str, dict[TokenClass, tuple[float, int]]] = {}
        if self.batches:
            kept = all(known.logits is not None for known in self._known)
            float_head = None if kept or self._float is None else self._float
            name = self._bound.arch.head
            with float_head.loaded([name]) if float_head else contextlib.nullcontext():
                for hidden, batch, known in self._pairs(unit):
                    self._add(own, batch, known, self._divergences(unit, hidden, known))
        gathered = self._ranks.gather_json(own)
        return {
            sample: {name: (kl, count) for name, (kl, count) in classes.items()}
            for part in gathered
            for sample, classes in part.items()
        }

    def _pairs(self, unit: Unit) -> Iterator[tuple[Tensor, Batch, _FloatBatch]]:
        """Inputs of the head, batch by batch, with what is known of the batch."""
        for call in unit.main.followers.calls(unit.step):
            yield call.args[0], self.batches[call.batch], self._known[call.batch]

    def _float_batches(self, unit: Unit) -> Iterator[_FloatBatch]:
        for call in unit.main.followers.calls(unit.step):
            places = token_places(self.batches[call.batch], self._bound)
            wanted = torch.tensor([TOKEN_CLASSES.index(name) for name in self._weights])
            rows, columns = torch.isin(places, wanted.to(places.device)).nonzero(as_tuple=True)
            hidden = call.args[0][rows, columns]
            yield _FloatBatch(
                rows,
                columns,
                places[rows, columns],
                self._store.keep(hidden),
                self._kept_logits(unit, hidden),
            )

    def _kept_logits(self, unit: Unit, hidden: Tensor) -> Tensor | None:
        vocabulary = unit.module.get_parameter("weight").shape[0]
        size = len(hidden) * vocabulary * self._placement.precision.dtype.itemsize
        if size > self._left:
            return None
        self._left -= size
        with unit.as_served():
            return torch.cat([unit.module(part) for part in hidden.split(CHUNK)])

    def _divergences(self, unit: Unit, hidden: Tensor, known: _FloatBatch) -> Tensor:
        """KL divergence at each place, float64 ``[P]`` on the CPU."""
        found = [torch.empty(0, dtype=torch.float64)]
        float_hidden = known.hidden()
        for start in range(0, len(known.rows), CHUNK):
            part = slice(start, start + CHUNK)
            if known.logits is not None:
                logits = known.logits[part]
            elif self._float is not None:
                with self._placement.precision.in_force():
                    logits = self._float.module(self._bound.arch.head)(float_hidden[part])
            with unit.as_served():
                changed = unit.module(hidden[known.rows[part], known.columns[part]])
            found.append(UnchangedLogits(logits).divergence(changed).cpu())
        return torch.cat(found)

    def _add(
        self,
        sums: dict[str, dict[TokenClass, tuple[float, int]]],
        batch: Batch,
        known: _FloatBatch,
        divergences: Tensor,
    ) -> None:
        rows, classes = known.rows.cpu(), known.classes.cpu()
        for row, sample in enumerate(batch.ids):
            here = rows == row
            for number, name in enumerate(TOKEN_CLASSES):
                places = here & (classes == number)
                if count := int(places.sum()):
                    kl = float(divergences[places].sum())
                    sums.setdefault(sample, {})[name] = (kl, count)
