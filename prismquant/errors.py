"""Every error that PrismQuant raises on purpose.

    PrismQuantError
    ├── RecipeError     what the user asked for is malformed or impossible
    ├── PlanError       the recipe does not fit this model
    ├── ModelError      the checkpoint is not what an architecture describes
    ├── DataError       calibration or evaluation data cannot be used
    ├── FormatError     a number format or a bit layout cannot hold this
    ├── NumericsError   a value that must be finite is not, or a factorization failed
    └── StorageError    files are missing, broken, or cannot be written

Each carries what is wrong, where, and what to do about it; the command line prints the three lines
and exits with status 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PrismQuantError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: One sentence that names the problem and the offending value.
        where: The file, line, layer or key that it concerns.
        remedy: What the user can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)


class RecipeError(PrismQuantError):
    """What the user asked for is malformed or impossible."""


class PlanError(PrismQuantError):
    """The recipe does not fit this model."""


class ModelError(PrismQuantError):
    """The checkpoint is not what an architecture describes."""


class DataError(PrismQuantError):
    """Calibration or evaluation data cannot be used."""


class FormatError(PrismQuantError):
    """A number format or a bit layout cannot hold this."""


class NumericsError(PrismQuantError):
    """A value that must be finite is not, or a factorization failed."""


class StorageError(PrismQuantError):
    """Files are missing, broken, or cannot be written."""


def suggest(name: str, options: Iterable[str]) -> str:
    """Say which known name was probably meant, and list them all.

    Args:
        name: The unknown name.
        options: The known names.

    Returns:
        A phrase for an error's remedy, e.g. ``"did you mean 'w4a16'? known: w4a16, w8a8"``.
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"
