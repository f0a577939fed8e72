"""Notes on what an analysis is given: classes of tokens that samples lack, options without use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prismquant.data import Sample
from prismquant.data.windows import window_remarks
from prismquant.models.bound import BoundModel
from prismquant.models.dry_forward import bounds_logits
from prismquant.models.load import empty_model
from prismquant.search.analysis_request import AnalysisRequest
from prismquant.search.sensitivity import TOKEN_CLASSES, TokenClass


def analysis_notes(
    bound: BoundModel,
    samples: Sequence[Sample],
    tokens: Mapping[TokenClass, int],
    asked: AnalysisRequest,
) -> tuple[str, ...]:
    """All notes on what an analysis is given.

    Args:
        bound: The model.
        samples: What is looked at.
        tokens: Count of each class of tokens in them.
        asked: The request.
    """
    return (
        *window_remarks(samples),
        *missing_classes(tokens, asked, sees=bound.arch.sees),
        *idle_options(asked, samples),
        *(bounded_outputs(bound) if samples else ()),
    )


def missing_classes(
    tokens: Mapping[TokenClass, int], asked: AnalysisRequest, *, sees: bool
) -> list[str]:
    """Lines on classes of tokens that the samples lack.

    Args:
        tokens: Count of each class.
        asked: The request.
        sees: Whether the model is shown pictures and clips.
    """
    if asked.calibration is None or not tokens:
        return []
    what = {"answer": "an answer", "text": "other text"}
    what |= {"image": "a picture", "video": "a clip"} if sees else {}
    gone = [name for name in TOKEN_CLASSES if name in what and name not in tokens]
    lines = [f"no sample has {what[name]}: no score is about {name} tokens" for name in gone]
    if not any(asked.weights[name] for name in tokens):
        lines.append("every class of tokens that the samples have has the weight 0")
    return lines


def idle_options(asked: AnalysisRequest, samples: Sequence[Sample]) -> list[str]:
    """Lines on options, and on data, for which the method has no use."""
    if not samples:
        needless = f"{asked.method_name} with {asked.solver} needs no calibration data"
        found = [] if asked.calibration is None else ["those that were given were not read"]
        if asked.of_data:
            have = "has" if len(asked.of_data) == 1 else "have"
            found.append(f"{', '.join(asked.of_data)} {have} no effect")
        return [f"{needless}: {line}" for line in found]
    if asked.method.one_by_one and asked.batch_size != 1 and "--batch-size" in asked.of_data:
        return [f"{asked.method_name} takes samples one by one: --batch-size has no effect"]
    return []


def bounded_outputs(bound: BoundModel) -> list[str]:
    """A line on a model whose losses are not quite those of its logits."""
    if not bounds_logits(empty_model(bound.config, bound.arch), bound.arch, bound.config):
        return []
    return [
        f"this {bound.arch.title} bounds what its head puts out before it is a logit: losses are "
        "of what the head puts out"
    ]
