"""Trials of a recipe's alternatives: quantized on few samples, measured on samples held out."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from prismquant.data.batches import Batch
from prismquant.data.samples import Sample
from prismquant.diagnostics.step_record import StepRecord
from prismquant.engine.setup import Reporter, Silent
from prismquant.errors import NumericsError, PlanError, PrismQuantError
from prismquant.evaluate.fidelity import evaluate_model
from prismquant.export.load_quantized import load_model
from prismquant.quantization.perform import perform
from prismquant.quantization.request import Request
from prismquant.recipe.schema import Recipe
from prismquant.run.method_choice import MethodTrial
from prismquant.search.analysis_request import DEFAULT_WEIGHTS
from prismquant.search.repair import measured

MOST_LOGITS = 1 << 30
"""Bytes of the unquantized model's logits that are kept between trials."""

# A model may fail to be quantized in one way and not in another; all else is wrong with any.
_OWN_FAILURES = (NumericsError, PlanError)


@dataclass(frozen=True)
class Ask:
    """One trial to make.

    Attributes:
        name: Of the alternative.
        round: The trial's round.
        recipe: The alternative as an ordinary recipe.
        samples: Calibration samples.
    """

    name: str
    round: int
    recipe: Recipe
    samples: tuple[Sample, ...]


class TrialRuns:
    """Trials of alternatives of one recipe on one model.

    Args:
        asked: The request, whose recipe has the alternatives.
        batches: Batches of the samples held out; on the first rank.
        folder: Where a checkpoint lies while it is measured.
        clear: Deletes it.
    """

    def __init__(
        self, asked: Request, batches: Sequence[Batch], folder: Path, clear: Callable[[], None]
    ) -> None:
        self._asked, self._batches, self._folder, self._clear = asked, batches, folder, clear
        self._reference: nn.Module | None = None

    def run(self, ask: Ask) -> MethodTrial:
        """Quantize the model in one way and measure what it loses; alike on all ranks.

        Raises:
            PrismQuantError: It fails, not for what the alternative says.
        """
        asked, started = self._asked, time.monotonic()
        said = f"trying {ask.name} on {len(ask.samples)} samples"
        trial = MethodTrial(ask.name, ask.round, len(ask.samples))
        try:
            perform(
                replace(
                    asked,
                    recipe=ask.recipe,
                    out=self._folder,
                    samples=ask.samples,
                    resume=False,
                    reporter=_TrialReporter(asked.reporter, said),
                )
            )
            own = self._measured(trial) if asked.ranks.rank == 0 else None
        except _OWN_FAILURES as error:
            own = replace(trial, failure=_failure(error))
        finally:
            if asked.ranks.rank == 0:
                self._clear()
        told = asked.ranks.gather_json([None if own is None else _plain(own)])[0][0]
        return replace(MethodTrial(**told), seconds=round(time.monotonic() - started, 2))

    def _measured(self, trial: MethodTrial) -> MethodTrial:
        """Loss of the checkpoint that has been written."""
        device = self._asked.target
        dtype = torch.float32 if device.type == "cpu" else None
        if self._reference is None:
            own = load_model(self._asked.model, dtype=dtype, device=device)
            self._reference = KnownLogits(own)
        model = load_model(self._folder, dtype=dtype, device=device)
        found = evaluate_model(model, (one.whole() for one in self._batches), self._reference)
        loss = measured(found.outcomes, DEFAULT_WEIGHTS)
        if not math.isfinite(loss.loss):
            return replace(trial, failure="its divergence is not finite")
        kl = {name: one.kl for name, one in found.overall.divergence.items()}
        return replace(trial, loss=loss.loss, error=loss.error, kl=kl, parts=dict(loss.parts))


class KnownLogits(nn.Module):
    """A model that keeps its logits of inputs that come again, as far as there is room.

    Args:
        model: The model.
        most_bytes: Of logits that are kept.
    """

    def __init__(self, model: nn.Module, most_bytes: int = MOST_LOGITS) -> None:
        super().__init__()
        self.model, self.left = model, most_bytes
        self._known: dict[str, Tensor] = {}

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """Logits [B, T, V]."""
        key = _digest(inputs)
        if key in self._known:
            return SimpleNamespace(logits=self._known[key])
        found: Tensor = self.model(**inputs).logits
        size = found.numel() * found.element_size()
        if size <= self.left:
            self.left -= size
            self._known[key] = found
        return SimpleNamespace(logits=found)


class _TrialReporter(Silent):
    """Tells the stages of a trial to whoever is told of the run."""

    def __init__(self, outer: Reporter, said: str) -> None:
        self._outer, self._said = outer, said

    def begin(self, steps: int) -> None:
        """The trial has so many steps."""
        self._outer.begin(steps)

    def stage(self, step: str, what: str) -> None:
        """A stage of a step begins."""
        self._outer.stage(f"{self._said}: {step}", what)

    def finish(self, record: StepRecord) -> None:
        """Say nothing of a step of a trial."""


def _digest(inputs: Mapping[str, Any]) -> str:
    """SHA-256 over names and values of a call's tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _failure(error: PrismQuantError) -> str:
    return f"{error.where}: {error.what}" if error.where else error.what


def _plain(trial: MethodTrial) -> Mapping[str, object]:
    return dict(vars(trial))
