"""Claims of an architecture file about a family, and what became of each when it was tried."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FamilyCheck", "FamilyClaim"]


@dataclass(frozen=True)
class FamilyClaim:
    """One claim of an architecture file.

    Attributes:
        what: The claim, in a few words; block numbers stand as ``*``.
        holds: Whether it does; None: it could not be tried, and nothing is known.
        said: The figure that decided, or why it could not be tried.
    """

    what: str
    holds: bool | None
    said: str


@dataclass(frozen=True)
class FamilyCheck:
    """All claims of an architecture file, tried on a small model of the family.

    Attributes:
        arch: Name of the file, without suffix.
        title: Name of the family, for people.
        blocks: Blocks of each tower that the small model has.
        claims: In the order in which they were tried.
        notes: What was passed over.
    """

    arch: str
    title: str
    blocks: dict[str, int]
    claims: tuple[FamilyClaim, ...]
    notes: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether no claim is wrong. A claim that could not be tried is not wrong."""
        return all(claim.holds is not False for claim in self.claims)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"sound": self.sound}
