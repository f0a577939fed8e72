"""Which modalities calibration has shown to the statistics, and which ones it has not.

A language model of a vision-language model is served tokens of text, of images and of videos. What
calibration has chosen for it from text alone may be far off for the others, and nothing in the
numbers tells: so tokens are counted by their modality, padding never, and what will see no picture
and no clip at all is told before any long work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from prismquant.distributed import Ranks
from prismquant.models.arch import Modality
from prismquant.pipeline.data import Sample, media_of
from prismquant.pipeline.identity import EXACT
from prismquant.pipeline.plan import Plan


@dataclass(frozen=True)
class Tokens:
    """How many tokens of each modality something has seen, or rows in a vision tower.

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
    def without_vision(self) -> Tokens:
        """Those of text alone."""
        return Tokens(text=self.text)

    def describe(self) -> str:
        """E.g. ``120 text, 64 image and 0 video tokens``; of text only where there is any."""
        counts = [f"{n} {name}" for name, n in asdict(self).items() if n or name != "text"]
        return f"{', '.join(counts[:-1])} and {counts[-1]} tokens"


def summed(seen: Mapping[str, Tokens], ranks: Ranks) -> dict[str, Tokens]:
    """What all ranks have seen, by the same names."""
    total: dict[str, Tokens] = {}
    for part in ranks.gather_json({name: asdict(tokens) for name, tokens in seen.items()}):
        for name, counts in part.items():
            total[name] = total.get(name, Tokens()) + Tokens(**counts)
    return total


def unseen_vision(plan: Plan, samples: Sequence[Sample]) -> tuple[str, ...]:
    """A line on what will be chosen for vision tokens without one having been seen.

    Args:
        plan: What is to be calibrated.
        samples: What it is calibrated with.

    Returns:
        One line, or none where a picture or a clip is shown, or nothing depends on it. Layers of
        the vision tower are not its subject: without any picture they cannot be calibrated at all.
    """
    if not samples or any(True for sample in samples for _ in media_of(sample)):
        return ()
    rows = [row for row in plan.quantized if row.site.modality is Modality.LLM]
    readers = {row.site.name for row in rows}
    counts = {
        "the static ranges of {} layers": sum(
            row.static_input or row.static_output for row in rows
        ),
        "the Hessians of {} layers": sum(row.can_fail for row in rows),
        "the codes of {} tuned layers": sum(row.tuner is not None for row in rows),
        "the scales of {} edges": sum(
            bool(readers.intersection(edge.edge.consumers)) for edge in plan.edges
        ),
    }
    parts = [words.format(count) for words, count in counts.items() if count]
    if plan.kv_cache is not None:
        parts.append("the scales of the key-value cache")
    if not parts:
        return ()
    return (
        "no calibration sample shows a picture or a clip: chosen without any vision token, and "
        f"perhaps wrong for them, are {', '.join(parts)} of the language model",
    )
