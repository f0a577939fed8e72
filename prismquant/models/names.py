"""Tensor names on disk and module paths, both ways.

A checkpoint names its tensors as some release of some library did; the modules that run it have
paths of their own. transformers renames while it loads and saves. PrismQuant keeps the names of the
source checkpoint on disk, so every name is translated by one :class:`NameMap`, which is a bijection
on the names that occur: :meth:`NameMap.to_disk` checks that the way back leads to where it came
from.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prismquant.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from prismquant.models.arch import Layout

# The number of a block within a name, and the mark of pairs that have one.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_STAR = "*"


@dataclass(frozen=True)
class NameMap:
    """Translates dotted names between disk and modules.

    Attributes:
        layout: Name of the layout; ``mixed`` where a checkpoint has names of several.
        rewrites: ``(disk prefix, module prefix)`` of whole dotted parts, of which the longest that
            fits counts, ``*`` standing for one number; empty is the identity.
        others: More of them that are read, and never written.
        config_names_on_disk: Whether a quantization configuration calls layers as the disk does.
    """

    layout: str
    rewrites: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    config_names_on_disk: bool = False

    @functools.cached_property
    def _modules(self) -> dict[str, str]:
        return _with_star(dict((*self.others, *self.rewrites)))

    @functools.cached_property
    def _disk(self) -> dict[str, str]:
        return _with_star({module: disk for disk, module in self.rewrites})

    def to_disk(self, module_name: str) -> str:
        """The name on disk of a module path or of a tensor below it.

        Raises:
            ModelError: The layout has no place for the name.
        """
        disk = _rewrite(module_name, self._disk)
        if disk is None or self._maybe_module(disk) != module_name:
            raise ModelError(f"layout {self.layout!r} has no name on disk for {module_name!r}")
        return disk

    def in_config(self, module_path: str) -> str:
        """The name of a layer in a quantization configuration, by which readers look it up.

        Raises:
            ModelError: The layout has no place for the name.
        """
        if not self.config_names_on_disk:
            return module_path
        return self.to_disk(f"{module_path}.weight").removesuffix(".weight")

    def to_module(self, disk_name: str) -> str:
        """The module path of a name on disk.

        Raises:
            ModelError: The layout does not know the name.
        """
        module = self._maybe_module(disk_name)
        if module is None:
            raise ModelError(f"layout {self.layout!r} does not know the tensor {disk_name!r}")
        return module

    def lies_in(self, disk_name: str, module_path: str) -> bool:
        """Whether a tensor on disk lies in a module; another model's beside it lies in none."""
        module = self._maybe_module(disk_name)
        return module is not None and module.startswith(f"{module_path}.")

    def knows(self, disk_name: str) -> bool:
        """Whether a name on disk can be translated."""
        return self._maybe_module(disk_name) is not None

    def _maybe_module(self, disk_name: str) -> str | None:
        return _rewrite(disk_name, self._modules)


def any_layout(layouts: Sequence[Layout]) -> NameMap:
    """Reads names of all layouts, also side by side; it cannot write, as it may know two names.

    Args:
        layouts: Of one architecture; they never read one name as two different modules.
    """
    pairs = [pair for layout in layouts for pair in layout.rewrites]
    if not all(layout.rewrites for layout in layouts):
        pairs += [(module, module) for _, module in pairs]
    return NameMap("any", tuple(pairs))


def choose_layout(
    layouts: Sequence[Layout], disk_names: Iterable[str], module_paths: Collection[str]
) -> NameMap:
    """The layout under which most tensors on disk belong to an existing module.

    Where some tensors have names of another layout, as releases of transformers wrote for a while,
    the result knows them as well. Counting modules rather than tensors also recognizes a quantized
    checkpoint, whose tensors have other suffixes.

    Args:
        layouts: Candidates; the first wins a tie, and without any name.
        disk_names: Tensor names from the headers.
        module_paths: Paths of all modules.

    Raises:
        ModelError: Two tensors on disk are one tensor of the model.
    """
    maps = [
        NameMap(layout.name, layout.rewrites, config_names_on_disk=layout.config_names_on_disk)
        for layout in layouts
    ]
    disk_names = sorted(disk_names)

    def hits(names: NameMap) -> int:
        owners = (names._maybe_module(_owner(name)) for name in disk_names)
        return sum(owner in module_paths for owner in owners)

    main, reads = max(maps, key=hits), any_layout(layouts)
    meant: dict[str, str] = {}
    for name in disk_names:
        module = reads._maybe_module(name)
        # The tensors of a rotated input lie one level deeper.
        if module and (_owner(module) in module_paths or _owner(_owner(module)) in module_paths):
            meant[name] = module
    if all(main._maybe_module(disk) == module for disk, module in meant.items()):
        return main
    return _mixed(main, reads, meant)


def _mixed(main: NameMap, reads: NameMap, meant: Mapping[str, str]) -> NameMap:
    """A map of exactly these names on disk, and of their neighbours.

    Args:
        main: The layout of most.
        reads: Knows all names.
        meant: Name on disk -> name in the model.
    """
    first: dict[str, str] = {}
    for disk, module in meant.items():
        if first.setdefault(module, disk) != disk:
            raise ModelError(
                f"tensors {first[module]!r} and {disk!r} are one tensor of the model, {module!r}",
                remedy="delete the one that does not belong to this checkpoint",
            )
    prefixes = Counter(_pair(disk, reads.rewrites) for disk in meant)
    usual = {module: disk for (disk, module), _ in reversed(prefixes.most_common())}
    written = {name: usual.get(name) or main.to_disk(name) for _, name in reads.rewrites}
    # A module's name on disk is that of its weight, whose tensors have many suffixes.
    homes: dict[str, str] = {}
    for disk, module in sorted(meant.items(), key=lambda item: item[1].endswith(".bias")):
        homes.setdefault(_owner(module), _owner(disk))
    # Modules first, from the outside in; then tensors that are called otherwise than their module.
    for module, disk in (*sorted(homes.items()), *((m, d) for d, m in meant.items())):
        if _rewrite(module, written) != disk:
            written[module] = disk
    pairs = tuple((disk, module) for module, disk in written.items())
    return NameMap("mixed", pairs, reads.rewrites, main.config_names_on_disk)


def _pair(name: str, pairs: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """The rewrite that a name falls under."""
    fitting = [pair for pair in pairs if name == pair[0] or name.startswith(pair[0] + ".")]
    return max(fitting, key=lambda pair: len(pair[0]))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _rewrite(name: str, pairs: Mapping[str, str]) -> str | None:
    if not pairs:
        return name
    prefix, numbered = name, _STAR in pairs
    while prefix not in pairs:
        if numbered and (starred := _NUMBER.sub("*", prefix, count=1)) in pairs:
            number = _NUMBER.search(prefix)
            return pairs[starred].replace("*", number[0] if number else "") + name[len(prefix) :]
        prefix = _owner(prefix)
        if not prefix:
            return None
    return pairs[prefix] + name[len(prefix) :]


def _with_star(pairs: Mapping[str, str]) -> dict[str, str]:
    """The pairs, marked where a key stands for any number."""
    return {**pairs, _STAR: _STAR} if any("*" in key for key in pairs) else dict(pairs)
