"""What a model's own code reads of outputs that lack it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prismquant.models.arch_files import known_archs
from prismquant.models.forgotten_outputs import supply_outputs


class _Part(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(logits=x)


class _Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = _Part()

    def forward(self, x: torch.Tensor) -> Any:
        output = self.part(x)
        return output.logits, output.pictures


def test_what_is_lacking_is_none_and_what_is_there_stays() -> None:
    arch = replace(known_archs()["llama"], forgotten_outputs={"part": ("pictures", "logits")})
    model, x = _Whole(), torch.ones(2)
    with pytest.raises(AttributeError, match="pictures"):
        model(x)
    supply_outputs(model, arch)
    assert model(x) == (x, None)


def test_a_part_that_is_not_there_is_an_error() -> None:
    arch = replace(known_archs()["llama"], forgotten_outputs={"other": ("pictures",)})
    with pytest.raises(AttributeError, match="other"):
        supply_outputs(_Whole(), arch)
