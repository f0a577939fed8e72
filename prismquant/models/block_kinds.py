"""Kinds of block: what differs between the blocks of one tower.

A site may be in some blocks only: those that have a certain module. No layer is lost by a path that
is misspelt there: its matrix is then claimed by no site.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from prismquant.errors import grouped
from prismquant.models.arch import ArchSpec, Tower
from prismquant.models.bound import BoundStep

__all__ = ["absent_sites", "block_notes"]


def block_notes(arch: ArchSpec, steps: Sequence[BoundStep], paths: Container[str]) -> list[str]:
    """Sentences on towers whose blocks are not all alike: which blocks have what.

    Args:
        arch: Says what only some blocks have.
        steps: Of the model.
        paths: Of all its modules.
    """
    lines = []
    for tower in arch.towers:
        for module, blocks, owners in _owners(tower, steps, paths):
            if 0 < len(owners) < len(blocks):
                said = f"has {module}, as not every block of the {tower.modality} tower has"
                lines += [f"{block}: {said}" for block in owners]
    return grouped(lines)


def absent_sites(arch: ArchSpec, steps: Sequence[BoundStep], paths: Container[str]) -> list[str]:
    """Sentences on sites that no block has, such as dense layers of a model of experts alone.

    Args:
        arch: Says what only some blocks have.
        steps: Of the model.
        paths: Of all its modules.
    """
    lines = []
    for tower in arch.towers:
        for module, _, owners in _owners(tower, steps, paths):
            if not owners:
                roles = [site.role for site in tower.sites if site.in_blocks_with == module]
                lines.append(
                    f"no block of the {tower.modality} tower has {module}: "
                    f"{arch.name}.toml describes {', '.join(roles)} there"
                )
    return lines


def _owners(
    tower: Tower, steps: Sequence[BoundStep], paths: Container[str]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Modules that only some blocks of a tower may have, all blocks, and those that have them."""
    blocks = [step.name for step in steps if step.name.startswith(f"{tower.blocks}.")]
    for module in dict.fromkeys(site.in_blocks_with for site in tower.sites):
        if module is not None:
            yield module, blocks, [block for block in blocks if f"{block}.{module}" in paths]
