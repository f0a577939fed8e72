"""Rows of the comparison of automatic recipes: means over calibration sets."""

from __future__ import annotations

from typing import Any

import pytest

from bench.automatic import AUTO, PLAIN, main, rows_of


def cell(loss: float, seconds: float, chosen: str = "") -> dict[str, Any]:
    return {"loss": loss, "error": 0.3, "seconds": seconds, "chosen": chosen}


def test_losses_and_seconds_are_means_over_calibration_sets() -> None:
    """The best is the one with the lowest mean; an automatic recipe may be better than that."""
    done = {
        ("small", "w4a8", PLAIN): cell(4.0, 2.0),
        ("small", "w4a8", PLAIN, 1): cell(6.0, 2.0),
        ("small", "w4a8", AUTO): cell(1.0, 5.0, "awq"),
        ("small", "w4a8", AUTO, 1): cell(2.0, 3.0, "rotation"),
        ("small", "w4a8", "awq"): cell(1.0, 3.0),
        ("small", "w4a8", "awq", 1): cell(4.0, 3.0),
        ("small", "w4a8", "rotation"): cell(3.0, 3.0),
        ("small", "w4a8", "rotation", 1): cell(3.0, 3.0),
    }
    [row] = rows_of(done)
    assert row[:3] == ["small w4a8", "5.00000", "awq"]
    assert row[3] == "2.50000 ± 0.21213"
    assert row[4:] == ["awq, rotation", "1.50000", "0.60", "2.0"]


def test_a_set_that_is_not_finished_is_told_in_no_row() -> None:
    done = {("small", "w4a8", name): cell(1.0, 1.0) for name in (PLAIN, AUTO, "awq")}
    assert len(rows_of(done)) == 1
    assert rows_of(done | {("small", "w4a8", PLAIN, 1): cell(1.0, 1.0)}) == []


def test_several_sets_are_drawn_of_scenes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--seeds", "2", "--calib", "a.jsonl", "--evaluation", "b.jsonl"])
    assert "--seeds is of scenes" in capsys.readouterr().err
