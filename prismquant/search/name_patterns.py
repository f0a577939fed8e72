"""Patterns of a recipe for sets of layers: numbers of blocks folded into one expression."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

# A number that is one part of a dotted path.
_PART = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")

_Numbers = tuple[str, ...]


def name_patterns(names: Iterable[str]) -> list[str]:
    """Entries of a rule's ``name`` that mean these layers and no others.

    Names that differ in the numbers of blocks or experts become one regular expression, such as
    ``re:model\\.layers\\.(0|3|17)\\.mlp\\.down_proj``.

    Args:
        names: Module paths.
    """
    stems: dict[str, list[_Numbers]] = {}
    for name in dict.fromkeys(names):
        stems.setdefault(_PART.sub("\0", name), []).append(tuple(_PART.findall(name)))
    return [
        _entry(stem.split("\0"), columns)
        for stem, numbers in stems.items()
        for columns in _products(numbers)
    ]


def _products(found: list[_Numbers]) -> Iterator[list[_Numbers]]:
    """The tuples of numbers as few products: for each place the numbers that stand there."""
    columns = [tuple(dict.fromkeys(column)) for column in zip(*found, strict=True)]
    if len(set(found)) == len(list(itertools.product(*columns))):
        yield columns
        return
    # Those with the same rest share their first number.
    rests: dict[str, list[_Numbers]] = {}
    for first, *rest in found:
        rests.setdefault(first, []).append(tuple(rest))
    alike: dict[frozenset[_Numbers], list[str]] = {}
    for first, own in rests.items():
        alike.setdefault(frozenset(own), []).append(first)
    for firsts in alike.values():
        for columns in _products(rests[firsts[0]]):
            yield [tuple(firsts), *columns]


def _entry(parts: list[str], columns: list[_Numbers]) -> str:
    """One entry: the parts of a path with numbers between them."""
    if all(len(column) == 1 for column in columns):
        # Brackets, stars and question marks would be a glob's.
        plain = "".join(_joined(parts, [column[0] for column in columns]))
        return plain if re.fullmatch(r"[\w.-]*", plain) else f"re:{re.escape(plain)}"
    choices = [column[0] if len(column) == 1 else f"({'|'.join(column)})" for column in columns]
    return "re:" + "".join(_joined([re.escape(part) for part in parts], choices))


def _joined(parts: list[str], between: list[str]) -> Iterator[str]:
    for part, number in itertools.zip_longest(parts, between, fillvalue=""):
        yield part
        yield number
