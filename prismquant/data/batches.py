"""From samples to batches that a model takes as they are.

:func:`make_batches` renders samples with the processor's own chat template and tells the tokens
apart: answers, placeholders of pictures and clips, padding. The same sample always gives the same
tensors, whatever stands beside it in its batch.

A batch is made when it is asked for and not kept: pixels are larger than all else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor

from prismquant.data import Sample, media_of, text_of
from prismquant.data.joined_rows import joined_rows
from prismquant.data.lengths import even_parts
from prismquant.data.media import Cost, Limits, media_cost, processor_inputs
from prismquant.data.spans import NoSpan, Rendered, answer_span, render
from prismquant.errors import DataError
from prismquant.memory import memory_error

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Batch:
    """Several samples as tensors, padded on the right.

    Attributes:
        inputs: Keyword arguments of the model: ``input_ids`` and ``attention_mask`` [B, T],
            pixels, grids.
        answer_mask: Bool [B, T]: tokens of the assistant message that ends the conversation, with
            its end-of-turn token. A row without one, or whose answer was cut, has none.
        vision_mask: Bool [B, T]: placeholders of pictures and clips.
        ids: Id of each row's sample.
        kinds: Kind of each row's sample.
        types: Type of task of each row's sample; empty where its metadata name none.
        cut: Ids of rows that were cut to the greatest length.
        running: Whether each row is running text, all of which counts as the answer; empty where
            none is.
        unknown: Why a row's answer could not be told apart, by the sample's id.
        again: Makes its pixels, by their names, where ``inputs`` hold only their shapes.
    """

    inputs: dict[str, Tensor]
    answer_mask: Tensor
    vision_mask: Tensor
    ids: tuple[str, ...]
    kinds: tuple[str, ...]
    types: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    running: tuple[bool, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)
    again: Callable[[], Mapping[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def attended(self) -> Tensor:
        """Bool [B, T]: tokens that are not padding."""
        return self.inputs["attention_mask"].bool()

    @property
    def pixels(self) -> dict[str, Tensor]:
        """Patches of pictures and clips, all that is large, or their shapes."""
        # Times of frames are numbers in a row.
        return {k: v for k, v in self.inputs.items() if v.is_floating_point() and v.dim() > 1}

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the pixels that the batch holds, or would hold."""
        return sum(value.numel() * value.element_size() for value in self.pixels.values())

    def whole(self) -> Batch:
        """The batch with its pixels."""
        if self.again is None:
            return self
        return replace(self, inputs=self.inputs | dict(self.again()), again=None)

    def hollow(self, again: Callable[[], Mapping[str, Tensor]]) -> Batch:
        """The batch with no more than the shapes of its pixels, which take no memory.

        Args:
            again: Makes them, by their names.
        """
        shapes = {name: v.new_zeros(1).expand(v.shape) for name, v in self.pixels.items()}
        return replace(self, inputs=self.inputs | shapes, again=again)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            answer_mask=self.answer_mask.to(device),
            vision_mask=self.vision_mask.to(device),
        )


@dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """Batches that are made anew each time that they are asked for.

    Attributes:
        parts: Samples of each batch.
        processor: Of the model.
        vision_ids: Placeholder tokens of pictures and clips.
        limits: What samples have at most.
    """

    parts: tuple[tuple[Sample, ...], ...]
    processor: Any
    vision_ids: frozenset[int]
    limits: Limits

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> Batch | Batches:
        if isinstance(index, slice):
            return replace(self, parts=self.parts[index])
        return self._made(self.parts[index])

    def cost(self, index: int) -> Cost:
        """Memory that making a batch takes, from the headers of its files.

        Raises:
            DataError: A file cannot be opened, or a size cannot be had.
        """
        costs = []
        for sample in self.parts[index]:
            with _naming(sample):
                costs.append(media_cost(sample, self.processor, self.limits))
        pixels = sum(cost.pixels for cost in costs)
        joined = 2 * pixels if sum(1 for cost in costs if cost.pixels) > 1 else pixels
        return Cost(max([joined, *(pixels - cost.pixels + cost.peak for cost in costs)]), pixels)

    def _made(self, samples: Sequence[Sample]) -> Batch:
        rows = [self._row(sample) for sample in samples]
        inputs = joined_rows([row.inputs for row in rows], self._padding)
        shape = inputs["input_ids"].shape
        answers = torch.zeros(shape, dtype=torch.bool)
        for number, row in enumerate(rows):
            answers[number, slice(*row.answer)] = True
        wanted = torch.tensor(sorted(self.vision_ids), dtype=inputs["input_ids"].dtype)
        vision = torch.isin(inputs["input_ids"], wanted)
        batch = Batch(
            inputs=inputs,
            answer_mask=answers,
            vision_mask=vision & inputs["attention_mask"].bool(),
            ids=tuple(sample.id for sample in samples),
            kinds=tuple(sample.kind for sample in samples),
            types=tuple(sample.type for sample in samples),
            running=tuple(sample.running for sample in samples),
            unknown={
                s.id: row.unknown for s, row in zip(samples, rows, strict=True) if row.unknown
            },
        )
        return batch if self.limits.max_length is None else _cut(batch, self.limits.max_length)

    def _row(self, sample: Sample) -> _Row:
        if sample.running:
            return self._running_row(sample)
        rendered = render(sample, self.processor)
        inputs = _processed(sample, rendered, self.processor, self.limits)
        answer, unknown = (0, 0), rendered.unknown
        if rendered.start is not None:
            try:
                answer = answer_span(inputs["input_ids"][0].tolist(), rendered, self.processor)
            except NoSpan as reason:
                unknown = str(reason)
        return _Row(inputs, answer, unknown)

    def _running_row(self, sample: Sample) -> _Row:
        """A row of running text; all its tokens are the answer."""
        if sample.window is not None:
            tokens = list(sample.window.tokens)
        else:
            tokens = self.processor.tokenizer(text_of(sample.messages[0]))["input_ids"]
        if self.vision_ids.intersection(tokens):
            raise DataError(
                "the text holds the placeholder of a picture or a clip",
                where=f"sample {sample.id}",
                remedy="remove it from the text",
            )
        ids = torch.tensor([tokens])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return _Row(inputs, (0, len(tokens)))

    @property
    def _padding(self) -> int:
        """Any token can pad, as padding never counts, but a placeholder."""
        own = getattr(self.processor.tokenizer, "pad_token_id", None)
        if own is not None:
            return int(own)
        return next(
            index for index in range(len(self.vision_ids) + 1) if index not in self.vision_ids
        )


@dataclass(frozen=True)
class _Row:
    """A sample as tensors.

    Attributes:
        inputs: Keyword arguments of the model, for a batch of one.
        answer: First token of its answer and the one after its end.
        unknown: Why that cannot be told.
    """

    inputs: dict[str, Tensor]
    answer: tuple[int, int]
    unknown: str = ""


def make_batches(
    samples: Sequence[Sample],
    processor: Any,
    *,
    batch_size: int,
    vision_token_ids: Collection[int],
    limits: Limits | None = None,
    most_tokens: int | None = None,
    one_kind: bool = False,
) -> Batches:
    """Render, tokenize and pad samples, a batch at a time. Kinds mix freely within a batch.

    Args:
        samples: What was read.
        processor: A processor of transformers with a chat template.
        batch_size: Rows of a batch; the last one may have fewer.
        vision_token_ids: Ids of the placeholder tokens of pictures and clips.
        limits: What samples have at most. An answer that was cut is no answer: its mask is empty.
        most_tokens: Samples that together have more tokens than this, by a rough estimate, are cut
            into even parts that have not, down to single samples.
        one_kind: Put pictures and clips into batches of their own; texts go with pictures.

    Returns:
        Batches on the CPU. Pictures and clips are read when their batch is asked for; a file that
        cannot be read, or a sample that the processor refuses, is a :class:`DataError` by then.

    Raises:
        DataError: The batch size leaves nothing, or a sample holds what the model can neither see
            nor hear, or cannot see together.
    """
    _require_senses(samples, processor)
    if one_kind:
        _require_one_kind(samples)
    if batch_size < 1:
        raise DataError(
            f"a batch of {batch_size} samples is impossible", remedy="a batch size of 1 or more"
        )
    limits = limits or Limits()
    parts = [
        tuple(part)
        for start in range(0, len(samples), batch_size)
        for batch in _apart(samples[start : start + batch_size], one_kind=one_kind)
        for part in even_parts(batch, most_tokens, limits)
    ]
    return Batches(tuple(parts), processor, frozenset(vision_token_ids), limits)


def _require_senses(samples: Sequence[Sample], processor: Any) -> None:
    """Refuse pictures and clips for a model that sees none, and sounds for one that hears none."""
    for part, kinds, called, can in (
        ("image_processor", {"image", "video"}, "show pictures or clips", "does not see"),
        ("video_processor", {"video"}, "show clips", "sees pictures alone"),
        ("feature_extractor", {"audio"}, "hold sounds", "does not hear"),
    ):
        if getattr(processor, part, None) is not None:
            continue
        found = [s.id for s in samples if kinds & {kind for kind, _ in media_of(s)}]
        if found:
            raise DataError(
                f"{len(found)} samples {called}, and the model {can}",
                where=f"sample {found[0]}",
                remedy="leave them out, or use another model",
            )


def _apart(samples: Sequence[Sample], *, one_kind: bool) -> list[Sequence[Sample]]:
    """Samples with clips and the others apart, where a batch shows one kind of media."""
    if not one_kind:
        return [samples]
    sides = [[s for s in samples if (s.kind == "video") == clip] for clip in (False, True)]
    return [side for side in sides if side]


def _require_one_kind(samples: Sequence[Sample]) -> None:
    """Refuse samples that show pictures beside clips."""
    mixed = [s.id for s in samples if {"image", "video"} <= {kind for kind, _ in media_of(s)}]
    if mixed:
        raise DataError(
            f"{len(mixed)} samples show pictures beside clips, which the model's own code cannot "
            "tell apart",
            where=f"sample {mixed[0]}",
            remedy="leave them out, or show a clip's frames as pictures",
        )


def _processed(
    sample: Sample, rendered: Rendered, processor: Any, limits: Limits
) -> dict[str, Tensor]:
    """A sample as the processor's batch of one."""
    with _naming(sample):
        media = processor_inputs(sample, processor, limits)
    try:
        encoded = processor(
            text=[rendered.text],
            return_tensors="pt",
            text_kwargs={"add_special_tokens": rendered.bare},
            **media,
        )
    # A processor is third-party code over user data: sizes, ratios, tokens, anything may displease
    # it.
    except Exception as error:
        if memory_error(error) is not None:
            raise
        thin = "aspect ratio" in str(error)
        raise DataError(
            f"the model's processor refuses the data: {error}",
            where=f"sample {sample.id}",
            remedy="crop the picture" if thin else "correct or remove the sample",
        ) from error
    found = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
    # Some processors round pixels to 16 bits; a model may run in float32 all the same.
    return {n: v.float() if v.dtype in _NARROW else v for n, v in found.items()}


def _cut(batch: Batch, length: int) -> Batch:
    """Rows of at most ``length`` tokens."""
    shape = batch.inputs["input_ids"].shape
    if shape[1] <= length:
        return batch
    for row in range(shape[0]):
        if bool(batch.vision_mask[row, length:].any()):
            raise DataError(
                f"a picture or a clip does not fit into {length} tokens",
                where=f"sample {batch.ids[row]}",
                remedy="raise the maximum length, use smaller pictures or fewer frames",
            )
    whole = ~batch.answer_mask[:, length:].any(dim=1, keepdim=True)
    # Running text that is cut is running text.
    whole |= torch.tensor(batch.running)[:, None]
    inputs = {
        name: value[:, :length].contiguous() if value.shape[:2] == shape else value
        for name, value in batch.inputs.items()
    }
    longer = batch.attended[:, length:].any(dim=1).tolist()
    return replace(
        batch,
        cut=tuple(sample for sample, cut in zip(batch.ids, longer, strict=True) if cut),
        inputs=inputs,
        answer_mask=batch.answer_mask[:, :length] & whole,
        vision_mask=batch.vision_mask[:, :length],
    )


@contextlib.contextmanager
def _naming(sample: Sample) -> Iterator[None]:
    """Say of what is wrong with a file to which sample it belongs."""
    try:
        yield
    except DataError as error:
        raise DataError(error.what, where=f"sample {sample.id}", remedy=error.remedy) from error
