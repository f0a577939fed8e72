"""Every error that PrismQuant raises on purpose.

    PrismQuantError
    ├── ArgumentError   an argument of a function, or an option, is no such value
    ├── RecipeError     what the user asked for is malformed or impossible
    ├── PlanError       the recipe does not fit this model
    │   └── BudgetError the memory that it may take is too little
    ├── ModelError      the checkpoint is not what an architecture describes
    ├── DataError       calibration or evaluation data cannot be used
    ├── FormatError     a number format or a bit layout cannot hold this
    ├── NumericsError   a value that must be finite is not, or a factorization failed
    ├── StorageError    files are missing, broken, or cannot be written
    └── OutOfMemory     memory ran out

Each carries what is wrong, where, and what to do about it; the command line prints the three lines
and exits with status 1, after an ArgumentError with 2.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

# No finding that a person reads is longer.
_LINE = 1000
# A number that is one part of a dotted path, e.g. the 7 of ``layers.7.mlp``; not that of 0.7.
_INDEX = re.compile(r"(?<=[A-Za-z_]\.)\d+(?![\w])")


class PrismQuantError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: One sentence that names the problem and the offending value.
        where: The file, line, layer or key that it concerns.
        remedy: What the user can do about it.
        findings: All that was found, a line each, where ``what`` shows no more than fits a screen.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        remedy: str | None = None,
        findings: Iterable[str] = (),
    ) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        self.findings = tuple(findings)
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)


class ArgumentError(PrismQuantError):
    """An argument of a function, or an option of the command line, is no such value."""


class RecipeError(PrismQuantError):
    """Something that the user asked for is malformed or impossible."""


class PlanError(PrismQuantError):
    """The recipe does not fit this model."""


class BudgetError(PlanError):
    """A memory budget is too small.

    Args:
        what: As in other errors.
        needed: Bytes that would be enough; 0: not known.
        where: As in other errors.
        remedy: As in other errors.
    """

    def __init__(
        self, what: str, *, needed: int = 0, where: str | None = None, remedy: str | None = None
    ) -> None:
        self.needed = needed
        super().__init__(what, where=where, remedy=remedy)


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


class OutOfMemory(PrismQuantError):  # noqa: N818 - what it says is all there is to say
    """Memory ran out, of the process or of a device."""


def brief(error: BaseException) -> str:
    """Text of an error of another library, on one line."""
    said = textwrap.shorten(str(error), 300, placeholder=" ..")
    # That of a KeyError is the key alone.
    return f"{type(error).__name__} {said}" if not said or isinstance(error, KeyError) else said


def suggest(name: str, options: Iterable[str]) -> str:
    """Say which known name was probably meant, and list them all.

    Args:
        name: The unknown name.
        options: The known names.

    Returns:
        A phrase for an error's remedy, e.g. ``"did you mean 'w4a16'? known: w4a16, w8a8"``.
    """
    known = sorted(map(str, options))
    hint = nearest(name, known)
    return f"{hint}{' ' * bool(hint)}known: {', '.join(known)}"


def nearest(name: str, known: Sequence[str]) -> str:
    """Words on the known name that was probably meant; empty where none is near."""
    # Capitals are a slip, too.
    by_lower = {word.lower(): word for word in reversed(known)}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"did you mean {by_lower[near[0]]!r}?" if near else ""


def listed(findings: Sequence[str], most: int = 20) -> str:
    """Findings as the lines of an error's text, with how many more there are than are shown."""
    shown = [line if len(line) <= _LINE else f"{line[:_LINE]}.." for line in findings[:most]]
    left = [f"and {len(findings) - most} more"] if len(findings) > most else []
    return "".join(f"\n  - {line}" for line in [*shown, *left])


def check_bounds(options: object, bounds: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse options of a method that are out of bounds.

    Args:
        options: The method.
        bounds: For each option whether its value is fine, and what would be.

    Raises:
        RecipeError: One is not.
    """
    for option, (fine, legal) in bounds.items():
        if not fine:
            raise RecipeError(
                f"{option} cannot be {getattr(options, option)!r}", where=option, remedy=legal
            )


def grouped(findings: Iterable[str]) -> list[str]:
    """Fold findings that say the same of many layers into one line each, with the count.

    Args:
        findings: Lines in which layers are named by dotted paths, e.g. ``layers.3.mlp: too wide``.

    Returns:
        Lines in order of first appearance, e.g. ``layers.*.mlp: too wide (3 layers: 0-1, 3)``. What
        is said of one layer alone stays as it is.
    """
    groups: dict[str, dict[str, None]] = {}
    for finding in findings:
        groups.setdefault(_INDEX.sub("*", finding), {})[finding] = None
    return [
        next(iter(members)) if len(members) == 1 else f"{pattern} ({_which(members)})"
        for pattern, members in groups.items()
    ]


def _which(members: Iterable[str]) -> str:
    """The layers that a folded line is about: how many, and which where one number tells."""
    found = [[int(number) for number in _INDEX.findall(member)] for member in members]
    if any(len(set(numbers)) != 1 for numbers in found):
        return f"{len(found)} of them"
    ranges: list[list[int]] = []
    for index, *_ in sorted(found):
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    shown = [f"{first}-{last}" if first != last else f"{first}" for first, last in ranges[:6]]
    return f"{len(found)} layers: {', '.join(shown)}{', ..' if len(ranges) > 6 else ''}"


def shortened(text: str) -> str:
    """A text as an error shows it, in quotes."""
    return repr(text if len(text) <= 80 else text[:78] + "..")
