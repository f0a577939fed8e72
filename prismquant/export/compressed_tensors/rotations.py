"""Rotations of inputs at run time, as the transforms of a configuration declare them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from prismquant.errors import FormatError
from prismquant.export.compressed_tensors.section import ROTATED_AT, DeclaredTransform, Section

_NO_ALIASES: Mapping[str, Collection[str]] = MappingProxyType({})


def read_rotations(
    section: Section,
    linears: Mapping[str, int],
    aliases: Mapping[str, Collection[str]] = _NO_ALIASES,
) -> dict[str, int]:
    """Widths of the blocks in which linear layers of a model rotate their input.

    Transforms of weights were applied before these were stored, and need nothing of a reader.

    Args:
        section: The checkpoint's configuration.
        linears: Input features of the model's linear layers, by what the configuration calls them.
        aliases: Other names that a layer goes by.

    Raises:
        FormatError: A transform is one that PrismQuant does not have.
    """
    section.require()
    found: dict[str, int] = {}
    for transform in section.transforms:
        known = transform.type == "hadamard" and not transform.randomize
        for apply in transform.applies:
            if apply.location.startswith("weight_") or (known and apply.location in ROTATED_AT):
                continue  # done, or of queries and keys: the key-value cache's affair
            if not known or apply.location != "input":
                raise _unread_transform(transform, apply.location)
            for linear, width in linears.items():
                names = (linear, *aliases.get(linear, ()))
                hit = apply.targets.hit(names, section.matcher)
                if hit and not apply.ignore.hit(names, section.matcher):
                    block = transform.head_dim or width
                    # Across a whole width the library takes other matrices than we have.
                    fits = width % block == 0 and block & (block - 1) == 0
                    if not fits:
                        raise _unread_transform(transform, apply.location)
                    found[linear] = block
    return found


def _unread_transform(transform: DeclaredTransform, where: str) -> FormatError:
    return FormatError(
        f"transform {transform.name!r} ({transform.type} at {where}) cannot be read",
        remedy="only hadamard transforms of inputs are supported, in blocks or across a width that "
        "is a power of two",
    )
