"""Second moments of inputs: exact whatever the batches, blind to padding, loud about NaN."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prismquant.algorithms.statistics import HessianRecord
from prismquant.errors import DataError, NumericsError


def whole_numbers(tokens: int, features: int, seed: int) -> torch.Tensor:
    """Inputs whose products add up without rounding, so that equality can be exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (tokens, features), generator=generator).float()


def record_of(*batches: torch.Tensor, dtype: torch.dtype = torch.float32) -> HessianRecord:
    record = HessianRecord(batches[0].shape[1], dtype=dtype)
    for batch in batches:
        record.update(batch)
    return record


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_is_that_of_a_float64_computation(dtype):
    torch.manual_seed(0)
    x = torch.randn(300, 24) * torch.logspace(-2, 2, 24)
    mean = record_of(*x.split(70), dtype=dtype).mean()
    exact = x.double().T @ x.double() / len(x)
    size = exact.diagonal().sqrt()
    assert mean.dtype == torch.float32
    assert float(((mean - exact) / torch.outer(size, size)).abs().max()) < 1e-6
    assert torch.equal(mean, mean.T)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 39), max_size=4))
def test_neither_the_cut_into_batches_nor_their_order_changes_a_bit(seed, cuts):
    x = whole_numbers(40, 6, seed)
    edges = [0, *sorted(set(cuts)), 40]
    batches = [x[a:b] for a, b in itertools.pairwise(edges)]
    shuffled = x[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
    expected = record_of(x).mean()
    assert torch.equal(record_of(*batches).mean(), expected)
    assert torch.equal(record_of(*reversed(batches)).mean(), expected)
    assert torch.equal(record_of(shuffled).mean(), expected)


def test_merging_partial_records_equals_one_record():
    x = whole_numbers(50, 5, 1)
    left, right = record_of(x[:13]), record_of(x[13:])
    left.merge(right)
    assert torch.equal(left.mean(), record_of(x).mean())
    assert left.count == 50
    assert right.count == 37


def test_a_token_of_weight_zero_leaves_no_trace_whatever_it_holds():
    """Padding can hold anything, NaN included; multiplying it by zero would not remove that."""
    torch.manual_seed(2)
    x = torch.randn(20, 4)
    x[[3, 7]] = float("nan")
    x[11] = float("inf")
    kept = torch.ones(20, dtype=torch.bool)
    kept[[3, 7, 11]] = False
    masked = HessianRecord(4)
    masked.update(x, kept)
    dropped = record_of(x[kept])
    assert torch.equal(masked.mean(), dropped.mean())
    assert masked.count == 17


def test_a_weight_counts_like_so_many_copies():
    x = whole_numbers(10, 4, 3)
    times = torch.tensor([0, 1, 2, 3, 1, 1, 0, 2, 4, 1])
    weighted = HessianRecord(4)
    weighted.update(x, times)
    assert torch.equal(weighted.mean(), record_of(x.repeat_interleave(times, dim=0)).mean())
    assert weighted.count == 15


def test_fractional_weights_give_the_weighted_mean():
    torch.manual_seed(4)
    x, weights = torch.randn(64, 5), torch.rand(64)
    record = HessianRecord(5)
    record.update(x, weights)
    exact = (x.double().T * weights.double()) @ x.double() / weights.double().sum()
    torch.testing.assert_close(record.mean(), exact.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    x = torch.full((4096, 2), 1.5, dtype=dtype)
    assert torch.equal(record_of(x).mean(), torch.full((2, 2), 2.25))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(bad):
    record = HessianRecord(3, name="layers.0.mlp.down")
    x = torch.ones(5, 3)
    x[2, 1] = bad
    with pytest.raises(NumericsError, match="index"):
        record.update(x)
    with pytest.raises(NumericsError) as caught:
        record.update(x)
    assert caught.value.where == "layers.0.mlp.down"
    assert record.count == 0


def test_a_sum_beyond_float32_is_refused_in_the_end():
    record = record_of(torch.full((4, 2), 1e19))
    record.update(torch.full((4, 2), 1e19))
    with pytest.raises(NumericsError, match="infinite"):
        record.mean()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_weight_must_be_a_number_from_zero_on(bad):
    with pytest.raises(NumericsError, match="weight"):
        HessianRecord(2).update(torch.ones(2, 2), torch.tensor([1.0, bad]))


def test_no_token_has_no_mean():
    record = HessianRecord(3, name="visual.merger")
    record.update(torch.ones(2, 3), torch.zeros(2))
    record.update(torch.ones(0, 3))
    with pytest.raises(NumericsError, match="no calibration token") as caught:
        record.mean()
    assert caught.value.where == "visual.merger"
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("x", "weights"),
    [(torch.ones(2, 4), None), (torch.ones(3), None), (torch.ones(2, 3), torch.ones(3))],
)
def test_shapes_must_fit(x, weights):
    with pytest.raises(DataError):
        HessianRecord(3).update(x, weights)


def test_records_of_different_widths_do_not_merge():
    with pytest.raises(DataError, match="3 and 4"):
        HessianRecord(3).merge(HessianRecord(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_record_goes_on_where_it_stopped(dtype):
    torch.manual_seed(5)
    x = torch.randn(30, 6)
    whole = record_of(x[:10], x[10:], dtype=dtype)
    saved = record_of(x[:10], dtype=dtype).state_dict()
    restored = HessianRecord.from_state_dict(saved)
    restored.update(x[10:])
    assert torch.equal(restored.mean(), whole.mean())
    assert restored.count == whole.count
    assert torch.equal(saved["sum"], record_of(x[:10], dtype=dtype).state_dict()["sum"])


@pytest.mark.parametrize(
    "state",
    [
        {"sum": torch.zeros(2, 2)},
        {"sum": torch.zeros(2), "count": torch.tensor(1.0)},
        {"sum": torch.zeros(2, 3), "count": torch.tensor(1.0)},
    ],
)
def test_a_damaged_state_is_refused(state):
    with pytest.raises(DataError):
        HessianRecord.from_state_dict(state)
