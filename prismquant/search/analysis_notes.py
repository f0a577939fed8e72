"""Notes on what an analysis is given: classes of tokens that samples lack, options without use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prismquant.data import Sample
from prismquant.search.analysis_request import AnalysisRequest
from prismquant.search.sensitivity import TOKEN_CLASSES, TokenClass


def missing_classes(tokens: Mapping[TokenClass, int], asked: AnalysisRequest) -> list[str]:
    """Lines on classes of tokens that the samples lack."""
    if asked.calibration is None or not tokens:
        return []
    gone = [name for name in TOKEN_CLASSES if name not in tokens]
    what = {"answer": "an answer", "text": "other text", "image": "a picture", "video": "a clip"}
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
