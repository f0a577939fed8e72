"""Batches for a small model of a family, and the model having seen them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prismquant.data.batches import Batch, make_batches
from prismquant.errors import ModelError, brief
from prismquant.families.shrink_config import special_ids
from prismquant.families.specimen import KINDS, write_samples
from prismquant.families.specimen_run import SpecimenRun
from prismquant.memory import memory_error
from prismquant.models.arch import ArchSpec
from prismquant.models.bound import BoundModel
from prismquant.models.config import config_value
from prismquant.models.float_model import load_float

__all__ = ["kinds_of", "renumbered", "run_specimen", "small_batches", "vocabulary_of"]

_SAMPLES = 3


def small_batches(arch: ArchSpec, config: Any, processor: Any, folder: Path) -> dict[str, Batch]:
    """A batch of each kind of sample that a family takes, and one of all kinds together.

    Args:
        arch: Says what it takes.
        config: Native configuration.
        processor: Of the model.
        folder: Where the samples go.
    """
    kinds = kinds_of(config, processor)
    found = {}
    together = [("text", kind) for kind in kinds[1:]] if arch.one_kind else [tuple(kinds)]
    for names in dict.fromkeys([*((kind,) for kind in kinds), *together]):
        called = " and ".join(names)
        count = max(_SAMPLES, len(names))
        samples = write_samples(folder / called, names, count)
        [found[called]] = make_batches(
            samples,
            processor,
            batch_size=count,
            vision_token_ids=[int(config_value(config, key)) for key in arch.vision_token_ids],
        )
    return found


def kinds_of(config: Any, processor: Any) -> list[str]:
    """Kinds of samples that a model takes.

    Args:
        config: Native configuration; in a family that hears, ``audio_config`` is None where it has
            no ears.
        processor: Of the model.
    """
    # Some take a clip's frames as pictures: what they are given is called so, too.
    parts = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}
    taken = {kind for kind, part in parts.items() if getattr(processor, part, None) is not None}
    if getattr(config, "audio_config", config) is None:
        taken.discard("audio")
    return [kind for kind in KINDS if kind == "text" or kind in taken]


def vocabulary_of(config: Any, batches: Iterable[Batch]) -> list[int]:
    """All tokens of batches, and those that a configuration names, sorted."""
    ids = torch.cat([batch.inputs["input_ids"].flatten() for batch in batches])
    return sorted({*ids.unique().tolist(), *special_ids(config)})


def renumbered(batch: Batch, token_ids: Sequence[int]) -> Batch:
    """The batch with each token's place in a vocabulary as its id."""
    places = torch.searchsorted(torch.tensor(token_ids), batch.inputs["input_ids"])
    return replace(batch, inputs={**batch.inputs, "input_ids": places})


def run_specimen(
    bound: BoundModel, batches: Mapping[str, Batch]
) -> tuple[SpecimenRun, dict[str, str]]:
    """The small model, having seen the batches that it takes; and why it does not take the others.

    Raises:
        ModelError: It takes none.
    """
    model = load_float(bound.folder, torch.float32)
    taken, refused = {}, {}
    for kind, batch in batches.items():
        if (said := _refusal(model, batch)) is None:
            taken[kind] = batch
        else:
            refused[kind] = said
    if not taken:
        raise ModelError(
            f"the model's own code runs no sample of any kind: {next(iter(refused.values()))}",
            where=bound.arch.title,
            remedy="try transformers' own example of the model in this environment",
        )
    return SpecimenRun.of(bound, model, taken), refused


def _refusal(model: nn.Module, batch: Batch) -> str | None:
    """Objection of the model's own code to a batch; None where it runs."""
    try:
        with torch.no_grad():
            model(**batch.inputs, use_cache=False)
    # Third-party code, over inputs of third-party code.
    except Exception as error:
        if memory_error(error) is not None:
            raise
        return brief(error)
    return None
