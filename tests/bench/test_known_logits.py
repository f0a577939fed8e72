"""A reference that remembers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from bench.known_logits import KnownLogits


def test_logits_are_kept_by_all_that_the_model_is_given() -> None:
    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, **inputs: Any) -> SimpleNamespace:
            self.calls += 1
            return SimpleNamespace(logits=inputs["pixels"].float().sum() * torch.ones(1, 2, 8))

    model = Counting()
    known = KnownLogits(model, most_bytes=100)
    ids = torch.ones(1, 2, dtype=torch.int64)
    one, other = torch.ones(2), torch.zeros(2)
    for pixels in (one, other, one, other):
        expected = pixels.sum() * torch.ones(1, 2, 8)
        assert torch.equal(known(input_ids=ids, pixels=pixels).logits, expected)
    # The second one's did not fit.
    assert model.calls == 3
