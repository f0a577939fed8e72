"""The bench of searches: budgets, random mixes, and correlations that can be known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import sensitivities

from bench.search.__main__ import budgets, random_mix
from bench.search.tables import Measures, mix_rows, rank_rows
from prismquant.search.allocate import set_up
from prismquant.search.constraints import Constraints
from prismquant.search.knapsack import Solved

FORMATS = ("int2-g64", "int3-g128", "int4-g128")


def measures(sign: float) -> Measures:
    """True divergences that are a score's own, or go against it."""
    found = sensitivities.made(formats=FORMATS)
    done: dict[tuple[Any, ...], dict[str, Any]] = {
        ("m", "score", "fisher", "rtn", 0): {"cpu": 2.0, "peak": 1 << 20},
        ("m", "uniform", "rtn", "int3-g128"): {"answer": 0.5, "text": 0.25},
        ("m", "random", "rtn", "int3-g128", 0): {"answer": 0.75, "text": 0.5},
        ("m", "random", "rtn", "int3-g128", 1): {"answer": 0.25, "text": 1.0},
    }
    groups = {}
    for unit in found.units:
        for option in unit.options[1:]:
            truth = {kind: sign * score.loss for kind, score in option.scores.items()}
            done["m", "truth", "rtn", unit.name, option.format] = truth
        losses = [option.scores["answer"].loss for option in unit.options[1:]]
        groups[unit.name] = {"modules": [unit.layers[0].name], "scores": [*losses, 0.0]}
    done["m", "peer", "modelopt gradient", 0] = {"cpu": 1.0, "peak": 1 << 20, "groups": groups}
    return Measures("m", done, lambda *_: found, ["fisher"], ["rtn"], FORMATS, range(1))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_score_that_is_the_truth_has_rank_correlation_one(sign: float) -> None:
    rows = rank_rows(measures(sign))
    assert {row[2] for row in rows} == {"fisher", "modelopt gradient"}
    assert {row[5] for row in rows if row[3] == "answer"} == {f"{sign:.3f}"}


def test_random_mixes_are_told_by_their_mean_and_their_best() -> None:
    told = {row[3]: row[4:] for row in mix_rows(measures(1.0))}
    assert told["uniform"] == ["0.50000", "0.25000", "1"]
    assert told["random"] == ["0.50000", "0.75000", "2"]
    assert told["best of random"] == ["0.25000", "0.50000", "2"]


@pytest.mark.parametrize("seed", range(20))
def test_random_mixes_keep_to_the_budget_and_come_near_it(seed: int) -> None:
    allocation = set_up(sensitivities.made(seed, formats=FORMATS), Constraints())
    sizes = budgets(allocation, FORMATS)
    assert list(sizes) == ["int2-g64 .. int3-g128", "int3-g128", "int3-g128 .. int4-g128"]
    assert sorted(sizes.values()) == list(sizes.values())
    for size in sizes.values():
        chosen = random_mix(allocation, size, seed)
        taken = allocation.mix(Solved(chosen, 0.0, 0.0)).stored_bytes
        assert 0.85 * size < taken <= size
        assert chosen == random_mix(allocation, size, seed)
