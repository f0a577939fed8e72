"""Running text cut into windows of equally many tokens, as perplexity is measured on.

A document is tokenized as a whole, by the model's own tokenizer and with the special tokens that it
puts around any text. Its windows follow one another and do not overlap; none reaches from one
document into the next. What is left at a document's end and fills no window is left out, which is
told; a document that is shorter than a window is one, as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prismquant.data.samples import Sample, TextCut, Window, text_of
from prismquant.data.survey import position_limit
from prismquant.errors import DataError
from prismquant.models.config import identify, native_config
from prismquant.models.processor import load_processor

__all__ = ["Windows", "window_remarks"]

# As published perplexities of language models are measured.
_USUAL = 2048
_FEWEST = 2


@dataclass(frozen=True)
class Windows:
    """Cutter of running texts, by a model's tokenizer, which is loaded when it is first needed.

    Attributes:
        model: Folder of the model.
        length: Tokens of a window; None: 2048, or as many as the model has positions.
        trust_remote_code: Allow code in the folder to build the processor.
    """

    model: Path
    length: int | None = None
    trust_remote_code: bool = False

    def cut(self, texts: Sequence[Sample]) -> list[list[Sample]]:
        """Windows of each document, each a sample of its own.

        Args:
            texts: All running texts of a source, whole.

        Returns:
            For each text its windows; none for one with fewer than two tokens, where there is
            nothing to predict.

        Raises:
            DataError: The processor cannot be loaded, or a window is longer than the model allows.
        """
        if not texts:
            return []
        size, words = self._size, [text_of(text.messages[0]) for text in texts]
        tokens = [self._tokens(text) for text in words]
        source = TextCut(
            size,
            windows=sum(len(own) // size for own in tokens),
            short=sum(_FEWEST <= len(own) < size for own in tokens),
            tokens=sum(map(len, tokens)),
            form_feeds=sum(text.count("\f") for text in words),
        )
        return [self._cut(text, own, source) for text, own in zip(texts, tokens, strict=True)]

    def require_use(self, samples: Sequence[Sample], source: str) -> None:
        """Make sure that a length that was asked for has something to cut.

        Raises:
            DataError: There is no running text among the samples.
        """
        if self.length is not None and not any(sample.running for sample in samples):
            raise DataError(
                f"windows of {self.length} tokens are cut from running text, and the data hold "
                "conversations",
                where=source,
                remedy="leave out --seq-length, or give a .txt file; --max-length shortens samples",
            )

    def _cut(self, text: Sample, tokens: Sequence[int], source: TextCut) -> list[Sample]:
        size = source.size
        parts = [tokens[size * n : size * (n + 1)] for n in range(len(tokens) // size)]
        if not parts and len(tokens) >= _FEWEST:
            parts = [tokens]
        left = len(tokens) - sum(map(len, parts))
        return [
            replace(
                text,
                id=f"{text.id}.{number}",
                messages=({"role": "assistant", "content": self._tokenizer.decode(part)},),
                window=Window(tuple(part), text.id, left, short=len(part) < size, source=source),
            )
            for number, part in enumerate(parts, start=1)
        ]

    def _tokens(self, text: str) -> list[int]:
        found = self._tokenizer(text, return_attention_mask=False, verbose=False)
        return list(found["input_ids"])

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return load_processor(self.model, trust_remote_code=self.trust_remote_code).tokenizer

    @functools.cached_property
    def _size(self) -> int:
        most = position_limit(native_config(identify(self.model), self.model))
        if self.length is None:
            return _USUAL if most is None else min(_USUAL, most)
        if self.length < _FEWEST or (most is not None and self.length > most):
            raise DataError(
                f"windows of {self.length} tokens are impossible: the model has "
                f"{most or 'any number of'} positions, and one token predicts nothing",
                remedy=f"--seq-length from {_FEWEST} to {most or 'any number'}",
            )
        return self.length


def window_remarks(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Remarks for a user on how running text was cut; none where there is none.

    Args:
        samples: Those that are used.
    """
    windows = [sample.window for sample in samples if sample.window is not None]
    if not windows:
        return ()
    source = windows[0].source
    short = sum(window.short for window in windows)
    limited = len(windows) < source.windows + source.short
    left = source.tokens - sum(len(window.tokens) for window in windows)
    parts = []
    if source.windows:
        full = _of(len(windows) - short, source.windows)
        parts.append(f"{full} windows of {source.size} tokens")
    if source.short:
        parts.append(f"documents shorter than a window, taken whole: {_of(short, source.short)}")
    if limited:
        parts.append(
            "tokens left out, in windows not used and at documents' ends: "
            f"{left} of {source.tokens}"
        )
    elif left:
        parts.append(f"tokens at documents' ends that fill no window, left out: {left}")
    lines = [f"running text: {'; '.join(parts)}"]
    if source.form_feeds:
        lines.append(
            "running text: form feeds that do not stand alone on their line are text and end no "
            f"document: {source.form_feeds}"
        )
    return tuple(lines)


def _of(count: int, all_of_them: int) -> str:
    return str(count) if count == all_of_them else f"{count} of {all_of_them}"
