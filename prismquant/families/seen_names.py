"""Names on disk of a small model, as transformers writes them, and rules that explain them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from prismquant.models.arch import Layout
from prismquant.models.names import NameMap
from prismquant.shards import ShardReader

__all__ = ["seen_layouts"]


def seen_layouts(
    model: nn.Module, head: str, folder: Path
) -> tuple[tuple[Layout, ...], tuple[str, ...]]:
    """Layouts that explain the names of a written model, and tensors that none explains.

    transformers renames by its conversion table when it writes, back to the names of released
    checkpoints. Tensors are recognized by their numbers.

    Args:
        model: Whose tensors were written.
        head: Path of its head, which is not written where it is tied.
        folder: Where they were.

    Returns:
        The layout on disk, if it has other names than the modules, and that of module paths; and
        names on disk of tensors that were cut or joined.
    """
    native = Layout("native")
    reader = ShardReader(folder)
    known = {_numbers(tensor): name for name, tensor in model.state_dict().items()}
    pairs: dict[str, str] = {}
    unknown: list[str] = []
    own = model.state_dict().keys()
    for disk in sorted(reader.names):
        module = disk if disk in own else known.get(_numbers(reader.read(disk)))
        if module is None:
            unknown.append(disk)
        else:
            pairs[disk] = module
    if all(disk == module for disk, module in pairs.items()):
        return (native,), tuple(unknown)
    rewrites = _rewrites(pairs)
    if head not in rewrites.values():
        rewrites = {**rewrites, head: head}
    names = NameMap("released", tuple(rewrites.items()))
    wrong = [d for d, m in pairs.items() if not names.knows(d) or names.to_module(d) != m]
    if wrong or len({*rewrites.values()}) != len(rewrites):
        return (native,), (*unknown, *wrong)
    return (Layout("released", tuple(rewrites.items())), native), tuple(unknown)


def _rewrites(pairs: Mapping[str, str]) -> dict[str, str]:
    """The shortest prefixes, of whole dotted parts, that turn names on disk into module paths."""
    found: dict[str, str] = {}
    for disk, module in pairs.items():
        on_disk, in_model = disk.split("."), module.split(".")
        while len(on_disk) > 1 and len(in_model) > 1 and on_disk[-1] == in_model[-1]:
            on_disk.pop()
            in_model.pop()
        found[".".join(on_disk)] = ".".join(in_model)
    return found


def _numbers(tensor: Tensor) -> tuple[tuple[int, ...], float, float]:
    """Shape and sums, by which tensors with random numbers are told apart."""
    return tuple(tensor.shape), float(tensor.double().sum()), float(tensor.double().abs().sum())
