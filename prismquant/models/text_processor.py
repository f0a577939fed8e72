"""Processor of a model of text alone: its tokenizer, called as processors of transformers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prismquant.errors import DataError

__all__ = ["TextProcessor"]

# All that a language model is told of a text; tokenizers may add ids of token types.
_INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class TextProcessor:
    """Tokenizer of a model that sees no pictures and no clips.

    Attributes:
        tokenizer: Of transformers. It may have no chat template: then conversations are refused,
            and texts stand for themselves.
    """

    tokenizer: Any

    @property
    def chats(self) -> bool:
        """Whether there is a template for conversations."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Text of a conversation, as the tokenizer's chat template writes it.

        Args:
            messages: Their contents are texts, or lists of texts, which are joined.
            options: Of the tokenizer's method of this name.

        Raises:
            DataError: There is no template.
        """
        if not self.chats:
            raise DataError(
                "the tokenizer has no chat template",
                remedy="add chat_template.jinja of the instruction-tuned model, or use running "
                "text: rows of 'text', or a .txt file",
            )
        plain = [{**message, "content": _text(message["content"])} for message in messages]
        text: str = self.tokenizer.apply_chat_template(plain, **options)
        return text

    def __call__(
        self,
        text: Sequence[str],
        *,
        return_tensors: str = "pt",
        text_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Tokens of texts.

        Args:
            text: What to tokenize; several texts must have equally many tokens.
            return_tensors: ``pt``, for tensors of torch.
            text_kwargs: Options of the tokenizer.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 [B, T].
        """
        encoded = self.tokenizer(list(text), return_tensors=return_tensors, **(text_kwargs or {}))
        return {name: encoded[name] for name in _INPUTS}


def _text(content: Any) -> str:
    """A message's text; templates of language models know no lists of items."""
    return content if isinstance(content, str) else "".join(item["text"] for item in content)
