"""Misfits between a checkpoint, its model and an architecture file, as one error."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from prismquant.errors import ModelError, grouped
from prismquant.models.arch import ArchSpec

# An error must fit a screen; the count of the rest is printed.
_MOST_LINES = 30
_USUAL_REMEDY = "use an unmodified, complete checkpoint of this architecture"


class Misfits:
    """Lines that say what does not fit, each with its remedy; equal lines count once."""

    def __init__(self) -> None:
        self._remedies: dict[str, str] = {}

    def add(self, line: str, remedy: str = _USUAL_REMEDY) -> None:
        """Say what does not fit, beginning with the path of what it is about and a colon."""
        self._remedies.setdefault(line, remedy)

    def add_all(self, lines: Iterable[str]) -> None:
        """Say several things whose remedy is another checkpoint."""
        for line in lines:
            self.add(line)

    def about(self, path: str) -> bool:
        """Whether a line is about a path."""
        return any(line.startswith(f"{path}:") for line in self._remedies)

    def __bool__(self) -> bool:
        return bool(self._remedies)

    def error(self, arch: ArchSpec, folder: Path, first: Iterable[str] = ()) -> ModelError:
        """The error that lists them all.

        Args:
            arch: The architecture that was to fit.
            folder: The checkpoint.
            first: Lines that may say why the others do not fit.
        """
        lines = [*first, *self._remedies]
        count = "1 finding" if len(lines) == 1 else f"{len(lines)} findings"
        folded = grouped(lines)
        shown = [f"  - {line}" for line in folded[:_MOST_LINES]]
        if len(folded) > _MOST_LINES:
            shown.append(f"  - and {len(folded) - _MOST_LINES} more")
        return ModelError(
            "\n".join([f"the checkpoint does not fit {arch.title}: {count}", *shown]),
            where=str(folder),
            remedy="; ".join(dict.fromkeys(self._remedies.values())),
            findings=folded,
        )


def kind_of(module: nn.Module | None) -> str:
    """Name of a module's class, or 'nothing'."""
    return "nothing" if module is None else type(module).__name__
