"""Modalities that calibration will not show to what is chosen from it, told before any long work.

A language model of a vision-language model is served tokens of text, of images and of videos. What
calibration has chosen for it from text alone may be far off for the others, and nothing in the
numbers tells.
"""

from __future__ import annotations

from collections.abc import Sequence

from prismquant.data import Sample, media_of
from prismquant.models.arch import Modality
from prismquant.plan.plan import Plan


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
            row.config.static_input or row.config.static_output for row in rows
        ),
        "the Hessians of {} layers": sum(row.config.can_fail for row in rows),
        "the codes of {} tuned layers": sum(row.config.tuner is not None for row in rows),
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
