"""Globs for groups of layers: as few as possible, none of which means a layer of another group.

For a dialect in which later globs count more: what single blocks get comes after what all get.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

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
        found[setting].all_blocks = _cover(paths, others)
    for share, paths in single.items():
        # Of one block all paths may lie under one glob, or under as many as all blocks have.
        covered = _cover(paths, others)
        found[share.setting].single_blocks += [
            glob.replace(_BLOCK, str(number)) for number in share.blocks for glob in covered
        ]
    for one in found.values():
        wide = [glob.replace(_BLOCK, "*") for glob in one.all_blocks]
        one.all_blocks = [re.sub(r"(\.\*)+$", ".*", glob) for glob in wide]
    return list(found.values())


# Stands for the number of a block until it is known; no part of a path holds it.
_BLOCK = "#"


def _cover(paths: Collection[str], others: Sequence[str]) -> list[str]:
    """The globs that mean all of some paths and none of the others, the widest first."""
    wanted = {path.replace("*", _BLOCK) for path in paths}
    refused = [one for path in others if (one := path.replace("*", _BLOCK)) not in wanted]
    meant: dict[str, set[str]] = {}
    for path in sorted(wanted):
        for glob in _candidates(path):
            # The number may be a star in the end, which means any parts.
            wide = glob.replace(_BLOCK, "*")
            if glob not in meant and not any(fnmatch.fnmatchcase(one, wide) for one in refused):
                meant[glob] = {one for one in wanted if fnmatch.fnmatchcase(one, glob)}
    found = []
    while wanted:
        best = max(meant, key=lambda glob: (len(meant[glob] & wanted), -len(glob), glob))
        found.append(best)
        wanted -= meant[best]
    return found


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
