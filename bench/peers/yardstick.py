"""What the checkpoints of all tools are measured with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.rows import Figures
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.evaluate.fidelity import evaluate_model
from prismquant.export.load_quantized import load, load_model
from prismquant.models.bind import bind
from prismquant.plan.plan import PlanRow
from prismquant.runtime.linear import quantize_inputs

BATCH_SIZE = 32


class Remembered(nn.Module):
    """The float model, which is asked each batch once: batches must come in the same order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.logits: list[Tensor] = []
        self.place = 0

    def forward(self, logits_to_keep: Tensor, **inputs: Any) -> SimpleNamespace:
        """As the model's; the logits come from memory where they can."""
        if self.place == len(self.logits):
            self.logits.append(self.model(**inputs, logits_to_keep=logits_to_keep).logits)
        self.place += 1
        return SimpleNamespace(logits=self.logits[self.place - 1])


class Yardstick:
    """What all checkpoints of one model are measured with.

    Args:
        model: Folder of the float checkpoint.
        evaluation: Questions with answers.
    """

    def __init__(self, model: Path, evaluation: Path) -> None:
        _, processor = load(model)
        self.reference = Remembered(load_model(model, dtype=torch.float32))
        self.batches = list(
            make_batches(
                read_samples(evaluation, require_answers=True),
                processor,
                batch_size=BATCH_SIZE,
                vision_token_ids=bind(model).vision_token_ids,
            )
        )

    def measure(self, folder: Path, inputs: Sequence[PlanRow] = ()) -> Figures:
        """Figures of a checkpoint, the inputs of some layers quantized as a plan's rows say."""
        model = load_model(folder, dtype=torch.float32)
        for row in inputs:
            if row.config.activations is not None:
                quantize_inputs(model, row.site.name, row.config.activations, None, None)
        self.reference.place = 0
        result = evaluate_model(model, self.batches, reference=self.reference)
        overall, answers = result.overall, result.overall.divergence["answer"]
        pictures = result.by_kind.get("image")
        return {
            "exact_match": overall.exact_match,
            "reference_exact_match": overall.reference_exact_match,
            "kl": answers.kl,
            "kl_error": answers.kl_error,
            "kl_image": None if pictures is None else pictures.divergence["answer"].kl,
            "top1": answers.top1,
        }
