"""Knapsacks against brute force: never over a limit, always optimal."""

from __future__ import annotations

import itertools
import math
import random
import time
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismquant.search import knapsack
from prismquant.search.knapsack import Limit, Table, solve, total

if TYPE_CHECKING:
    from collections.abc import Sequence


def best(costs: Table, limits: Sequence[Limit]) -> Fraction | None:
    """The least cost of any answer, by trying all."""
    answers = itertools.product(*(range(len(row)) for row in costs))
    fits = (answer for answer in answers if all(limit.holds(answer) for limit in limits))
    return min((total(costs, answer) for answer in fits), default=None)


def random_problem(dice: random.Random) -> tuple[Table, list[Limit]]:
    """Costs of any sign and size, and up to three limits, some of them just met."""
    sizes = [dice.randint(1, 5) for _ in range(dice.randint(1, 6))]
    costs = tuple(
        tuple(
            dice.gauss(0, 1) * 10 ** dice.randint(-6, 3) if dice.random() < 0.9 else 0.0
            for _ in range(size)
        )
        for size in sizes
    )
    limits = []
    for number in range(dice.randint(0, 3)):
        whole, large = dice.random() < 0.7, 10 ** dice.randint(1, 11)
        amounts: Table = tuple(
            tuple(dice.randint(0, large) if whole else dice.random() * large for _ in range(size))
            for size in sizes
        )
        low, high = sum(map(min, amounts)), sum(map(max, amounts))
        bound: float | Fraction = low + dice.random() * (high - low) * 1.02
        if dice.random() < 0.3:
            bound = total(amounts, [dice.randrange(size) for size in sizes])
        side = "most" if dice.random() < 0.75 else "least"
        limits.append(Limit(str(number), amounts, **{side: bound}))
    return costs, limits


@pytest.mark.parametrize("hundred", range(10))
def test_random_knapsacks_are_solved_as_by_brute_force(hundred: int) -> None:
    solved = 0
    for seed in range(100 * hundred, 100 * hundred + 100):
        costs, limits = random_problem(random.Random(seed))
        found, wanted = solve(costs, limits), best(costs, limits)
        assert (found is None) == (wanted is None), seed
        if found is not None and wanted is not None:
            assert all(limit.holds(found.chosen) for limit in limits), seed
            assert total(costs, found.chosen) == wanted, seed
            assert found.cost == float(wanted)
            solved += 1
    assert solved > 50


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    most=st.integers(-1, 16),
)
def test_small_whole_numbers_with_many_ties(rows: list[list[tuple[int, int]]], most: int) -> None:
    costs = tuple(tuple(cost for cost, _ in row) for row in rows)
    limit = Limit("size", tuple(tuple(amount for _, amount in row) for row in rows), most=most)
    found, wanted = solve(costs, [limit]), best(costs, [limit])
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert limit.holds(found.chosen)
        assert (total(costs, found.chosen), found.gap) == (wanted, 0)
        assert solve(costs, [limit]) == found


def test_equal_options_are_taken_in_their_order() -> None:
    costs, sizes = ((5.0, 5.0, 5.0),) * 3, ((2, 1, 1),) * 3
    found = solve(costs, [Limit("size", sizes, most=100)])
    assert found is not None
    assert found.chosen == (1, 1, 1)


def test_an_answer_over_a_limit_by_a_hair_is_never_given() -> None:
    """A tenth three times is more than three tenths, in exact numbers; less than any tolerance."""
    costs, amounts = ((0.0, 1.0),) * 3, ((0.1, 0.0),) * 3
    limit = Limit("latency", amounts, most=0.3)
    found = solve(costs, [limit])
    assert found is not None
    assert found.cost == 1.0
    assert limit.holds(found.chosen)


@pytest.mark.parametrize(("most", "least", "chosen"), [(1e308, None, 1), (None, -1e308, 1)])
def test_a_limit_beyond_all_numbers_bounds_nothing(
    most: float | None, least: float | None, chosen: int
) -> None:
    amounts: Table = ((1e-5, 2e-5), (1e-5, 2e-5))
    solved = solve(((3.0, 1.0), (3.0, 1.0)), [Limit("all", amounts, most=most, least=least)])
    assert solved is not None
    assert solved.chosen == (chosen, chosen)


@pytest.mark.parametrize(("most", "least"), [(-1e308, None), (None, 1e308)])
def test_a_limit_beyond_all_numbers_may_exclude_all(
    most: float | None, least: float | None
) -> None:
    amounts: Table = ((1e-5, 2e-5), (1e-5, 2e-5))
    assert solve(((3.0, 1.0), (3.0, 1.0)), [Limit("all", amounts, most=most, least=least)]) is None


def test_many_answers_over_a_limit_by_a_hair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they cannot be forbidden one by one the limit is drawn tighter, and the gap says so."""
    monkeypatch.setattr(knapsack, "_MOST_FORBIDDEN", 2)
    dice = random.Random(1)
    amounts = tuple((0.5 + dice.random() * 1e-12, 0.0) for _ in range(8))
    costs = ((0.0, 1.0),) * 8
    limit = Limit("latency", amounts, most=2.0)
    found = solve(costs, [limit])
    assert found is not None
    assert limit.holds(found.chosen)
    wanted = best(costs, [limit])
    assert wanted is not None
    assert float(wanted) <= found.cost <= float(wanted) + found.gap


def test_nodes_may_run_out_and_the_gap_tells() -> None:
    """Ten of twenty even numbers never make an odd sum; proving the best takes many nodes."""
    dice = random.Random(3)
    sizes = tuple((0, dice.randrange(10**8, 2 * 10**8)) for _ in range(40))
    costs = tuple((0.0, -float(row[1])) for row in sizes)
    limit = Limit("size", sizes, most=sum(row[1] for row in sizes) // 2)
    found = solve(costs, [limit], max_nodes=1)
    assert found is not None
    assert limit.holds(found.chosen)
    assert 0 <= found.gap < 0.05 * -found.cost


def test_a_model_of_72_billion_weights_takes_seconds() -> None:
    """80 blocks of 6 units and a tower of 32 with 4, in 8 formats."""
    dice = random.Random(0)
    bits = (2.25, 3.25, 4.25, 4.5, 5.25, 6.25, 8.03, 16.0)
    shapes = [(8192, 10240), (8192, 8192), (59136, 8192), (29568, 8192), (1024, 8192)] * 96
    shapes += [(3840, 1280), (1280, 1280), (6840, 1280), (1280, 3420)] * 32 + [(152064, 8192)]
    counts = [rows * columns for rows, columns in shapes]
    sizes = tuple(
        tuple(int(count * each / 8) // 64 * 64 + dice.choice((0, 64)) for each in bits)
        for count in counts
    )
    costs = tuple(
        tuple(
            dice.lognormvariate(0, 1) * math.sqrt(count) * 4.0**-each * (each < 16) for each in bits
        )
        for count in counts
    )
    limit = Limit("size", sizes, most=int(sum(counts) * 4.6 / 8))
    begun = time.perf_counter()
    found = solve(costs, [limit])
    assert time.perf_counter() - begun < 30
    assert found is not None
    assert limit.holds(found.chosen)
    assert found.gap <= 1e-6 * found.cost
