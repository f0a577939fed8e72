"""The number of threads is the one that was fastest."""

from __future__ import annotations

import pytest
import torch

from prismquant import threads
from prismquant.threads import thread_count


@pytest.fixture
def six(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)


@pytest.mark.usefixtures("six")
@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 4.0, 2: 2.0, 4: 1.0, 6: 0.7}, 6),
        ({1: 4.0, 2: 2.0, 4: 1.0, 6: 0.95}, 4),
        ({1: 1.0, 2: 3.0, 4: 5.0, 6: 9.0}, 1),
        ({1: 1.0, 2: 0.95, 4: 0.6, 6: 0.6}, 4),
    ],
)
def test_the_fastest_wins_and_more_threads_must_be_worth_it(
    seconds: dict[int, float], best: int
) -> None:
    asked = []
    assert thread_count(probe=lambda n: asked.append(n) or seconds[n]) == best  # type: ignore[func-returns-value]
    assert asked == [1, 2, 4, 6]


def test_who_has_decided_is_not_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert thread_count(probe=lambda _: pytest.fail("nothing is to be measured")) == 3


def test_measuring_leaves_torch_as_it_was() -> None:
    before = torch.get_num_threads()
    assert threads._seconds(1) > 0
    assert torch.get_num_threads() == before
