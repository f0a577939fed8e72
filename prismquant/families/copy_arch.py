"""Architecture files brought to another folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from prismquant.models.arch_files import BESIDE, PACKAGED, extended_file, read_toml

__all__ = ["copy_arch"]


def copy_arch(path: Path, folder: Path) -> tuple[str, ...]:
    """Put an architecture file, and those of its folder that it extends, beside a checkpoint.

    Returns:
        Names of the files there.

    Raises:
        ModelError: One cannot be read, or is not TOML.
    """
    name, source = BESIDE, path
    names: list[str] = []
    while source.parent != PACKAGED:
        shutil.copyfile(source, folder / name)
        names.append(name)
        parent = read_toml(source).get("extends")
        if parent is None:
            break
        source = extended_file(source, parent)
        name = source.name
    return tuple(names)
