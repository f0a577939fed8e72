"""A checkpoint measured on data: both are read, checked against each other, and run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from prismquant.data import Sample, read_samples
from prismquant.data.batches import Batches, make_batches
from prismquant.data.media import Limits
from prismquant.data.survey import position_limit, survey
from prismquant.data.windows import Windows, window_remarks
from prismquant.errors import DataError
from prismquant.evaluate.fidelity import evaluate_model
from prismquant.evaluate.figures import Fidelity
from prismquant.evaluate.shared_vocabulary import require_same_vocabulary
from prismquant.export.load_quantized import load_model
from prismquant.memory import available_bytes, resident_bytes
from prismquant.models.config import config_value, identify, native_config
from prismquant.models.processor import load_processor
from prismquant.run.directory import RunDirectory

__all__ = ["Measurement", "measure_folder"]

# Of a batch of running text: every token has logits, as many as the vocabulary has words.
_MOST_TOKENS = 4096


@dataclass(frozen=True)
class Measurement:
    """Request to measure a checkpoint, its arguments checked.

    Attributes:
        folder: The checkpoint.
        source: Data file, or the name of a data set.
        reference: Folder of the model to compare with, or None.
        limit: At most so many samples.
        batch_size: Samples run together.
        dtype: Of the arithmetic; None keeps the checkpoint's.
        generated: Also decode greedily and compare normalized text.
        trust_remote_code: Allow code in the folder to build the processor.
        limits: Sizes of pictures, clips, samples and windows.
    """

    folder: Path
    source: str | Path
    reference: Path | None = None
    limit: int | None = None
    batch_size: int = 16
    dtype: torch.dtype | None = torch.float32
    generated: bool = False
    trust_remote_code: bool = False
    limits: Limits = field(default_factory=Limits)


def measure_folder(asked: Measurement) -> Fidelity:
    """Measure a model's answers, alone and against a reference.

    Raises:
        PrismQuantError: A checkpoint or the data cannot be read, or the reference has another
            vocabulary.
    """
    room, trusted = resident_bytes() + available_bytes(), asked.trust_remote_code
    samples = _samples(asked)
    processor = load_processor(asked.folder, trust_remote_code=trusted)
    if asked.reference is not None:
        require_same_vocabulary(asked.folder, processor, asked.reference, trust_remote_code=trusted)
    arch = identify(asked.folder)
    config = native_config(arch, asked.folder)
    batches: Batches = make_batches(
        samples,
        processor,
        batch_size=asked.batch_size,
        vision_token_ids=[int(config_value(config, key)) for key in arch.vision_token_ids],
        limits=asked.limits,
        most_tokens=_MOST_TOKENS if any(sample.running for sample in samples) else None,
        one_kind=arch.one_kind,
    )
    found = survey(batches, most_bytes=room, positions=position_limit(config))
    loaded = load_model(asked.folder, dtype=asked.dtype)
    compared = load_model(asked.reference, dtype=asked.dtype) if asked.reference else None
    result = evaluate_model(
        loaded,
        (batch.whole() for batch in found.batches),
        reference=compared,
        generated=asked.generated,
        processor=processor,
    )
    notes = (*window_remarks(samples), *found.remarks(answers=True))
    return replace(result, notes=notes, predicted=RunDirectory(asked.folder).predicted())


def _samples(asked: Measurement) -> tuple[Sample, ...]:
    """The samples, running text in windows."""
    samples = read_samples(
        asked.source,
        limit=asked.limit,
        require_answers=True,
        most_bytes=available_bytes(),
        windows=Windows(asked.folder, asked.limits.seq_length, asked.trust_remote_code),
    )
    if asked.generated and any(sample.running for sample in samples):
        raise DataError(
            "running text has no answers that could be decoded",
            where=str(asked.source),
            remedy="leave out --generated, or give conversations",
        )
    return samples
