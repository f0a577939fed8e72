"""From samples to batches that a model takes as they are.

:func:`make_batches` renders samples with the processor's own chat template and tells the tokens
apart: answers, placeholders of pictures and clips, padding. The same input always gives the same
tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prismquant.errors import DataError
from prismquant.pipeline.data import Message, Sample, excerpt, located, media_of, text_of
from prismquant.pipeline.video import (
    Clip,
    Sampling,
    read_frames,
    read_picture,
    read_video,
)


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
    """

    inputs: dict[str, Tensor]
    answer_mask: Tensor
    vision_mask: Tensor
    ids: tuple[str, ...]
    kinds: tuple[str, ...]
    types: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def attended(self) -> Tensor:
        """Bool [B, T]: tokens that are not padding."""
        return self.inputs["attention_mask"].bool()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            answer_mask=self.answer_mask.to(device),
            vision_mask=self.vision_mask.to(device),
        )


@dataclass(frozen=True)
class _Rendered:
    """A sample as the chat template writes it: text, and the characters before its answer."""

    text: str
    answer: int | None


def make_batches(
    samples: Sequence[Sample],
    processor: Any,
    *,
    batch_size: int,
    vision_token_ids: Collection[int],
    max_length: int | None = None,
    sampling: Sampling | None = None,
    most_tokens: int | None = None,
) -> Iterator[Batch]:
    """Render, tokenize and pad samples, a batch at a time. Kinds mix freely within a batch.

    Args:
        samples: What was read.
        processor: A processor of transformers with a chat template.
        batch_size: Rows of a batch; the last one may have fewer.
        vision_token_ids: Ids of the placeholder tokens of pictures and clips.
        max_length: Longer rows are cut to this many tokens, but never within a picture or a clip.
            An answer that was cut is no answer: its mask is empty.
        sampling: How frames of video files are chosen.
        most_tokens: Samples that together have more tokens than this, by a rough estimate, are cut
            into even parts that have not, down to single samples.

    Yields:
        Batches on the CPU. Pictures and clips are read only when their batch is due.

    Raises:
        DataError: A file cannot be read, or the processor refuses a sample.
    """
    if batch_size < 1:
        raise DataError(
            f"a batch of {batch_size} samples is impossible", remedy="a batch size of 1 or more"
        )
    vision_ids, sampling = frozenset(vision_token_ids), sampling or Sampling()
    return (
        _make_batch(part, processor, vision_ids, max_length, sampling)
        for start in range(0, len(samples), batch_size)
        for part in _parts(samples[start : start + batch_size], most_tokens)
    )


def by_length(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of similar length next to one another, so that batches waste less on padding.

    The order follows from the samples alone. Lengths are estimated from texts and picture sizes.

    Raises:
        DataError: A file cannot be found.
    """
    return sorted(samples, key=_length_estimate)


def _parts(samples: Sequence[Sample], most_tokens: int | None) -> Iterator[Sequence[Sample]]:
    """Samples of a batch in even parts; how many follows from these samples alone."""
    count = 1
    if most_tokens is not None:
        tokens = sum(_length_estimate(sample) for sample in samples)
        count = min(max(math.ceil(tokens / most_tokens), 1), len(samples))
    for number in range(count):
        yield samples[len(samples) * number // count : len(samples) * (number + 1) // count]


def _make_batch(
    samples: Sequence[Sample],
    processor: Any,
    vision_ids: frozenset[int],
    max_length: int | None,
    sampling: Sampling,
) -> Batch:
    rendered = [_render(sample, processor) for sample in samples]
    inputs = _process(samples, [row.text for row in rendered], processor, sampling)
    ids, attention = inputs["input_ids"], inputs["attention_mask"].bool()
    wanted = torch.tensor(sorted(vision_ids), dtype=ids.dtype)
    vision = torch.isin(ids, wanted) & attention
    answers = torch.zeros_like(vision)
    for row, (sample, text) in enumerate(zip(samples, rendered, strict=True)):
        if text.answer is not None:
            tokens = ids[row, : int(attention[row].sum())].tolist()
            first, last = _answer_span(tokens, text, processor, sample)
            answers[row, first:last] = True
    batch = Batch(
        inputs=inputs,
        answer_mask=answers,
        vision_mask=vision,
        ids=tuple(sample.id for sample in samples),
        kinds=tuple(sample.kind for sample in samples),
        types=tuple(sample.type for sample in samples),
    )
    return batch if max_length is None else _cut(batch, max_length)


def _render(sample: Sample, processor: Any) -> _Rendered:
    """The sample's text from the chat template, one placeholder for each picture and clip."""
    messages = [_for_template(message) for message in sample.messages]
    text = _template(processor, sample, messages)
    answer = None
    if sample.answer is not None:
        prompt = _template(processor, sample, messages[:-1], add_generation_prompt=True)
        if not text.startswith(prompt):
            raise _span_error(sample, "the chat template does not continue its own prompt")
        answer = len(prompt)
    counts = Counter(kind for kind, _ in media_of(sample))
    for kind in ("image", "video"):
        token = getattr(processor, f"{kind}_token", None)
        found = text.count(token) if token else 0
        if found != counts[kind]:
            raise DataError(
                f"{counts[kind]} {kind}s, but {found} placeholders {token!r} in the text",
                where=f"sample {sample.id}",
                remedy="a text must not hold placeholder tokens itself, and the chat template must "
                "know items of this type",
            )
    return _Rendered(text, answer)


def _template(processor: Any, sample: Sample, messages: list[Any], **options: bool) -> str:
    try:
        text: str = processor.apply_chat_template(messages, tokenize=False, **options)
    # Templates are programs of their own; many raise errors of jinja2 for what they do not expect.
    except Exception as error:
        raise DataError(
            f"the chat template refuses the conversation: {error}",
            where=f"sample {sample.id}",
            remedy="bring the roles into an order that the model knows, or check the chat template",
        ) from error
    return text


def _for_template(message: Message) -> dict[str, Any]:
    """A message without its files: templates only look at the types of items."""
    content = message["content"]
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    items = [dict(item) if item["type"] == "text" else {"type": item["type"]} for item in content]
    return {"role": message["role"], "content": items}


def _process(
    samples: Sequence[Sample], texts: list[str], processor: Any, sampling: Sampling
) -> dict[str, Tensor]:
    pictures: list[Image.Image] = []
    clips: list[Clip] = []
    least = int(getattr(getattr(processor, "video_processor", None), "temporal_patch_size", 1) or 1)
    for sample in samples:
        try:
            for kind, item in media_of(sample):
                if kind == "image":
                    pictures.append(read_picture(located(item["image"], sample)))
                else:
                    clips.append(_read_clip(item, sample, sampling).lengthened(least))
        except DataError as error:
            raise DataError(error.what, where=f"sample {sample.id}", remedy=error.remedy) from error
    given: dict[str, Any] = {
        "text": texts,
        "images": pictures or None,
        "videos": [clip.frames for clip in clips] or None,
        "return_tensors": "pt",
        # Templates write the special tokens themselves.
        "text_kwargs": {"padding": True, "padding_side": "right", "add_special_tokens": False},
    }
    if clips:
        given["videos_kwargs"] = {
            "do_sample_frames": False,
            "video_metadata": [clip.metadata for clip in clips],
        }
    try:
        encoded = processor(**given)
    # A processor is third-party code over user data: sizes, ratios, tokens, anything may displease
    # it.
    except Exception as error:
        listed = ", ".join(sample.id for sample in samples)
        raise DataError(
            f"the model's processor refuses the data: {error}",
            where=f"one of the samples {excerpt(listed)}",
            remedy="use a batch size of 1 to find the sample",
        ) from error
    return {name: value for name, value in encoded.items() if isinstance(value, Tensor)}


def _read_clip(item: Mapping[str, Any], sample: Sample, sampling: Sampling) -> Clip:
    file, fps = item["video"], item.get("fps", sampling.fps)
    if isinstance(file, list):
        return read_frames([located(frame, sample) for frame in file], fps)
    return read_video(sample.folder / file, replace(sampling, fps=fps))


def _answer_span(
    tokens: list[int], text: _Rendered, processor: Any, sample: Sample
) -> tuple[int, int]:
    """First token of the answer and the one after its end-of-turn token.

    The processor widens every placeholder into many tokens, so the texts after the last one are
    compared: as a placeholder is a special token, their tokens do not depend on what stands
    before. That the row ends with the text's tokens, and that the prompt's tokens come first among
    them, is checked and not assumed.
    """
    marks = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video")]
    shown = [mark for mark in marks if mark and mark in text.text]
    start = max((text.text.rindex(mark) + len(mark) for mark in shown), default=0)
    tokenizer = processor.tokenizer
    whole, prompt = (
        tokenizer(text.text[start:stop], add_special_tokens=False)["input_ids"]
        for stop in (None, text.answer)
    )
    offset = len(tokens) - len(whole)
    if tokens[offset:] != whole:
        raise _span_error(
            sample, "its tokens are not those of the text after its last picture or clip"
        )
    if whole[: len(prompt)] != prompt:
        raise _span_error(sample, "the prompt's tokens are not the first tokens of the whole")
    special = _special_ids(tokenizer)
    ends = [index for index in range(len(prompt), len(whole)) if whole[index] in special]
    if not ends:
        raise _span_error(sample, "the chat template ends the answer with no special token")
    return offset + len(prompt), offset + ends[-1] + 1


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {int(index) for index, token in added.items() if getattr(token, "special", False)}
    return marked | set(tokenizer.all_special_ids)


def _span_error(sample: Sample, reason: str) -> DataError:
    return DataError(
        f"where the answer starts cannot be told: {reason}",
        where=f"sample {sample.id}",
        remedy="check the processor's chat template and tokenizer files",
    )


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
    inputs = {
        name: value[:, :length] if value.shape[:2] == shape else value
        for name, value in batch.inputs.items()
    }
    return replace(
        batch,
        inputs=inputs,
        answer_mask=batch.answer_mask[:, :length] & whole,
        vision_mask=batch.vision_mask[:, :length],
    )


def _length_estimate(sample: Sample) -> float:
    """Roughly the tokens of a sample: four characters, or 28 x 28 pixels, each."""
    tokens = sum(len(text_of(message)) for message in sample.messages) / 4
    for kind, item in media_of(sample):
        file = item[kind]
        frames = file if isinstance(file, list) else [file]
        first = located(frames[0], sample)
        if isinstance(first, Image.Image):
            width, height = first.size
        elif kind == "image" or isinstance(file, list):
            width, height = _header_size(first)
        else:
            width, height = 640, 480
        tokens += width * height / 28**2 * len(frames)
    return tokens


def _header_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return picture.size
    except OSError:  # explained when the picture itself is read
        return 0, 0
