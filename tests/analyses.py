"""Analyses of small models, and what a run of its own makes of the same formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import prismquant as pq
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.engine.placement import Placement
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.processor import load_processor
from prismquant.runtime.mixed import Precision
from prismquant.search.analysis import Analysis
from prismquant.search.choices import make_choices
from prismquant.search.format_grammar import formats_on_offer, rule_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from prismquant.data.batches import Batch
    from prismquant.search.analysis import AnalysisMethod
    from prismquant.search.sensitivity import Choice, Score, TokenClass

    Losses = dict[str, dict[str, dict[TokenClass, Score]]]

FORMATS = "int3-channel,int4-g32,int8-channel+int8-token"
DOUBLE = Placement(precision=Precision(torch.float64))


def batches_of(folder: Path, data: Path) -> list[Batch]:
    ids = bind(folder).vision_token_ids
    samples = read_samples(data)
    return list(make_batches(samples, load_processor(folder), batch_size=1, vision_token_ids=ids))


def analysis_of(
    folder: Path, batches: list[Batch], formats: str = FORMATS, solver: str = "rtn", **more: Any
) -> Analysis:
    bound = bind(folder)
    choices = make_choices(bound, formats_on_offer(formats), solver=solver)
    return Analysis(bound, choices, batches, **{"placement": DOUBLE} | more)


def scores_of(analysis: Analysis, method: AnalysisMethod) -> Losses:
    return {
        one.unit: {name: dict(own) for name, own in one.scores.items()}
        for one in method.scores(analysis)
    }


def rounded_weights(folder: Path, choice: Choice, out: Path) -> dict[str, Tensor]:
    """Weights of a checkpoint that a run of its own has rounded to nearest, by layer."""
    rules = [
        rule_of(choice) | {"solver": "rtn"},
        {"match": {"role": "patch_embed"}, "activations": "none"},
    ]
    pq.quantize(folder, {"name": "whole", "rules": rules}, out)
    model = load_model(out)
    return {site.name: model.get_parameter(f"{site.name}.weight") for site in bind(folder).sites}
