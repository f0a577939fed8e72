"""Tensor names on disk and module paths, both ways.

A checkpoint names its tensors as some release of some library did; the modules that run it have
paths of their own. transformers renames while it loads and saves. PrismQuant keeps the names of the
source checkpoint on disk, so every name is translated by one :class:`NameMap`, which is a bijection
on the names that occur: :meth:`NameMap.to_disk` checks that the way back leads to where it came
from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prismquant.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from prismquant.models.arch import Layout


@dataclass(frozen=True)
class NameMap:
    """Translates dotted names between disk and modules.

    Attributes:
        layout: Name of the layout.
        rewrites: ``(disk prefix, module prefix)`` of whole dotted parts; empty is the identity.
    """

    layout: str
    rewrites: tuple[tuple[str, str], ...] = ()

    def to_disk(self, module_name: str) -> str:
        """The name on disk of a module path or of a tensor below it.

        Raises:
            ModelError: The layout has no place for the name.
        """
        disk = _rewrite(module_name, [(module, disk) for disk, module in self.rewrites])
        if disk is None or self._maybe_module(disk) != module_name:
            raise ModelError(f"layout {self.layout!r} has no name on disk for {module_name!r}")
        return disk

    def to_module(self, disk_name: str) -> str:
        """The module path of a name on disk.

        Raises:
            ModelError: The layout does not know the name.
        """
        module = self._maybe_module(disk_name)
        if module is None:
            raise ModelError(f"layout {self.layout!r} does not know the tensor {disk_name!r}")
        return module

    def knows(self, disk_name: str) -> bool:
        """Whether a name on disk can be translated."""
        return self._maybe_module(disk_name) is not None

    def _maybe_module(self, disk_name: str) -> str | None:
        return _rewrite(disk_name, self.rewrites)


def choose_layout(
    layouts: Sequence[Layout], disk_names: Iterable[str], module_paths: Collection[str]
) -> NameMap:
    """The layout under which most tensors on disk belong to an existing module.

    Counting modules rather than tensors also recognizes a quantized checkpoint, whose tensors have
    other suffixes.

    Args:
        layouts: Candidates; the first wins a tie, and without any name.
        disk_names: Tensor names from the headers.
        module_paths: Paths of all modules.
    """
    maps = [NameMap(layout.name, layout.rewrites) for layout in layouts]
    owners = [name.rpartition(".")[0] for name in disk_names]

    def hits(names: NameMap) -> int:
        return sum(names._maybe_module(owner) in module_paths for owner in owners)

    return max(maps, key=hits)


def _rewrite(name: str, pairs: Sequence[tuple[str, str]]) -> str | None:
    if not pairs:
        return name
    fitting = [pair for pair in pairs if name == pair[0] or name.startswith(pair[0] + ".")]
    if not fitting:
        return None
    old, new = max(fitting, key=lambda pair: len(pair[0]))
    return new + name[len(old) :]
