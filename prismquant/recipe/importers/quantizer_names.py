"""Globs of ModelOpt's quantizers, as globs of the layers that these belong to.

A quantizer is called like its layer, and then ``weight_quantizer``, ``input_quantizer`` or
``output_quantizer``: ``model.layers.0.mlp.up_proj.weight_quantizer``. A glob means some of either.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal, get_args

_TOKEN = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)
Kind = Literal["weight_quantizer", "input_quantizer", "output_quantizer"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def layer_globs(pattern: str, kind: Kind) -> tuple[str, ...]:
    """Globs of the layers whose quantizer of a kind a glob means; none: it means none of these.

    Args:
        pattern: In the grammar of :mod:`fnmatch`.
        kind: One of :data:`KINDS`.
    """
    tokens = tuple(_TOKEN.findall(pattern))
    found = _without(tokens, f".{kind}")
    globs = ["".join(one) for one in found]
    # What a wider glob means already needs no second one.
    if "*" in globs:
        return ("*",)
    return tuple(dict.fromkeys(globs))


@cache
def _without(tokens: tuple[str, ...], ending: str) -> tuple[tuple[str, ...], ...]:
    """All globs of what may stand before an ending, so that the whole is matched."""
    if not ending:
        return (tokens,)
    if not tokens:
        return ()
    *head, last = tokens
    before = tuple(head)
    if last == "*":
        # The star takes nothing of the ending, or its last character, and goes on.
        return tuple(dict.fromkeys((*_without(tokens, ending[:-1]), *_without(before, ending))))
    return _without(before, ending[:-1]) if _matches(last, ending[-1]) else ()


def _matches(token: str, character: str) -> bool:
    if token == "?":
        return True
    if token.startswith("[") and len(token) > 2:
        inverted = token[1] == "!"
        body = token[2:-1] if inverted else token[1:-1]
        meant = re.fullmatch(f"[{'^' if inverted else ''}{_escaped(body)}]", character)
        return meant is not None
    return token == character


def _escaped(body: str) -> str:
    return body.replace("\\", r"\\").replace("^", r"\^").replace("[", r"\[").replace("]", r"\]")
