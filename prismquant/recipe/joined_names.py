r"""Many names of modules as few regular expressions, and these taken apart again.

A name of a module, and all below it, is ``(?:.*\.)?name(?:\..*)?`` wherever it stands. Of such
expressions a recipe has a bounded number, so the names of a long list are joined, what all of them
begin with written once. What a plan tells of an expression it tells of each of its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

START = r"re:(?:.*\.)?"
"""Beginning of the pattern of every name."""
BELOW = r"(?:\..*)?"
"""End of the pattern of a name that is no glob."""
LAYERS = r"model\.(?:language_model\.)?layers"
"""Beginning of a name ``model.layers``, which newer releases of transformers have otherwise."""
LONGEST = 3500
"""Most characters of the names in one expression."""
_DOT = r"\."
_RELEASES = ("model.layers", "model.language_model.layers")
_ESCAPED = re.compile(r"\\(.)")
_TOKEN = re.compile(r"\\?.", re.DOTALL)
_GLOB = "*"


@dataclass(frozen=True)
class JoinedNames:
    """Names that one expression means.

    Attributes:
        names: As they were before they were joined.
        below: Whether all that is below them is meant, too.
        layers: Whether they begin with :data:`LAYERS`.
    """

    names: tuple[str, ...]
    below: bool
    layers: bool = False

    def idle(self, paths: Iterable[str]) -> list[str]:
        """Names that mean none of these module paths."""
        meant: set[str] = set()
        for path in paths:
            parts = path.split(".")
            ends = range(1, len(parts) + 1) if self.below else [len(parts)]
            meant |= {".".join(parts[start:end]) for end in ends for start in range(end)}
        return [name for name in self.names if meant.isdisjoint(self._paths(name))]

    def _paths(self, name: str) -> list[str]:
        if not self.layers:
            return [name]
        return [f"{layers}{name.removeprefix(_RELEASES[0])}" for layers in _RELEASES]


def join_names(patterns: Sequence[str]) -> list[str]:
    """Patterns that mean the same as many patterns of names do.

    Args:
        patterns: Each :data:`START` and a name, escaped or a glob's, with or without
            :data:`BELOW`; others stay as they are.
    """
    found = [one for one in patterns if not one.startswith(START)]
    named = sorted({one for one in patterns if one.startswith(START)})
    groups: dict[tuple[str, str], list[str]] = {}
    for pattern in named:
        body = pattern.removeprefix(START)
        end = BELOW if body.endswith(BELOW) else ""
        body = body.removesuffix(BELOW)
        rest = body.removeprefix(LAYERS)
        head = _GLOB if not _plain(rest) else "" if rest == body else LAYERS
        groups.setdefault((head, end), []).append(body if head == _GLOB else rest)
    return found + [
        f"{START}{_alternatives(part, head)}{end}"
        for (head, end), bodies in groups.items()
        for part in _runs(bodies)
    ]


def joined_names(pattern: str) -> JoinedNames | None:
    """The names of an expression as :func:`join_names` makes them; None: it is another."""
    if not pattern.startswith(START):
        return None
    body = pattern.removeprefix(START).removesuffix(BELOW)
    layers = body.startswith(LAYERS)
    shared, opened, ends = body.removeprefix(LAYERS).partition("(?:")
    parts = _split(ends.removesuffix(")"))
    if not opened or not ends.endswith(")") or not all(map(_plain, (shared, *parts))):
        return None
    front = _RELEASES[0] if layers else ""
    names = tuple(front + _ESCAPED.sub(r"\1", shared + part) for part in parts)
    return JoinedNames(names, pattern.endswith(BELOW), layers)


def _plain(text: str) -> bool:
    """Whether an expression means one text alone."""
    return re.escape(_ESCAPED.sub(r"\1", text)) == text


def _split(text: str) -> list[str]:
    """The alternatives of an expression, at each bar that is not escaped."""
    parts = [""]
    for token in _TOKEN.findall(text):
        if token == "|":
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _runs(names: Sequence[str]) -> Iterator[list[str]]:
    """The names in runs that fit an expression each."""
    held: list[str] = []
    length = 0
    for name in names:
        if held and length + len(name) > LONGEST:
            yield held
            held, length = [], 0
        held.append(name)
        length += len(name) + 1
    if held:
        yield held


def _alternatives(names: Sequence[str], head: str) -> str:
    """An expression for any of the names, what all of them begin with written once."""
    if head == _GLOB:
        return f"(?:{'|'.join(names)})"
    split = [name.split(_DOT) for name in names]
    alike = [len(set(column)) == 1 for column in zip(*(one[:-1] for one in split), strict=False)]
    shared = (*alike, False).index(False)
    ends = "|".join(_DOT.join(parts[shared:]) for parts in split)
    return head + "".join(f"{part}{_DOT}" for part in split[0][:shared]) + f"(?:{ends})"
