"""The helpers of the solver's bench: its problems are real ones, its table divides by the right."""

from __future__ import annotations

import pytest
import torch

from bench.solver.__main__ import OURS, make_case, solve_ours, table_rows


def test_a_case_has_a_hessian_of_correlated_tokens_and_measures_losses_under_it():
    case = make_case(128, (6, 4), 300)
    assert case.title == "128 -> 6 + 4"
    assert torch.equal(case.hessian, case.hessian.T)
    assert case.loss(case.weights) == 0.0
    zeros = [torch.zeros_like(w) for w in case.weights]
    exact = sum(((w @ case.hessian) * w).sum() for w in case.weights)
    assert case.loss(zeros) == pytest.approx(float(exact), rel=1e-4)
    solved = solve_ours(case, *OURS["ours"], 1)
    assert 0 < solved["loss"] < case.loss(zeros)


def test_the_table_divides_by_the_floor_the_best_peer_and_the_least_loss():
    runs = {
        "floor": {"seconds": 2.0, "cpu_seconds": 1.0},
        "ours": {"seconds": 3.0, "cpu_seconds": 1.5, "loss": 10.0},
        "llm-compressor": {"seconds": 9.0, "cpu_seconds": 6.0, "loss": 12.0},
        "gptqmodel": "no environment was named",
    }
    rows = table_rows("8 -> 4", runs)
    assert rows[1] == ["8 -> 4", "ours", "3.00", "1.50", "1.50", "0.25", "1.000"]
    assert rows[2][4:] == ["6.00", "1.00", "1.200"]
    assert rows[3][2].startswith("not run")
