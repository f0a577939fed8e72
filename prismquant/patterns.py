"""Regular expressions of strangers: they match as usual, but can't run away.

Recipes and checkpoints name layers by regular expressions. Python's own engine may take hours for a
line such as ``([a-z.]+)+!``; here a match has a time limit, and an expression a bound on its size.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import regex

from prismquant.errors import PrismQuantError, shortened

# Honest patterns take microseconds.
_SECONDS = 0.25
_MAX_LENGTH = 4000
# The engine writes counted repeats out, one inside the other.
_MAX_REPEATS = 10_000
_COUNTED = re.compile(r"\{(\d*),?(\d*)\}")


@dataclass(frozen=True)
class Pattern:
    """A regular expression whose matches have a time limit.

    Attributes:
        expression: As it was written.
    """

    expression: str

    def match(self, text: str) -> bool:
        """True if the expression matches at the beginning of ``text``.

        Raises:
            PrismQuantError: It takes too long.
        """
        return self._tried(_compiled(self.expression).match, text)

    def fullmatch(self, text: str) -> bool:
        """True if the expression matches the whole of ``text``.

        Raises:
            PrismQuantError: It takes too long.
        """
        return self._tried(_compiled(self.expression).fullmatch, text)

    def _tried(self, attempt: Any, text: str) -> bool:
        try:
            return attempt(text, timeout=_SECONDS) is not None
        except TimeoutError as error:
            raise PrismQuantError(
                f"the regular expression {shortened(self.expression)} takes too long on {text!r}",
                remedy="write it without repeats inside repeats, such as (..+)+",
            ) from error


def compile_pattern(expression: str) -> Pattern:
    """A regular expression, in the grammar of Python's ``re``.

    Raises:
        ValueError: It is none, or is too large.
    """
    if len(expression) > _MAX_LENGTH:
        raise ValueError(f"a regular expression of {len(expression)} characters is too long")
    counts = [
        max(1, *(int(number or 1) for number in pair)) for pair in _COUNTED.findall(expression)
    ]
    if math.prod(counts) > _MAX_REPEATS:
        raise ValueError(f"{shortened(expression)} repeats too often")
    try:
        re.compile(expression)
        _compiled(expression)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(
            f"{shortened(expression)} is not a regular expression: {reason}"
        ) from error
    return Pattern(expression)


@functools.lru_cache(maxsize=1024)
def _compiled(expression: str) -> Any:
    return regex.compile(expression)
