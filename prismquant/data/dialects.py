"""The ways in which tools write a row, brought into one: a list of messages.

Chat messages (OpenAI, Hugging Face, TRL, ms-swift) and turns (ShareGPT, LLaVA, LLaMA-Factory) hold
a conversation in one list; question and answer, prompt and completion, query and response hold it
in keys of their own. What the messages say is not looked at here.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prismquant.data.items import is_nothing, require_text
from prismquant.data.row_findings import Findings
from prismquant.data.samples import excerpt

CONVERSATIONS = ("messages", "conversations")
# A question's key, and the key of the answer that goes with it.
PAIRS = {
    "question": "answer",
    "prompt": "completion",
    "query": "response",
    "instruction": "output",
}
ANSWERS = ("answer", "answers", "completion", "response", "output")
PLAIN = "text"
SYSTEM = ("system", "system_prompt")


_LIKE = 0.8
# Words of their own that are that near to a key.
_WORDS = frozenset(("audit", "competition"))


@dataclass(frozen=True)
class Conversation:
    """A row as messages of any dialect.

    Attributes:
        messages: As the row holds them.
        head: The key that holds the conversation, or its question.
        used: Every key that went into the messages.
    """

    messages: list[Any]
    head: str
    used: frozenset[str]


def conversation_of(row: Mapping[str, Any]) -> Conversation:
    """The conversation of a row.

    Raises:
        Findings: None is there, or what there is has the wrong form.
    """
    known = (*CONVERSATIONS, *PAIRS, PLAIN)
    head = next((key for key in known if row.get(key) is not None), None)
    if head is None and (null := [repr(key) for key in known if key in row]):
        are = "is" if len(null) == 1 else "are"
        raise Findings(f"no conversation: {', '.join(null)} {are} null")
    if head is None:
        near = [f": did you mean {meant!r}?" for key in row if (meant := near_key(str(key), known))]
        keys = excerpt(", ".join(map(repr, sorted(row))) or "nothing")
        raise Findings(
            f"no conversation: none of {', '.join(map(repr, known))} is there, only {keys}"
            + "".join(near[:1])
        )
    if head in CONVERSATIONS:
        used, messages = {head}, _list(row[head], head)
    elif head == PLAIN:
        used, messages = {head}, [_question(require_text(row[head], repr(head)))]
    else:
        used, messages = _pair(row, head)
    used |= set(SYSTEM)
    return Conversation(_system(row, messages) + messages, head, frozenset(used))


@functools.lru_cache(maxsize=4096)
def near_key(key: str, known: tuple[str, ...]) -> str | None:
    """The known key of which this is a misspelling; longer names, such as image_id, are notes."""
    word = key.casefold()
    if word in _WORDS or not word.isalpha():
        return None
    near = difflib.get_close_matches(word, known, cutoff=_LIKE)
    near = [match for match in near if abs(len(word) - len(match)) <= 1 and match != key]
    return min(near, key=lambda match: abs(len(word) - len(match)), default=None)


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise Findings(f"{key!r} is not a list, but {excerpt(repr(value))}")
    return list(value)


def _system(row: Mapping[str, Any], messages: list[Any]) -> list[Any]:
    """The system prompt that stands beside the conversation, unless that begins with the same."""
    keys = [key for key in SYSTEM if row.get(key)]
    if not keys:
        return []
    if len(keys) > 1 and row[keys[0]] != row[keys[1]]:
        raise Findings(f"both {keys[0]!r} and {keys[1]!r} are there")
    text = require_text(row[keys[0]], repr(keys[0]))
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if str(first.get("role", first.get("from"))).casefold() != "system":
        return [{"role": "system", "content": text}]
    if first.get("content", first.get("value")) != text:
        raise Findings(f"{keys[0]!r} and a first message with another system prompt are there")
    return []


def _pair(row: Mapping[str, Any], head: str) -> tuple[set[str], list[Any]]:
    answer = _answer_key(row, head)
    used = {head, PAIRS[head], "history"} | ({answer} if answer else set())
    question = row[head]
    if isinstance(question, list) and question and isinstance(question[0], dict):
        messages = list(question)  # TRL's conversations of two parts
    else:
        text = require_text(question, repr(head))
        if head == "instruction" and row.get("input"):
            text += "\n" + require_text(row["input"], "'input'")
            used |= {"input"}
        messages = [_question(text)]
    messages = _history(row.get("history")) + messages
    if answer is not None:
        messages += _answer(row[answer], answer)
    return used, messages


def _question(text: str) -> dict[str, Any]:
    # As a list, since there may be pictures before it.
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def _answer_key(row: Mapping[str, Any], head: str) -> str | None:
    if row.get(PAIRS[head]) is not None:
        return PAIRS[head]
    others = [key for key in ANSWERS if row.get(key) is not None]
    if len(others) > 1:
        raise Findings(f"which is the answer: {' or '.join(map(repr, others))}?")
    return others[0] if others else None


def _answer(value: Any, key: str) -> list[Any]:
    if isinstance(value, list):
        if not value:
            raise Findings(f"{key!r} is an empty list")
        if isinstance(value[0], dict):
            return value
        # Questions about pictures come with all the answers that count as right.
        value = value[0]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # a count, which is written in one way alone
    return [{"role": "assistant", "content": require_text(value, repr(key))}]


def _history(value: Any) -> list[Any]:
    """ms-swift's and LLaMA-Factory's earlier turns: pairs of a question and its answer."""
    messages = []
    for turn in [] if is_nothing(value) else _list(value, "history"):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise Findings(f"'history' holds pairs of texts, not {excerpt(repr(turn))}")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": require_text(text, "a text of 'history'")})
    return messages
