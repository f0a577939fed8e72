"""Layers as a configuration names them: module paths, ``re:`` patterns, names of classes."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from prismquant.errors import FormatError, PrismQuantError
from prismquant.patterns import Pattern, compile_pattern

LINEAR = "Linear"
# What real configurations have: some ten patterns.
MOST_PATTERNS = 2_000
# For all patterns of a configuration on all layers of a model; honest ones take milliseconds.
_MOST_SECONDS = 3.0
# What a target is, the most exact first.
NAME, PATTERN, CLASS = 1, 2, 3


class Matcher:
    """Compares names with targets: each pair once, all together in a limited time."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], bool] = {}
        self._spent = 0.0

    def matches(self, name: str, target: str) -> bool:
        """Whether a module path is the one named, or fits a ``re:`` pattern from its start.

        What is no regular expression fits nothing: that it is none, reading the section tells.

        Raises:
            FormatError: The patterns of the configuration take too long.
        """
        if not target.startswith("re:"):
            return name == target
        if (found := self._found.get((name, target))) is None:
            found = self._found[name, target] = self._tried(name, target[3:])
        return found

    def _tried(self, name: str, expression: str) -> bool:
        pattern = _compiled(expression)
        if pattern is None:
            return False
        begun = time.process_time()
        try:
            if self._spent > _MOST_SECONDS:
                raise PrismQuantError("all patterns together take too long")
            return pattern.match(name)
        except PrismQuantError as error:
            self._spent = math.inf
            raise FormatError(
                error.what,
                where="quantization_config",
                remedy="name layers by their paths, or by patterns without repeats inside repeats",
            ) from error
        finally:
            self._spent += time.process_time() - begun


def is_broken(expression: str) -> bool:
    """Whether a text is no regular expression, or one that is too large."""
    return _compiled(expression) is None


@functools.lru_cache(maxsize=MOST_PATTERNS)
def _compiled(expression: str) -> Pattern | None:
    try:
        return compile_pattern(expression)
    except ValueError:
        return None


@dataclass(frozen=True)
class Targets:
    """Layers as a configuration names them: module paths, ``re:`` patterns, names of classes."""

    entries: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """What is no pattern."""
        return frozenset(entry for entry in self.entries if not entry.startswith("re:"))

    @functools.cached_property
    def patterns(self) -> tuple[str, ...]:
        """What is one, with its ``re:``."""
        return tuple(entry for entry in self.entries if entry.startswith("re:"))

    def meets(self, name: str, matcher: Matcher) -> bool:
        """Whether a layer is meant by its name, rather than by its class."""
        return name in self.names or any(matcher.matches(name, p) for p in self.patterns)

    def hit(self, names: Collection[str], matcher: Matcher) -> int | None:
        """How exactly the linear layer of these names is meant; None: it is not."""
        if not self.names.isdisjoint(names):
            return NAME
        if any(matcher.matches(name, p) for p in self.patterns for name in names):
            return PATTERN
        return CLASS if LINEAR in self.names else None
