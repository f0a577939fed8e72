"""Request to quantize a checkpoint, its arguments checked, and the finished run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prismquant.arguments import as_count
from prismquant.data import Sample
from prismquant.data.media import Limits
from prismquant.data.windows import Windows
from prismquant.diagnostics.predictions import Predictions
from prismquant.diagnostics.translation import Translation
from prismquant.distributed import Ranks
from prismquant.engine.setup import Reporter
from prismquant.formats.quantized_layer import QuantizedLayer
from prismquant.plan.plan import Plan
from prismquant.recipe.schema import Recipe
from prismquant.run.identity import Identity
from prismquant.run.method_choice import MethodChoice
from prismquant.run.record import RunRecord
from prismquant.runtime.mixed import Wanted

Predict = Callable[[Plan, Identity], tuple[Predictions | None, list[str]]]
"""Gives predictions of a plan's layers, if there are any, and notes on those that are missing."""

See = Callable[[Sequence[QuantizedLayer]], None]
"""Is shown quantized layers."""

# No picture, clip or sample has more of anything.
_MOST = 2**31 - 1


def _unseen(layers: Sequence[QuantizedLayer]) -> None:
    """Nobody looks at quantized layers."""


def _nothing_predicted(plan: Plan, run: Identity) -> tuple[Predictions | None, list[str]]:
    """No prediction."""
    return None, []


@dataclass(frozen=True)
class Request:
    """Everything that a caller of :func:`prismquant.api.quantize` may say, checked.

    Attributes:
        model: Folder of the source checkpoint.
        recipe: The recipe, with what the call adds to it.
        out: Folder of the result.
        calibration: A data file or the name of a data set, or None.
        target: Device of the arithmetic.
        wanted: Dtype of the arithmetic, or None for the default.
        resume: Go on with a run that was cut off.
        trust_remote_code: Allow code in the checkpoint's folder to build the processor.
        reporter: Is told how far the run is.
        memory_budget: Bytes that the process may take; None: what the system can spare.
        ranks: The processes that share the work.
        strict: Refuse what is only remarked on otherwise.
        limits: Sizes of pictures, clips and samples.
        of_data: Options that were given and are about calibration data alone.
        samples: Calibration samples that are read already, in place of all of the source.
        choice: How the recipe was chosen among alternatives, for the record.
        translation: What became of the settings of another tool's recipe; None: it is our own.
        predict: Gives what a search predicted of a plan's layers, for the record, and notes on
            what is missing of that.
        unpredicted: Why what a search predicted of the model is not of this request; empty where
            it is, or nothing was predicted.
        see: Is shown the quantized layers of each unit when they are written, in any thread; not
            those that an earlier run has finished.
    """

    model: Path
    recipe: Recipe
    out: Path
    calibration: str | Path | None
    target: torch.device
    wanted: Wanted
    resume: bool
    trust_remote_code: bool
    reporter: Reporter
    memory_budget: int | None
    ranks: Ranks
    strict: bool
    limits: Limits
    of_data: Sequence[str]
    samples: tuple[Sample, ...] | None = None
    choice: MethodChoice | None = None
    translation: Translation | None = None
    predict: Predict = _nothing_predicted
    unpredicted: str = ""
    see: See = _unseen

    @property
    def windows(self) -> Windows:
        """Cutter of calibration data that are running text."""
        return Windows(self.model, self.limits.seq_length, self.trust_remote_code)


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: The checkpoint.
        plan: What was done.
        record: How well.
        notes: That there was nothing to resume; what was damaged, or differs, of the earlier run
            that this one went on with; which
            layers were rounded to nearest because their solver failed; and which tensors that stay
            in floating point hold NaN or infinities.
    """

    folder: Path
    plan: Plan
    record: RunRecord
    notes: tuple[str, ...] = ()


def as_limits(max_pixels: Any, max_frames: Any, max_length: Any, seq_length: Any) -> Limits:
    """Sizes of pictures, clips and samples, as a caller gives them; None: no limit.

    Raises:
        ArgumentError: One is no count.
    """
    given = {
        "max_pixels": max_pixels,
        "max_frames": max_frames,
        "max_length": max_length,
        "seq_length": seq_length,
    }
    return Limits(
        **{
            name: None if value is None else as_count(value, name, most=_MOST)
            for name, value in given.items()
        }
    )
