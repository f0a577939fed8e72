"""Divergences of small changes: equal to the plain formula in float64, and never negative."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prismquant.search import divergence
from prismquant.search.divergence import ClassSums, UnchangedLogits, scores_of


def plain(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    log_p, log_q = (torch.log_softmax(x.double(), dim=-1) for x in (p, q))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


@given(
    seed=st.integers(0, 2**32),
    width=st.integers(2, 300),
    spread=st.floats(0.01, 20),
    change=st.sampled_from([0.0, 1e-4, 1e-2, 0.3, 5.0, 60.0]),
    shift=st.sampled_from([0.0, -7.0, 1.0]),
)
def test_a_divergence_is_that_of_the_plain_formula(
    seed: int, width: int, spread: float, change: float, shift: float
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(5, width) * spread
    changed = logits + torch.randn(5, width) * change + shift
    found = UnchangedLogits(logits).divergence(changed)
    wanted = plain(logits, changed)
    assert bool((found > -1e-12).all())
    # Logits of this size are themselves rounded to about 1e-6.
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-9 + 1e-6 * change)


def test_blocks_of_places_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 50) * 3
    changed = logits + torch.randn(7, 50) * torch.tensor([[1e-3], [30.0]]).repeat(4, 1)[:7]
    whole = UnchangedLogits(logits).divergence(changed)
    for size in (1, 100, 149):
        monkeypatch.setattr(divergence, "_BLOCK", size)
        assert torch.equal(UnchangedLogits(logits).divergence(changed), whole)


def test_a_small_divergence_keeps_its_digits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 1000) * 3
    changed = logits + 2e-3 * torch.randn(20, 1000)
    found = UnchangedLogits(logits).divergence(changed)
    torch.testing.assert_close(found, plain(logits, changed), rtol=2e-3, atol=0)
    assert float(found.max()) < 1e-5


def test_words_that_both_rule_out_count_for_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -1e9]])
    found = UnchangedLogits(logits).divergence(torch.tensor([[0.5, 1.0, -2e9]]))
    torch.testing.assert_close(found, plain(logits[:, :2], torch.tensor([[0.5, 1.0]])))


def test_scores_are_means_over_tokens_with_the_error_of_a_ratio() -> None:
    sums = ClassSums(3)
    samples, classes = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 1])
    sums.add(torch.tensor([1.0, 3.0, 5.0, 3.0, 0.5], dtype=torch.float64), samples, classes)
    counts = [[2, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    scores = scores_of(sums.sums.tolist(), counts)
    assert set(scores) == {"answer", "text"}
    assert scores["answer"].loss == pytest.approx(3.0)
    # Residuals of the samples: 4 - 6, 5 - 3, 3 - 3.
    assert scores["answer"].error == pytest.approx((8 * 3 / 2) ** 0.5 / 4)
    assert (scores["text"].loss, scores["text"].error) == (0.5, None)
