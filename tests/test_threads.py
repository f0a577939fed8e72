"""The number of threads is the one that was fastest, and is looked at again where a run drags."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

import prismquant as pq
from prismquant import threads
from prismquant.report.progress import ProgressReporter
from prismquant.threads import Pace, let_waiting_threads_sleep, thread_count, use_threads


@pytest.fixture
def set_to(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch was told, of which it would take six by itself."""
    told = [6]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


# The choice


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 4.0, 2: 2.0, 4: 1.0, 6: 0.7}, 6),
        ({1: 4.0, 2: 2.0, 4: 1.0, 6: 0.95}, 4),
        ({1: 1.0, 2: 3.0, 4: 5.0, 6: 9.0}, 1),
        ({1: 1.0, 2: 0.95, 4: 0.6, 6: 0.6}, 4),
        ({1: 1.0}, 1),
        ({1: 2.0, 2: 1.0, 4: 0.5, 8: 0.25}, 8),
    ],
)
def test_the_fastest_wins_and_more_threads_must_be_worth_it(
    seconds: dict[int, float], best: int
) -> None:
    asked = []
    found = thread_count(max(seconds), lambda n: asked.append(n) or seconds[n])  # type: ignore[func-returns-value]
    assert found == best
    assert asked == [*seconds] * 4


def test_all_turns_count_but_the_first() -> None:
    """Threads are started in the first; and a number that is fast now and then is not fast."""
    turns = {1: itertools.cycle([1.0]), 2: itertools.cycle([9.0, 0.5, 0.5, 0.5])}
    assert thread_count(2, lambda n: next(turns[n])) == 2
    turns = {1: itertools.cycle([1.0]), 2: itertools.cycle([0.5, 0.5, 4.0, 0.5])}
    assert thread_count(2, lambda n: next(turns[n])) == 1


def test_measuring_leaves_torch_as_it_was() -> None:
    before = torch.get_num_threads()
    assert threads._seconds(2) > 0
    assert torch.get_num_threads() == before


def test_who_has_decided_is_not_overruled(
    set_to: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_seconds", lambda _: pytest.fail("nothing is to be measured"))
    assert use_threads(3) is None
    assert set_to[-1] == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert use_threads(None) is None
    assert set_to == [6, 3]


def test_a_run_goes_on_with_the_threads_that_it_had(set_to: list[int]) -> None:
    assert use_threads(None, earlier=2) is not None
    assert set_to == [6, 2]
    assert use_threads(4, earlier=2) is None
    assert set_to[-1] == 4


@pytest.mark.parametrize(
    ("said", "policy"),
    [
        ({}, "PASSIVE"),
        ({"OMP_WAIT_POLICY": "active"}, "active"),
        ({"GOMP_SPINCOUNT": "7"}, None),
        ({"KMP_BLOCKTIME": "200"}, None),
    ],
)
def test_waiting_threads_sleep_unless_the_user_has_said_how(
    said: dict[str, str], policy: str | None
) -> None:
    environment = dict(said)
    let_waiting_threads_sleep(environment)
    assert environment.get("OMP_WAIT_POLICY") == policy
    assert said.items() <= environment.items()


def test_the_command_line_says_so_before_openmp_is_loaded() -> None:
    """The runtime prints what it has read; options of a method make the command load torch."""
    command = [sys.executable, "-m", "prismquant", "recipe", "validate", "awq-w4a16"]
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        command,
        env=quiet | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "OPENMP DISPLAY ENVIRONMENT" not in done.stderr:
        pytest.skip("this build of torch has no OpenMP")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr.replace("[host] ", "")


# The second look


class Clock:
    """Seconds of the clock and of the processor, as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(time, "process_time", lambda: self.cpu)

    def step(self, pace: Pace, wall: float, cpu: float, kind: str = "block") -> str | None:
        self.wall += wall
        self.cpu += cpu
        return pace.after("layers.3", kind, wall)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_step_that_waits_makes_the_run_look_again(clock: Clock, set_to: list[int]) -> None:
    pace = Pace(6, lambda most: most - 4)
    assert clock.step(pace, 9, 6) is None
    assert clock.step(pace, 40, 6) == (
        "layers.3 took 40 s, 6 s of them on the CPU: 2 instead of 6 threads from here on"
    )
    assert set_to == [6, 2]
    assert clock.step(pace, 40, 6) is None


def test_a_step_that_takes_far_longer_than_its_like_does_too(
    clock: Clock, set_to: list[int]
) -> None:
    """Where another machine takes the cores, seconds of the processor pass all the same."""
    pace = Pace(6, lambda _: 3)
    assert clock.step(pace, 10, 10) is None
    assert clock.step(pace, 40, 40, "head") is None
    assert clock.step(pace, 29, 29) is None
    assert "3 instead of 6" in str(clock.step(pace, 31, 31))
    # What was fast on six threads is no measure any more.
    assert clock.step(pace, 60, 60) is None
    assert set_to == [6, 3]


def test_looking_takes_a_small_part_of_the_time(clock: Clock, set_to: list[int]) -> None:
    looks = []

    def choose(most: int) -> int:
        looks.append(clock.wall)
        clock.wall += 2
        return most

    pace = Pace(6, choose)
    for _ in range(100):
        assert clock.step(pace, 1, 0.1) is None
    assert [b - a for a, b in itertools.pairwise(looks)] == [43.0, 43.0]
    assert looks[0] == 106
    assert set_to == [6]


def test_a_restored_step_is_a_measure_and_no_reason(clock: Clock, set_to: list[int]) -> None:
    pace = Pace(6, lambda _: 1)
    clock.wall += 1
    clock.cpu += 1
    assert pace.after("layers.2", "block", 5.0) is None
    assert "1 instead of 6" in str(clock.step(pace, 16, 16))
    assert set_to == [6, 1]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_change_is_told_on_screen_and_in_the_record(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "_PATIENCE", 0.0)
    monkeypatch.setattr(threads, "_TIMES_CPU", 0.0)
    screen = Console(file=io.StringIO(), width=200)
    reporter = ProgressReporter(screen, Pace(2, lambda most: most))
    result = pq.quantize(
        tiny("qwen2_vl"), "w8a8", tmp_path / "out", calibration_file, reporter=reporter
    )
    assert [step.threads for step in result.record.steps][:3] == [1, 2, 2]
    assert result.record.threads == (1, 2)
    assert screen.file.getvalue().count("2 instead of 1 threads") == 1  # type: ignore[attr-defined]
