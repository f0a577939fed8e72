"""Weighted scores: exact where units differ by a factor, never in the hands of one sample."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from prismquant.search.analysis import SampleLosses, UnitScores
from prismquant.search.sample_sums import mean_score
from prismquant.search.sample_weights import weighted_scores, with_sample_weights
from prismquant.search.sensitivity import Score, TokenClass

POSITIVE = st.floats(1e-6, 1e6)


def losses_of(seed: int, units: int, samples: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(units, samples, generator=generator, dtype=torch.float64).mul(spread).exp()


def by_hand(losses: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """The formulas of the module's docstring, sample by sample."""
    rows = [[float(x) for x in row] for row in losses]
    totals = [math.fsum(row) for row in rows]
    kept = [(row, total) for row, total in zip(rows, totals, strict=True) if total > 0]
    a = [math.fsum(row[i] / total for row, total in kept) / len(kept) for i in range(len(rows[0]))]
    n, every = sum(x > 0 for x in a), float(tokens.sum())
    return [
        math.fsum(x / y for x, y in zip(row, a, strict=True) if y > 0) / n / every for row in rows
    ]


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 12))
def test_scores_are_those_of_the_formulas(seed: int, units: int, samples: int) -> None:
    losses = losses_of(seed, units, samples)
    losses[:, seed % samples] *= seed % 2
    tokens = torch.arange(1, samples + 1, dtype=torch.float64)
    found = [score.loss for score in weighted_scores(losses, tokens)]
    assert found == pytest.approx(by_hand(losses, tokens) if losses.any() else [0.0] * units)


@given(st.lists(POSITIVE, min_size=1, max_size=8), st.lists(POSITIVE, min_size=2, max_size=8))
def test_units_that_differ_by_a_factor_have_their_plain_means(
    units: list[float], samples: list[float]
) -> None:
    losses = torch.outer(*(torch.tensor(x, dtype=torch.float64) for x in (units, samples)))
    tokens = torch.ones(len(samples), dtype=torch.float64)
    for score, own in zip(weighted_scores(losses, tokens), losses, strict=True):
        plain = mean_score(own, tokens)
        assert score.loss == pytest.approx(plain.loss, rel=1e-9)
        assert score.error == pytest.approx(plain.error, rel=1e-6, abs=1e-12 * plain.loss)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 12))
def test_units_of_a_tower_keep_their_scale(seed: int, units: int, samples: int) -> None:
    """The mean ratio to the plain score is 1; alone, a unit keeps its score."""
    losses = losses_of(seed, units, samples)
    tokens = torch.full((samples,), 3.0, dtype=torch.float64)
    found = weighted_scores(losses, tokens)
    plain = [mean_score(own, tokens).loss for own in losses]
    ratios = [score.loss / own for score, own in zip(found, plain, strict=True)]
    assert sum(ratios) / units == pytest.approx(1.0)
    (alone,) = weighted_scores(losses[:1], tokens)
    assert alone.loss == pytest.approx(plain[0])
    scaled = weighted_scores(losses * 7, tokens)
    assert [s.loss for s in scaled] == pytest.approx([7 * s.loss for s in found])


def test_no_sample_ranks_units_by_itself() -> None:
    """Not even one that makes nearly all of the sum in every unit."""
    generator = torch.Generator().manual_seed(0)
    true = torch.linspace(1, 3, 40, dtype=torch.float64)
    noise = torch.randn(40, 64, generator=generator, dtype=torch.float64).mul(0.5).exp()
    sizes = torch.ones(64, dtype=torch.float64)
    sizes[5] = 1000.0
    losses, tokens = true[:, None] * sizes * noise, torch.ones(64, dtype=torch.float64)
    weighted = [score.loss for score in weighted_scores(losses, tokens)]
    assert spearmanr(weighted, true).statistic > 0.95
    assert spearmanr(losses.sum(dim=1), true).statistic < 0.75


def test_errors_are_those_of_repeated_draws() -> None:
    """The standard deviation over sets of samples drawn anew, of which the error tells."""
    generator = torch.Generator().manual_seed(1)

    def drawn() -> list[Score]:
        sizes = torch.randn(1, 200, generator=generator, dtype=torch.float64).exp()
        rest = torch.randn(6, 200, generator=generator, dtype=torch.float64).mul(0.3).exp()
        units = torch.arange(1, 7, dtype=torch.float64)[:, None]
        return weighted_scores(units * sizes * rest, torch.ones(200, dtype=torch.float64))

    draws = [drawn() for _ in range(300)]
    for unit in range(6):
        own = torch.tensor([one[unit].loss for one in draws], dtype=torch.float64)
        told = sum(one[unit].error or 0.0 for one in draws) / len(draws)
        assert told == pytest.approx(float(own.std()), rel=0.15)


def test_towers_formats_and_classes_do_not_meet() -> None:
    """And what knows no samples, and what loses nothing, stays as it is."""
    tokens = (1.0, 2.0, 1.0)

    def one(name: str, losses: tuple[float, ...]) -> UnitScores:
        own = mean_score(torch.tensor(losses).double(), torch.tensor(tokens).double())
        samples: dict[str, dict[TokenClass, SampleLosses]] = {
            "int4": {"answer": SampleLosses(losses, tokens)}
        }
        scores: dict[str, dict[TokenClass, Score]] = {"int4": {"answer": own, "text": Score(9.0)}}
        return UnitScores(name, scores, samples=samples)

    a, b = one("a", (1.0, 2.0, 9.0)), one("b", (4.0, 3.0, 1.0))
    picture, nothing = one("picture", (0.0, 5.0, 0.0)), one("nothing", (0.0, 0.0, 0.0))
    plain = UnitScores("plain", {"int4": {"answer": Score(1.0)}})
    towers = {"a": "llm", "b": "llm", "nothing": "llm", "picture": "vision", "plain": "llm"}
    found = with_sample_weights([a, picture, b, plain, nothing], towers)
    assert [own.unit for own in found] == ["a", "picture", "b", "plain", "nothing"]
    expected = weighted_scores(
        torch.tensor([[1.0, 2.0, 9.0], [4.0, 3.0, 1.0]]).double(), torch.tensor(tokens).double()
    )
    assert found[0].scores["int4"]["answer"].loss == pytest.approx(expected[0].loss)
    assert found[2].scores["int4"]["answer"].loss == pytest.approx(expected[1].loss)
    assert found[0].scores["int4"]["text"] == Score(9.0)
    assert found[1].scores["int4"]["answer"].loss == pytest.approx(1.25)
    assert found[3] == plain
    assert found[4].scores["int4"]["answer"].loss == 0.0
