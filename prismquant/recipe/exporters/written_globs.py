"""Globs for groups of layers: as few as possible, none of which means a layer of another group.

For a dialect in which later globs count more: what single blocks get comes after what all get.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from prismquant.errors import RecipeError
from prismquant.recipe.exporters.written_names import PathShare, path_shares
from prismquant.recipe.exporters.written_scope import WrittenLayer

T = TypeVar("T", bound=Hashable)


@dataclass
class LayerGlobs(Generic[T]):
    """Globs of one group.

    Attributes:
        setting: What its layers get.
        all_blocks: Globs that mean layers whatever their block.
        single_blocks: Globs that mean layers of single blocks.
    """

    setting: T
    all_blocks: list[str] = field(default_factory=list)
    single_blocks: list[str] = field(default_factory=list)


def layer_globs_of(settings: Mapping[WrittenLayer, T]) -> list[LayerGlobs[T]]:
    """Globs of all layers of each setting.

    Args:
        settings: All layers that a glob could mean, each with what it gets.

    Returns:
        Settings in the order in which they come first.
    """
    shares = path_shares(settings)
    found = {one: LayerGlobs(one) for one in settings.values()}
    usual: dict[T, list[str]] = {}
    single: dict[PathShare[T], list[str]] = {}
    for path, own in shares.items():
        usual.setdefault(own[0].setting, []).append(path)
        for share in own[1:]:
            single.setdefault(share, []).append(path)
    others = list(shares)
    for setting, paths in usual.items():
        wide = [glob for glob, _ in _cover(paths, others)]
        found[setting].all_blocks = [re.sub(r"(\.\*)+$", ".*", glob) for glob in wide]
    for share, paths in single.items():
        # Of one block all paths may lie under one glob, or under as many as all blocks have.
        covered = _cover(paths, others)
        found[share.setting].single_blocks += [
            glob.replace(_BLOCK, str(number)) for number in share.blocks for _, glob in covered
        ]
    return list(found.values())


# Stands for the number of a block until it is known; no part of a path holds it.
_BLOCK = "#"
# Globs of any number. The second fits where what the first star means as well is refused: the end
# of a number is a digit, that of other parts (`layers.3.mlp` for `layers.*`) is none.
_NUMBERS = ("*", "*[0-9]")


def _cover(paths: Collection[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """The globs that mean all of some paths and none of the others, the widest first.

    Returns:
        Each for all blocks, and with the mark of a block.

    Raises:
        RecipeError: No glob means a path and none of the others.
    """
    # A second star is the number of an expert, which stays one.
    wanted = {path.replace("*", _BLOCK, 1) for path in paths}
    refused = [one for path in others if (one := path.replace("*", _BLOCK, 1)) not in wanted]
    meant: dict[tuple[str, str], set[str]] = {}
    for path in sorted(wanted):
        for glob in _candidates(path):
            if (wide := _wide(glob, refused)) is not None:
                own = {one for one in wanted if fnmatch.fnmatchcase(one, glob)}
                meant[wide, glob] = own
    if unmeant := sorted(wanted.difference(*meant.values())):
        raise RecipeError(
            "globs cannot tell layers apart that get different settings",
            where=unmeant[0].replace(_BLOCK, "*"),
            remedy="write the recipe for one model, or give all of these layers one setting",
        )
    found = []
    while wanted:
        best = max(meant, key=lambda pair: (len(meant[pair] & wanted), -len(pair[1]), pair[1]))
        found.append(best)
        wanted -= meant[best]
    return found


def _wide(glob: str, refused: Collection[str]) -> str | None:
    """A glob for all blocks, the number as wide as refused paths allow; None: it means one."""
    # The part of a quantizer comes after a layer's path: `*.q_proj.*` means that of `q_proj` too.
    known = [one.replace(_BLOCK, "0") + "." * glob.endswith("*") for one in refused]
    for number in _NUMBERS if _BLOCK in glob else _NUMBERS[:1]:
        wide = glob.replace(_BLOCK, number)
        if not any(fnmatch.fnmatchcase(one, wide) for one in known):
            return wide
    return None


def _candidates(path: str) -> Iterator[str]:
    """Globs of which each means a path: runs of its parts, from the list of blocks on."""
    parts = path.split(".")
    numbered = _BLOCK in parts
    for first in range(len(parts)):
        for last in range(first, len(parts)):
            run = parts[first : last + 1]
            if (numbered and _BLOCK not in run[1:]) or run[0] == _BLOCK:
                continue
            before, after = "" if first == 0 else "*.", "" if last == len(parts) - 1 else ".*"
            yield f"{before}{'.'.join(run)}{after}"
