"""A call: how the model runs one unit for one batch, and what is kept of it between units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prismquant.data import Kind
from prismquant.statistics.tokens import Tokens

# A gradient for each loss; None where the loss does not depend on the tensor.
Gradients = list[Tensor | None]
# Name of the unit that put a tensor out, and which of its tensors it is.
Source = tuple[str, int]


@dataclass
class TowerPass:
    """State of one call between units.

    Attributes:
        inputs: Gives the keyword arguments of the model (vision) or of the language model (llm); of
            pixels they have the shape.
        row_weights: [tokens] float32, 0 for padding; None: every row counts.
        vision: [tokens] bool, rows of images and videos in the language model; None elsewhere.
        video: [tokens] bool, rows of videos among these; None elsewhere.
        tokens: How many rows of each modality count in the language model; None elsewhere.
        kind: What a pass of the vision tower is of.
        latest: Name of the last finished step of the chain.
        hidden: Gives its output.
        entry_zeros: What the entry step's output is like, for a stand-in that costs nothing.
        features: Give the outputs of finished projector steps, by name.
        finished: Give the outputs of finished steps of the chain that later steps look back at; of
            all, where outputs are kept.
        before: Name of the step of the chain that was finished before each finished step, by name;
            where outputs are kept.
        gradients: Give the gradients that have arrived at outputs, on the way back.
        written: Give what finished steps have written into dictionaries that they were given, such
            as keys and values for later steps, by the argument and the entry.
        batch: Number of the batch.
        ids: Samples of the batch.
        pixels: Makes the pixels, by their key, until the entry step has read them; for good where
            outputs are kept.
        glance: Gives what of the pixels calls of later steps depend on, by their key; None: no more
            than their shape.
    """

    inputs: Callable[[], dict[str, Any]]
    row_weights: Tensor | None
    vision: Tensor | None = None
    video: Tensor | None = None
    tokens: Tokens | None = None
    kind: Kind = "text"
    latest: str = ""
    hidden: Callable[[], Any] = lambda: None
    entry_zeros: Any = None
    features: dict[str, Callable[[], Any]] = field(default_factory=dict)
    finished: dict[str, Callable[[], Any]] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    gradients: dict[Source, Callable[[], Gradients]] = field(default_factory=dict)
    written: dict[str, dict[Any, Callable[[], Any]]] = field(default_factory=dict)
    batch: int = 0
    ids: tuple[str, ...] = ()
    pixels: Callable[[], dict[str, Tensor]] | None = None
    glance: Callable[[], dict[str, Tensor]] | None = None

    def whole_inputs(self) -> dict[str, Any]:
        """The keyword arguments with pixels, as long as these are needed."""
        return self.inputs() | (self.pixels() if self.pixels else {})

    def later_inputs(self) -> dict[str, Any]:
        """The keyword arguments for calls of later steps than the entry step."""
        return self.inputs() | (self.glance() if self.glance else {})

    def copied(self) -> TowerPass:
        """The same state, to go on from here by itself; no gradient has arrived at it."""
        kept: dict[str, Any] = {
            name: dict(getattr(self, name)) for name in ("features", "finished", "before")
        }
        written = {key: dict(entries) for key, entries in self.written.items()}
        return replace(self, **kept, written=written, gradients={})


@dataclass(frozen=True)
class StepCall:
    """A call of one unit by the model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        row_weights: [tokens] float32 weights of the rows for statistics, or None: all count alike.
        vision: [tokens] bool, which rows are of an image or video, in the language model; else
            None.
        keep: Stores the step's output, which later steps will see.
        tokens: How many rows of each modality count in the language model; None elsewhere.
        kind: What all rows are of elsewhere.
        ids: Samples of the batch, in the language model.
        batch: Number of the batch.
        video: [tokens] bool, which rows are of a video, in the language model; else None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    row_weights: Tensor | None
    vision: Tensor | None
    keep: Callable[[Any], None]
    tokens: Tokens | None = None
    kind: Kind = "text"
    ids: tuple[str, ...] = ()
    batch: int = 0
    video: Tensor | None = None

    def seen(self, rows: int) -> Tokens:
        """Rows of a layer by modality; padding is of none."""
        if self.tokens is not None:
            return self.tokens
        counted = rows if self.row_weights is None else int((self.row_weights > 0).sum())
        return Tokens(**{self.kind: counted})

    def token_weights(self, vision_weight: float) -> Tensor | None:
        """``row_weights`` with rows of images and videos counted ``vision_weight`` times."""
        if self.vision is None or vision_weight == 1:
            return self.row_weights
        weights = torch.where(self.vision, vision_weight, 1.0)
        return weights if self.row_weights is None else weights * self.row_weights

    def of_rows(self, rows: Tensor) -> StepCall:
        """The call as it is seen by a layer that is given some of its rows.

        Args:
            rows: Which, int64 ``[n]``; a row may come several times.
        """
        weights, vision, video = (
            None if one is None else one[rows.to(one.device)]
            for one in (self.row_weights, self.vision, self.video)
        )
        tokens = None if vision is None or video is None else tokens_by_kind(vision, video, weights)
        return replace(self, row_weights=weights, vision=vision, video=video, tokens=tokens)


def joined(calls: Sequence[StepCall]) -> StepCall:
    """Several calls as one, whose rows follow each other; there must be one at least."""

    def rows(parts: Sequence[Tensor | None]) -> Tensor | None:
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None

    weights, vision, video = (
        rows([getattr(call, name) for call in calls]) for name in ("row_weights", "vision", "video")
    )
    tokens = None if vision is None or video is None else tokens_by_kind(vision, video, weights)
    kind = calls[0].kind
    return StepCall((), {}, weights, vision, lambda _: None, tokens, kind, video=video)


def tokens_by_kind(vision: Tensor, video: Tensor, weights: Tensor | None) -> Tokens:
    """Tokens of each modality that count.

    Args:
        vision: bool ``[tokens]``, of images and videos.
        video: bool ``[tokens]``, of videos.
        weights: What each counts for; None: all count.
    """
    counted = torch.ones_like(vision) if weights is None else weights > 0
    parts = (~vision, vision & ~video, vision & video)
    return Tokens(*(int((part & counted).sum()) for part in parts))
