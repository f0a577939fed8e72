"""Experts as layers of their own, beside the experts of transformers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from prismquant.errors import brief
from prismquant.families.family_claims import FamilyClaim
from prismquant.families.specimen_run import TOLERANCE, SpecimenRun
from prismquant.memory import memory_error
from prismquant.models.config import import_transformers
from prismquant.models.forgotten_outputs import supply_outputs

__all__ = ["expert_claims"]


def expert_claims(run: SpecimenRun) -> Iterator[FamilyClaim]:
    """That layers of single experts compute what the model of transformers does.

    Args:
        run: The model, whose experts are layers.
    """
    if not run.bound.arch.experts:
        return
    what = "experts as layers of their own compute what the model's do"
    try:
        apart = run.difference(_own_model(run))
    # Third-party code over a model that nobody has released.
    except Exception as error:
        if memory_error(error) is not None:
            raise
        yield FamilyClaim(
            what, False, f"transformers cannot run what it has written: {brief(error)}"
        )
        return
    yield FamilyClaim(what, apart <= TOLERANCE, f"logits differ by {apart:.1e}")


def _own_model(run: SpecimenRun) -> nn.Module:
    """The model as transformers loads it."""
    kind: Any = getattr(import_transformers(), run.bound.arch.hf_class)
    with contextlib.redirect_stderr(io.StringIO()):  # its bar of progress
        model: nn.Module = kind.from_pretrained(
            run.bound.folder,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
        )
    supply_outputs(model, run.bound.arch)
    return model.eval()
