"""Models of the bench, each with what it is calibrated and measured with."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from bench.known_logits import KnownLogits
from prismquant.data import read_samples
from prismquant.data.batches import Batch, make_batches
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.evaluate.fidelity import evaluate_model
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.outliers import add_outliers
from prismquant.models.processor import load_processor

CALIBRATION_SAMPLES = 64


@dataclass(frozen=True, eq=False)
class Searched:
    """A model whose units are scored.

    Attributes:
        name: What the table calls it.
        folder: Its checkpoint.
        calibrations: Calibration sets, one a draw.
        reference: The unquantized model, which remembers its answers.
        batches: Questions that no calibration saw.
    """

    name: str
    folder: Path
    calibrations: tuple[Path, ...]
    reference: nn.Module
    batches: Sequence[Batch]

    def divergence(self, model: nn.Module) -> dict[str, float]:
        """KL of a model from the unquantized one in nats a token, by class of token."""
        overall = evaluate_model(model, self.batches, self.reference).overall
        return {name: found.kl for name, found in overall.divergence.items()}


def write_inputs(folder: Path, calibration: Path, out: Path) -> None:
    """Write what a model is given for each sample, with labels at its answers, for other tools."""
    out.mkdir(parents=True)
    batches = make_batches(
        read_samples(calibration, limit=CALIBRATION_SAMPLES),
        load_processor(folder),
        batch_size=1,
        vision_token_ids=bind(folder).vision_token_ids,
    )
    for number, batch in enumerate(batches):
        ids = batch.inputs["input_ids"]
        labels = torch.where(batch.answer_mask, ids, torch.full_like(ids, -100))
        tensors = {name: value.contiguous() for name, value in batch.inputs.items()}
        save_file(tensors | {"labels": labels}, out / f"{number:04}.safetensors")


def searched(name: str, folder: Path, calibrations: Sequence[Path], evaluation: Path) -> Searched:
    """A model with its questions rendered once."""
    batches = make_batches(
        read_samples(evaluation),
        load_processor(folder),
        batch_size=16,
        vision_token_ids=bind(folder).vision_token_ids,
    )
    reference = KnownLogits(load_model(folder, dtype=torch.float32))
    return Searched(name, folder, tuple(calibrations), reference, list(batches))


def versions(folders: Mapping[str, Path]) -> dict[str, tuple[Path, bool]]:
    """Folder of each model by name, and whether it is to have activation outliers.

    Args:
        folders: Checkpoints by name; empty: the embedded model, whose two versions are called
            ``plain`` and ``outliers``.
    """
    if not folders:
        return {"plain": (CHECKPOINT, False), "outliers": (CHECKPOINT, True)}
    return {
        name + ending: (folder, bool(ending))
        for name, folder in folders.items()
        for ending in ("", "-outliers")
    }


def subjects(options: argparse.Namespace, work: Path) -> Iterator[Searched]:
    """Models that the command line asks for, one after the other.

    Args:
        options: ``folder``, ``models``, ``calibrations``, ``evaluation``, ``draws``, ``questions``.
        work: Where samples and versions with outliers are written.
    """
    known = versions(
        {name: Path(place) for name, _, place in (one.partition("=") for one in options.folder)}
    )
    unknown = [name for name in options.models or () if name not in known]
    if unknown:
        raise SystemExit(f"no model {', '.join(unknown)}: there are {', '.join(known)}")
    sets = options.calibrations or [
        write_dataset(work / f"c{n}", split="calibration", seed=n, count=CALIBRATION_SAMPLES)
        for n in range(options.draws)
    ]
    evaluation = options.evaluation or write_dataset(
        work / "evaluation", split="evaluation", count=options.questions
    )
    for name in options.models or known:
        folder, outliers = known[name]
        if outliers:
            version = work / name
            add_outliers(folder, version, factor=64.0, channels=4, modality="llm")
            folder = version
        yield searched(name, folder, sets, evaluation)
