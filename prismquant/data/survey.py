"""The first pass over data: everything is read once, before any long work, and pixels are let go.

A run must not end after hours at a sample that the processor refuses, nor hold the pixels of all
samples while it works on one. So each batch is made once, looked at, and reduced to what is small:
tokens, masks, grids, and the shape of its pixels. Those are made again when they are due.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from prismquant.data import Sample, excerpt
from prismquant.data.batch_fingerprint import fingerprint_batch
from prismquant.data.media import Cost
from prismquant.errors import DataError
from prismquant.memory import resident_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from prismquant.data.batches import Batch, Batches

# Pixels of small sets stay, as it takes time to make them: so many bytes, and no more than this
# part of the memory that is left.
_KEPT_BYTES = 1 << 30
_KEPT_PART = 4
_MAX_FINDINGS = 10


@dataclass(frozen=True)
class Survey:
    """Findings of the first pass over the data.

    Attributes:
        batches: Without pixels, but for those that stay.
        prints: Fingerprint of each batch, with its pixels.
        making: The memory that making a batch takes, at most, of those whose pixels do not stay.
        kept_bytes: Bytes of pixels that stay.
        cut: Ids of samples that were cut to the greatest length.
        unknown: Why a sample's answer could not be told apart, by its id.
    """

    batches: tuple[Batch, ...] = ()
    prints: tuple[str, ...] = ()
    making: Cost = field(default_factory=Cost)
    kept_bytes: int = 0
    cut: tuple[str, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)

    def remarks(self, *, answers: bool) -> tuple[str, ...]:
        """Remarks on the data for a user, a line each.

        Args:
            answers: Whether answers are needed.
        """
        lines = []
        if self.cut:
            lines.append(f"{_counted(self.cut)} cut to the greatest length")
        if answers and self.unknown:
            names, reasons = tuple(self.unknown), sorted(set(self.unknown.values()))
            lines.append(
                f"{_counted(names)} left out of what looks at answers, as it cannot be told where "
                f"theirs begin: {'; '.join(reasons)}"
            )
        return tuple(lines)


def survey(batches: Batches, *, most_bytes: int, positions: int | None = None) -> Survey:
    """Make each batch once.

    Args:
        batches: What to look at.
        most_bytes: Memory that the process may take.
        positions: Tokens that a row may have, if that is known.

    Raises:
        DataError: A file cannot be read, the processor refuses a sample, a row is too long, or
            making a batch takes more memory than is left. Up to ten findings come together.
    """
    found = _Findings(positions)
    keep = min(_KEPT_BYTES, (most_bytes - resident_bytes()) // _KEPT_PART)
    looked: list[Batch] = []
    prints: list[str] = []
    making, kept = Cost(), 0
    for index in range(len(batches)):
        with found.gathered():
            cost = batches.cost(index)
            _require_room(cost, most_bytes - resident_bytes(), batches.parts[index])
            batch = batches[index]
            found.look(batch)
            prints.append(fingerprint_batch(batch))
            if kept + batch.pixel_bytes <= keep:
                kept += batch.pixel_bytes
            else:
                making = max(making, cost, key=lambda one: one.peak)
                batch = batch.hollow(_Again(batches, index, prints[-1]))
            looked.append(batch)
        if found.many:
            break
    found.report()
    return Survey(
        tuple(looked),
        tuple(prints),
        making,
        kept,
        tuple(name for batch in looked for name in batch.cut),
        {name: why for batch in looked for name, why in batch.unknown.items()},
    )


def let_go(found: Survey, batches: Batches) -> Survey:
    """The same, but no pixels stay.

    Args:
        found: From :func:`survey`.
        batches: What was looked at.
    """
    costs = [batches.cost(index) for index in range(len(batches))]
    hollow = [
        batch.hollow(_Again(batches, index, found.prints[index]))
        for index, batch in enumerate(found.batches)
    ]
    making = max(costs, key=lambda one: one.peak, default=Cost())
    return replace(found, batches=tuple(hollow), making=making, kept_bytes=0)


def position_limit(config: Any) -> int | None:
    """Number of tokens that a model was made for; None where its configuration does not say.

    Args:
        config: Of transformers.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    ropes = getattr(text, "rope_parameters", None) or {}
    factor, original = ropes.get("factor"), ropes.get("original_max_position_embeddings")
    if not isinstance(limit, int):
        return None
    if isinstance(factor, int | float) and isinstance(original, int):
        return max(limit, int(factor * original))
    return limit


class _Again:
    """Makes the pixels of a batch once more, and sees to it that they are the same.

    Two chains of steps look at a batch together: the second one gets what the first still holds.
    """

    def __init__(self, batches: Batches, index: int, digest: str) -> None:
        self._batches, self._index, self._digest = batches, index, digest
        self._held: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._names: frozenset[str] = frozenset()

    def __call__(self) -> dict[str, Tensor]:
        held = dict(self._held)
        if held and held.keys() == self._names:
            return held
        batch = self._batches[self._index]
        if fingerprint_batch(batch) != self._digest:
            raise DataError(
                "pictures or clips have changed since the run began",
                where=_listed(batch.ids),
                remedy="bring back the files as they were and run again with --resume: finished "
                "steps are kept",
            )
        self._held, self._names = WeakValueDictionary(batch.pixels), frozenset(batch.pixels)
        return batch.pixels


class _Findings:
    """Findings on the data, told together."""

    def __init__(self, positions: int | None) -> None:
        self._positions = positions
        self._long: list[tuple[str, int]] = []
        self._errors: list[DataError] = []

    @property
    def many(self) -> bool:
        return len(self._errors) + len(self._long) >= _MAX_FINDINGS

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            self._errors.append(error)

    def look(self, batch: Batch) -> None:
        lengths = batch.attended.sum(dim=1).tolist()
        for name, length in zip(batch.ids, lengths, strict=True):
            if self._positions is not None and length > self._positions:
                self._long.append((name, length))

    def report(self) -> None:
        """Raise what was found."""
        errors = list(self._errors)
        if self._long:
            errors.append(
                DataError(
                    f"{', '.join(f'{length} tokens' for _, length in self._long)}: more than the "
                    f"{self._positions} positions that the model has",
                    where=_listed([name for name, _ in self._long]),
                    remedy=f"leave them out, or cut them with --max-length {self._positions}",
                )
            )
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise DataError(
                f"the data cannot be used, {len(errors)} findings:\n"
                + "\n".join(f"  - {_line(error)}" for error in errors),
                remedy="correct or remove these samples; nothing was started",
            )


def _require_room(cost: Cost, left: int, samples: Sequence[Sample]) -> None:
    if cost.peak > left:
        raise DataError(
            f"reading and processing its pictures and clips takes {cost.peak / 2**20:.0f} MiB, and "
            f"{max(left, 0) / 2**20:.0f} MiB are left",
            where=_listed([sample.id for sample in samples]),
            remedy="--max-pixels, --max-frames or a smaller --batch-size needs less; or allow more "
            "with --memory-budget",
        )


def _counted(names: Sequence[str]) -> str:
    listed = excerpt(", ".join(names))
    return f"1 sample ({listed}) is" if len(names) == 1 else f"{len(names)} samples ({listed}) are"


def _line(error: DataError) -> str:
    where = f"{error.where}: " if error.where else ""
    return where + error.what + (f" ({error.remedy})" if error.remedy else "")


def _listed(names: Sequence[str]) -> str:
    return f"sample {names[0]}" if len(names) == 1 else f"samples {excerpt(', '.join(names))}"
