"""Probes have the Fisher information as their second moments."""

from __future__ import annotations

import itertools

import pytest
import torch

from prismquant.search import probes as module
from prismquant.search.probes import generator_of, probes

CPU = torch.device("cpu")


def fisher(logits: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(logits.double(), dim=-1)
    return p.diag() - torch.outer(p, p)


def test_signs_have_the_fisher_information_as_second_moments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over all choices of signs the mean is exact."""
    logits = torch.tensor([1.0, -2.0, 0.3, 4.0, 0.0], dtype=torch.float64)
    total, mean = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for bits in itertools.product((0, 1), repeat=5):
        drawn = torch.tensor([bits], dtype=torch.int8)
        monkeypatch.setattr(module.torch, "randint", lambda *_, _d=drawn, **__: _d)
        (probe,) = probes(logits[None], [generator_of(0, device=CPU)])[0]
        total += torch.outer(probe, probe) / 2**5
        mean += probe / 2**5
    torch.testing.assert_close(total, fisher(logits))
    torch.testing.assert_close(mean, torch.zeros_like(mean))


def test_drawn_probes_have_it_on_average() -> None:
    logits = torch.tensor([1.0, -1.0, 0.3, 2.0])
    drawn = probes(logits.expand(200_000, 4), [generator_of(0, device=CPU)])[0].double()
    moments = drawn.T @ drawn / len(drawn)
    torch.testing.assert_close(moments, fisher(logits), rtol=0.02, atol=0.002)
    assert drawn.sum(dim=1).abs().max() < 1e-5


def test_generators_depend_on_what_they_are_for() -> None:
    logits = torch.randn(3, 7)
    first, again, other = (
        probes(logits, [generator_of(5, "a", draw, device=CPU)]) for draw in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_places_in_parts_give_what_they_give_together() -> None:
    """Each draw goes on where it was."""
    logits = torch.randn(6, 8)
    together = probes(logits, [generator_of(1, n, device=CPU) for n in range(2)])
    generators = [generator_of(1, n, device=CPU) for n in range(2)]
    parts = [probes(part, generators) for part in logits.split(2)]
    assert torch.equal(torch.cat(parts, dim=1), together)
