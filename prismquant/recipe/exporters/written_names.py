"""Names for groups of layers: the shortest endings of module paths that mean no other layer.

Layers that get the same are one group. What a dialect makes of a group's endings, expressions or
globs, is its own affair.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from prismquant.recipe.exporters.written_scope import WrittenLayer

T = TypeVar("T", bound=Hashable)

# A single word, such as `proj`, says too little to whoever reads it.
_FEWEST_PARTS = 2


@dataclass(frozen=True)
class NameEnding:
    """The end of module paths, and the blocks that are meant.

    Attributes:
        parts: Dotted parts; ``*`` stands for the number of a block.
        whole: Whether it is a whole path.
        blocks: The only blocks that are meant; empty: all.
        apart: Blocks that are not meant, where all others are.
    """

    parts: tuple[str, ...]
    whole: bool
    blocks: tuple[int, ...] = ()
    apart: tuple[int, ...] = ()


@dataclass(frozen=True)
class PathShare(Generic[T]):
    """Layers of one path that get the same.

    Attributes:
        setting: What they get.
        blocks: The only blocks that are meant; empty: all.
        apart: Blocks that are not meant, where all others are.
    """

    setting: T
    blocks: tuple[int, ...] = ()
    apart: tuple[int, ...] = ()


def endings(settings: Mapping[WrittenLayer, T]) -> dict[T, list[NameEnding]]:
    """Endings of all layers of each setting, none of which means a layer of another.

    Args:
        settings: All layers that an ending could mean, each with what it gets.

    Returns:
        Settings in the order in which they come first.
    """
    shares = path_shares(settings)
    found: dict[T, dict[NameEnding, None]] = {one: {} for one in settings.values()}
    tails = {path: path.split(".") for path in shares}
    for path, own in shares.items():
        for share in own:
            parts = tails[path]
            size = _fewest(parts, share)
            while size < len(parts) and any(
                share not in shares[other]
                for other, tail in tails.items()
                if tail[-size:] == parts[-size:]
            ):
                size += 1
            size += parts[-size] == "*"
            ending = NameEnding(tuple(parts[-size:]), size == len(parts), share.blocks, share.apart)
            found[share.setting][ending] = None
    return {setting: list(own) for setting, own in found.items()}


def path_shares(settings: Mapping[WrittenLayer, T]) -> dict[str, list[PathShare[T]]]:
    """Settings of each path: first what most of its blocks get, then what single blocks get."""
    by_path: dict[str, dict[int | None, T]] = {}
    for layer, setting in settings.items():
        by_path.setdefault(layer.path, {})[layer.block] = setting
    found = {}
    for path, blocks in by_path.items():
        counts = Counter(blocks.values())
        # Of two that are as frequent, not the one that leaves layers alone.
        usual = max(counts, key=lambda one: (counts[one], bool(one)))
        own: dict[T, list[int]] = {}
        for block, setting in blocks.items():
            if setting != usual and block is not None:
                own.setdefault(setting, []).append(block)
        apart = tuple(sorted(block for some in own.values() for block in some))
        found[path] = [PathShare(usual, apart=apart)]
        found[path] += [PathShare(one, tuple(sorted(some))) for one, some in own.items()]
    return found


def _fewest(parts: Sequence[str], share: PathShare[T]) -> int:
    """Number of parts that an ending needs at least."""
    numbered = len(parts) - parts.index("*") if "*" in parts else 0
    needed = numbered if share.blocks or share.apart else 0
    fewest = max(needed, _FEWEST_PARTS)
    # The list of blocks beside its number, so that no number stands first.
    return min(len(parts), fewest + (fewest == numbered))


def expressions(found: Iterable[NameEnding]) -> list[str]:
    """Regular expressions of whole paths that mean what endings mean, alike ones joined."""
    heads: dict[tuple[str, ...], list[str]] = {}
    for ending in found:
        parts = [_part(part, ending) for part in ending.parts]
        # Of a whole path too: other releases have a prefix before it.
        heads.setdefault(tuple(parts[:-1]), []).append(parts[-1])
    return [
        r"(?:.*\.)?" + r"\.".join([*head, last[0] if len(last) == 1 else f"(?:{'|'.join(last)})"])
        for head, last in heads.items()
    ]


def _part(part: str, ending: NameEnding) -> str:
    if part != "*":
        return re.escape(part)
    if ending.blocks:
        return _numbers(ending.blocks)
    if ending.apart:
        return rf"(?!{_numbers(ending.apart)}\.)\d+"
    return r"\d+"


def _numbers(blocks: Sequence[int]) -> str:
    """An expression for any of some numbers."""
    numbers = "|".join(map(str, blocks))
    return numbers if len(blocks) == 1 else f"(?:{numbers})"
