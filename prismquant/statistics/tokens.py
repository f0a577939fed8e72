"""Tokens that a statistic has seen, counted by modality; padding never counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from prismquant.arguments import EXACT

if TYPE_CHECKING:
    from prismquant.distributed import Ranks


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens of each modality that were seen, or of rows in a vision tower.

    Attributes:
        text: Of text.
        image: Of images.
        video: Of videos.
    """

    __pydantic_config__ = EXACT

    text: int = 0
    image: int = 0
    video: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.text + other.text, self.image + other.image, self.video + other.video)

    @property
    def total(self) -> int:
        """Number of tokens of all modalities together."""
        return self.text + self.image + self.video

    @property
    def without_vision(self) -> Tokens:
        """The text tokens alone."""
        return Tokens(text=self.text)

    def describe(self) -> str:
        """E.g. ``120 text, 64 image and 0 video tokens``; of text only where there is any."""
        counts = [f"{n} {name}" for name, n in asdict(self).items() if n or name != "text"]
        return f"{', '.join(counts[:-1])} and {counts[-1]} tokens"


def summed(seen: Mapping[str, Tokens], ranks: Ranks) -> dict[str, Tokens]:
    """Tokens that all ranks have seen, by the same names."""
    total: dict[str, Tokens] = {}
    for part in ranks.gather_json({name: asdict(tokens) for name, tokens in seen.items()}):
        for name, counts in part.items():
            total[name] = total.get(name, Tokens()) + Tokens(**counts)
    return total
