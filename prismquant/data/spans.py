"""A conversation as the model's chat template writes it, and where in it the answer stands.

Second moments and ranges need no answer; gradients and evaluation do. Where it cannot be told, the
sample has none for them, and says why.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prismquant.data import Message, Sample, media_of, text_of
from prismquant.data.items import MEDIA
from prismquant.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

# In place of an answer, to see what a template writes around it.
_STAND_IN = "Answer-of-the-Sample"


class NoSpan(Exception):  # noqa: N818 - nothing is wrong with the sample
    """Says why the start of the answer cannot be told."""


@dataclass(frozen=True)
class Rendered:
    """A sample as the chat template writes it.

    Attributes:
        text: The whole, with one placeholder for each picture and clip.
        start: Number of characters before its answer; None where there is no answer, or it cannot
            be told apart.
        unknown: Why it cannot be told apart.
        bare: Whether the tokenizer is to put its own special tokens around it: templates write
            them themselves.
    """

    text: str
    start: int | None = None
    unknown: str = ""
    bare: bool = False


def render(sample: Sample, processor: Any) -> Rendered:
    """Write a sample with the processor's chat template.

    A text that nobody answers stands for itself where the tokenizer has no template.

    Raises:
        DataError: The template refuses the conversation, or placeholders are not as many as
            pictures, clips and sounds.
    """
    if not getattr(processor, "chats", True) and len(sample.messages) == 1:
        return Rendered(text_of(sample.messages[0]), bare=True)
    messages = [_for_template(message) for message in sample.messages]
    text = _template(processor, sample, messages)
    _require_placeholders(sample, processor, text)
    if sample.answer is None:
        return Rendered(text)
    try:
        return Rendered(text, _start(sample, processor, messages, text))
    except NoSpan as reason:
        return Rendered(text, unknown=str(reason))


def answer_span(tokens: Sequence[int], rendered: Rendered, processor: Any) -> tuple[int, int]:
    """First token of the answer and the one after its end-of-turn token.

    The processor widens every placeholder into many tokens, so the texts after the last one are
    compared: as a placeholder is a special token, their tokens do not depend on what stands
    before. That the row ends with the text's tokens is checked and not assumed. A token in which
    the prompt's end and the answer's beginning were merged belongs to the answer.

    Args:
        tokens: Of the row, without padding.
        rendered: Its text, with an answer.
        processor: Has the tokenizer.

    Raises:
        NoSpan: It cannot be told.
    """
    text, tokenizer = rendered.text, processor.tokenizer
    marks = [getattr(processor, f"{kind}_token", None) for kind in MEDIA]
    shown = [mark for mark in marks if mark and mark in text]
    skipped = max((text.rindex(mark) + len(mark) for mark in shown), default=0)
    start = (rendered.start or 0) - skipped
    if start < 0:
        raise NoSpan("a picture or a clip follows it")
    whole, first = _tokenized(tokenizer, text[skipped:], start)
    offset = len(tokens) - len(whole)
    if offset < 0 or list(tokens[offset:]) != whole:
        raise NoSpan("its tokens are not those of the text after its last picture or clip")
    special = _special_ids(tokenizer)
    ends = [index for index in range(first, len(whole)) if whole[index] in special]
    if not ends:
        raise NoSpan("the chat template ends the answer with no special token")
    return offset + first, offset + ends[-1] + 1


def _tokenized(tokenizer: Any, text: str, start: int) -> tuple[list[int], int]:
    """Tokens of a text, and which of them is the first that reaches beyond ``start`` characters."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        whole = list(encoded["input_ids"])
        reach = [end > start for _, end in encoded["offset_mapping"]]
        return whole, reach.index(True) if True in reach else len(whole)
    # Without offsets: the prompt's tokens alone, if they are those at the beginning of the whole.
    whole, prompt = (
        list(tokenizer(part, add_special_tokens=False)["input_ids"])
        for part in (text, text[:start])
    )
    if whole[: len(prompt)] != prompt:
        raise NoSpan("the prompt's tokens are not the first tokens of the whole")
    return whole, len(prompt)


def _start(sample: Sample, processor: Any, messages: list[Any], text: str) -> int:
    """Number of characters before the answer."""
    plain = isinstance(messages[-1]["content"], str)
    content = _STAND_IN if plain else [{"type": "text", "text": _STAND_IN}]
    try:
        prompt = _template(processor, sample, messages[:-1], add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        # Some templates begin an answer in another way than they prompt for one.
        marked = _template(
            processor, sample, [*messages[:-1], {**messages[-1], "content": content}]
        )
    except DataError as error:
        raise NoSpan(error.what) from error
    before, found, after = marked.partition(_STAND_IN)
    inside = len(text) - len(before) - len(after)
    if found and inside >= 0 and text.startswith(before) and text.endswith(after):
        return len(before)
    raise NoSpan("the chat template does not continue its own prompt")


def _require_placeholders(sample: Sample, processor: Any, text: str) -> None:
    counts = Counter(kind for kind, _ in media_of(sample))
    for kind in MEDIA:
        token = getattr(processor, f"{kind}_token", None)
        found = text.count(token) if token else 0
        if found != counts[kind]:
            raise DataError(
                f"{counts[kind]} {kind}s, but {found} placeholders {token!r} in the text",
                where=f"sample {sample.id}",
                remedy="a text must not hold placeholder tokens itself, and the chat template must "
                "know items of this type",
            )


def _template(processor: Any, sample: Sample, messages: list[Any], **options: bool) -> str:
    try:
        text: str = processor.apply_chat_template(messages, tokenize=False, **options)
    except DataError as error:
        raise DataError(error.what, where=f"sample {sample.id}", remedy=error.remedy) from error
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


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {int(index) for index, token in added.items() if getattr(token, "special", False)}
    return marked | set(tokenizer.all_special_ids)
