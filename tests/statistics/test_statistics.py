"""What is kept of inputs: the same whatever the batches, blind to padding, loud about NaN."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prismquant.errors import DataError, NumericsError
from prismquant.kernels import moments
from prismquant.kernels.dispatch import compiled_loops, imported, use
from prismquant.numerics.grids import IntGrid
from prismquant.numerics.rules import RangeRule
from prismquant.statistics.channel_max import ChannelMax
from prismquant.statistics.channel_sizes import ChannelSizes
from prismquant.statistics.drift import Drift
from prismquant.statistics.hessian import Hessian
from prismquant.statistics.input_range import InputRange


def whole_numbers(tokens: int, features: int, seed: int) -> torch.Tensor:
    """Inputs whose products add up without rounding, so that equality can be exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (tokens, features), generator=generator).float()


def record_of(*batches: torch.Tensor) -> Hessian:
    record = Hessian(batches[0].shape[1])
    for batch in batches:
        record.update(batch)
    return record


def test_the_mean_is_that_of_a_float64_computation():
    torch.manual_seed(0)
    x = torch.randn(300, 24) * torch.logspace(-2, 2, 24)
    mean = record_of(*x.split(70)).result()
    exact = x.double().T @ x.double() / len(x)
    size = exact.diagonal().sqrt()
    assert mean.dtype == torch.float32
    assert float(((mean - exact) / torch.outer(size, size)).abs().max()) < 1e-6
    assert torch.equal(mean, mean.T)


@pytest.mark.parametrize("features", [1, 511, 512, 513, 1100])
def test_blocks_join_without_a_seam(features):
    """More features than are summed at once, with weights; whole numbers leave no rounding."""
    x = whole_numbers(40, features, 7)
    times = torch.arange(40) % 4
    record = Hessian(features)
    record.update(x[:25], times[:25])
    record.update(x[25:], times[25:])
    exact = (x.double().T * times.double()) @ x.double() / float(times.sum())
    assert torch.equal(record.result(), exact.float())
    assert torch.equal(record.result(), record.result().T)
    assert torch.equal(record.result(), record.result(consume=True))


def test_the_mean_does_not_depend_on_the_order_or_on_who_has_seen_a_batch():
    """To the bit: magnitudes differ by a factor of a million, so that plain sums would not do."""
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(50, 600, generator=generator) * 10.0 ** (n % 4) for n in range(12)]
    expected = record_of(*batches).result()
    plain = [sum(b.T @ b for b in order) for order in (batches, batches[::-1])]
    assert not torch.equal(*plain)
    assert torch.equal(record_of(*batches[::-1]).result(), expected)
    for ranks in (2, 3, 4):
        records = [record_of(*batches[rank::ranks]) for rank in range(ranks)]
        for other in records[1:]:
            records[0].merge(other)
        assert torch.equal(records[0].result(), expected)


@pytest.mark.skipif(compiled_loops("cpu_moments") is None, reason="there is no numba that works")
@pytest.mark.parametrize("features", [1, 40, 600, 1024, 1100])
def test_compiled_sums_have_the_bits_of_torch_alone(features):
    """What rounding took from the sums included."""
    generator = torch.Generator().manual_seed(features)
    batches = [torch.randn(30, features, generator=generator) * 10.0 ** (n % 4) for n in range(5)]
    compiled = record_of(*batches)
    compiled.merge(record_of(*batches[1:]))
    with use("torch"):
        plain = record_of(*batches)
        plain.merge(record_of(*batches[1:]))
    state = plain.state_dict()
    assert all(torch.equal(part, state[name]) for name, part in compiled.state_dict().items())
    assert torch.equal(compiled.result(), plain.result())


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 5), columns=st.integers(1, 40))
def test_a_sum_and_what_rounding_took_from_it_are_exact(seed, rows, columns):
    """Of one addition; parts of larger matrices, contiguous or not."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2 * rows, 50, generator=generator) * 10**k for k in (0, 6))
    for x, y in ((a, b), (b, a), (a.T.contiguous().T, b)):
        high, low, term = (m[rows:, 3 : 3 + columns] for m in (x.clone(), 0 * x, y.clone()))
        exact = high.double() + term.double()
        moments.two_sum(high, low, term)
        assert torch.equal(high.double() + low.double(), exact)
        assert torch.equal(high, exact.float())


def test_without_a_compiler_sums_go_on_in_torch(monkeypatch):
    x = torch.randn(20, 70)
    expected = record_of(x).result()
    imported.cache_clear()
    monkeypatch.delitem(sys.modules, "prismquant.kernels.cpu_moments", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    try:
        assert compiled_loops("cpu_moments") is None
        assert torch.equal(record_of(x).result(), expected)
    finally:
        imported.cache_clear()


class Rank:
    """One of two processes that share in turns: the first only hands over what it has.

    Attributes:
        sums: What was handed over to be summed, in order.
        parts: What was handed over to be gathered, in order.
    """

    size = 2

    def __init__(self, first=None):
        self.first, self.sums, self.parts = first, [], []

    def sum_(self, x):
        self.sums.append(x.clone())
        if self.first is not None:
            x.add_(self.first.sums[len(self.sums) - 1])

    def gather(self, tensors):
        self.parts.append({name: x.clone() for name, x in tensors.items()})
        other = self if self.first is None else self.first
        return [other.parts[len(self.parts) - 1], self.parts[-1]]


def share_among(one, other):
    """Let one statistic take in what the other, of an earlier process, has seen."""
    earlier = Rank()
    other.share(earlier)
    one.share(Rank(earlier))


def test_channel_maxima_and_drifts_over_processes_are_those_of_one():
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(40, 6, generator=generator) for _ in range(8)]
    weights = torch.ones(40)
    weights[::3] = 0
    whole, one, other = (ChannelMax(6) for _ in range(3))
    for number, x in enumerate(batches):
        whole.update(x, weights)
        (one if number % 2 else other).update(x, weights)
    share_among(one, other)
    assert torch.equal(one.result(), whole.result())
    kept = torch.cat([x[weights > 0] for x in batches])
    assert torch.equal(whole.result(), kept.abs().amax(0))
    first, second, third = (Drift(6) for _ in range(3))
    for x in batches:
        first.update(x, 2 * x, weights)
        second.update(x, 2 * x, weights)
    for x in batches:
        third.update(x, 2 * x, weights)
    share_among(first, second)
    assert first.count == 2 * third.count
    torch.testing.assert_close(first.result(), third.result())
    for mine, theirs in zip(first.drifts, third.drifts, strict=True):
        torch.testing.assert_close(mine, 2 * theirs)


def test_ranges_over_processes_are_those_of_one():
    x = torch.randn(300, generator=torch.Generator().manual_seed(6)) * 5
    whole, one, other = (InputRange() for _ in range(3))
    whole.update(x)
    other.update(x[:100])
    one.update(x[100:])
    share_among(one, other)
    for kind in ("minmax", "percentile", "mse"):
        rule = RangeRule(kind)
        assert one.result(rule, IntGrid(8), False) == whole.result(rule, IntGrid(8), False)
    # One that has seen nothing changes nothing.
    share_among(one, InputRange())
    assert one.count == whole.count


def test_sums_over_processes_are_those_of_one():
    generator = torch.Generator().manual_seed(4)
    batches = [torch.randn(50, 600, generator=generator) * 10.0 ** (n % 3) for n in range(6)]
    one, other = record_of(*batches[::2]), record_of(*batches[1::2])
    share_among(one, other)
    assert one.count == 300
    assert torch.equal(one.result(), record_of(*batches).result())


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 39), max_size=4))
def test_neither_the_cut_into_batches_nor_their_order_changes_a_bit(seed, cuts):
    x = whole_numbers(40, 6, seed)
    edges = [0, *sorted(set(cuts)), 40]
    batches = [x[a:b] for a, b in itertools.pairwise(edges)]
    shuffled = x[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
    expected = record_of(x).result()
    assert torch.equal(record_of(*batches).result(), expected)
    assert torch.equal(record_of(*reversed(batches)).result(), expected)
    assert torch.equal(record_of(shuffled).result(), expected)


def test_merging_partial_records_equals_one_record():
    x = whole_numbers(50, 5, 1)
    left, right = record_of(x[:13]), record_of(x[13:])
    left.merge(right)
    assert torch.equal(left.result(), record_of(x).result())
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
    masked = Hessian(4)
    masked.update(x, kept)
    dropped = record_of(x[kept])
    assert torch.equal(masked.result(), dropped.result())
    assert masked.count == 17


def test_a_weight_counts_like_so_many_copies():
    x = whole_numbers(10, 4, 3)
    times = torch.tensor([0, 1, 2, 3, 1, 1, 0, 2, 4, 1])
    weighted = Hessian(4)
    weighted.update(x, times)
    assert torch.equal(weighted.result(), record_of(x.repeat_interleave(times, dim=0)).result())
    assert weighted.count == 15


def test_fractional_weights_give_the_weighted_mean():
    torch.manual_seed(4)
    x, weights = torch.randn(64, 5), torch.rand(64)
    record = Hessian(5)
    record.update(x, weights)
    exact = (x.double().T * weights.double()) @ x.double() / weights.double().sum()
    torch.testing.assert_close(record.result(), exact.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    x = torch.full((4096, 2), 1.5, dtype=dtype)
    assert torch.equal(record_of(x).result(), torch.full((2, 2), 2.25))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(bad):
    record = Hessian(3, name="layers.0.mlp.down")
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
        record.result()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_weight_must_be_a_number_from_zero_on(bad):
    with pytest.raises(NumericsError, match="weight"):
        Hessian(2).update(torch.ones(2, 2), torch.tensor([1.0, bad]))


def test_no_token_has_no_mean():
    record = Hessian(3, name="visual.merger")
    record.update(torch.ones(2, 3), torch.zeros(2))
    record.update(torch.ones(0, 3))
    with pytest.raises(NumericsError, match="no calibration token") as caught:
        record.result()
    assert caught.value.where == "visual.merger"
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("x", "weights"),
    [(torch.ones(2, 4), None), (torch.ones(3), None), (torch.ones(2, 3), torch.ones(3))],
)
def test_shapes_must_fit(x, weights):
    with pytest.raises(DataError):
        Hessian(3).update(x, weights)


def test_records_of_different_widths_do_not_merge():
    with pytest.raises(DataError, match="3 and 4"):
        Hessian(3).merge(Hessian(4))


def test_a_saved_record_goes_on_where_it_stopped():
    torch.manual_seed(5)
    x = torch.randn(30, 6)
    whole = record_of(x[:10], x[10:])
    saved = record_of(x[:10]).state_dict()
    restored = Hessian.from_state_dict(saved)
    restored.update(x[10:])
    assert torch.equal(restored.result(), whole.result())
    assert restored.count == whole.count
    assert torch.equal(saved["sum"], record_of(x[:10]).state_dict()["sum"])


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
        Hessian.from_state_dict(state)


# --- channels ---------------------------------------------------------------------------------


def tokens_of(count: int, features: int = 5, seed: int = 0):
    """Inputs, weights (some 0) and vision marks."""
    generator = torch.Generator().manual_seed(seed)
    return (
        whole_numbers(count, features, seed),
        torch.randint(0, 4, (count,), generator=generator).float(),
        torch.rand(count, generator=generator) < 0.6,
    )


def channels_of(*batches, sample: int = 2048) -> ChannelSizes:
    record = ChannelSizes(batches[0][0].shape[1], sample=sample)
    for batch in batches:
        record.update(*batch)
    return record


def assert_same(left: ChannelSizes, right: ChannelSizes) -> None:
    for name in ("absmax", "absmean", "counts", "inputs", "token_weights", "vision"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def test_channel_sizes_are_those_of_each_modality():
    x, weights, vision = tokens_of(80)
    record = channels_of((x, weights, vision))
    for modality, marks in enumerate((~vision, vision)):
        mine = marks & (weights > 0)
        rows, costs = x[mine].double(), weights[mine].double()
        assert torch.equal(record.absmax[modality], x[mine].abs().amax(0))
        assert torch.equal(record.low[modality], x[mine].amin(0).clamp(max=0))
        assert torch.equal(record.high[modality], x[mine].amax(0).clamp(min=0))
        assert float(record.counts[modality]) == float(costs.sum())
        mean = (rows.abs() * costs.unsqueeze(1)).sum(0) / costs.sum()
        torch.testing.assert_close(record.absmean[modality].double(), mean, rtol=1e-6, atol=0)


def test_a_small_input_is_kept_whole_but_for_its_padding():
    x, weights, vision = tokens_of(40)
    record = channels_of((x, weights, vision))
    assert torch.equal(record.inputs, x[weights > 0])
    assert torch.equal(record.token_weights, weights[weights > 0])
    assert torch.equal(record.vision, vision[weights > 0])


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    sample=st.integers(1, 50),
    cuts=st.lists(st.integers(1, 99), max_size=6),
)
def test_the_sample_does_not_depend_on_the_cut_into_batches(seed, sample, cuts):
    parts = tokens_of(100, seed=seed)
    edges = [0, *sorted(set(cuts)), 100]
    batches = [tuple(part[a:b] for part in parts) for a, b in itertools.pairwise(edges)]
    record = channels_of(*batches, sample=sample)
    assert_same(record, channels_of(parts, sample=sample))
    assert len(record.inputs) == min(sample, int((parts[1] > 0).sum()))


@pytest.mark.parametrize("length", [16, 100, 257, 1024])
def test_the_sample_is_even_over_the_order_and_over_positions_in_a_sequence(length):
    """A stride would meet the same positions of equally long sequences again and again."""
    count, sample = 16384, 512
    record = ChannelSizes(1, sample=sample)
    record.update(torch.arange(count).float().unsqueeze(1))
    index = record.inputs.flatten()
    assert bool((index.diff() > 0).all())
    assert float(index.diff().max()) < 3 * count / sample
    first_quarter = (index % length < length / 4).float().mean()
    assert abs(float(first_quarter) - 0.25) < 0.06


def test_merged_channel_records_hold_the_sizes_of_all_tokens():
    parts = tokens_of(90, seed=1)
    left = channels_of(tuple(part[:30] for part in parts))
    right = channels_of(tuple(part[30:] for part in parts))
    left.merge(right)
    assert_same(left, channels_of(parts))
    assert len(right.inputs) < len(left.inputs)


def test_a_merged_sample_takes_from_both_in_proportion():
    few, many = ChannelSizes(1, sample=400), ChannelSizes(1, sample=400)
    few.update(torch.zeros(1000, 1))
    many.update(torch.ones(3000, 1))
    few.merge(many)
    assert len(few.inputs) == 400
    assert abs(float(few.inputs.mean()) - 0.75) < 0.02
    # Later tokens are chosen by their place among all.
    few.update(torch.full((4000, 1), 2.0))
    assert abs(float((few.inputs == 2).float().mean()) - 0.5) < 0.02


def test_padding_leaves_no_trace_in_channels_whatever_it_holds():
    x, weights, vision = tokens_of(30, seed=2)
    kept = weights > 0
    filled = x.clone()
    filled[~kept] = float("nan")
    assert_same(
        channels_of((filled, weights, vision)), channels_of((x[kept], weights[kept], vision[kept]))
    )


def test_without_marks_all_tokens_are_text():
    x, weights, _ = tokens_of(20)
    record = channels_of((x, weights))
    assert not bool(record.vision.any())
    assert record.counts.tolist() == [float(weights.sum()), 0.0]
    assert not bool(record.absmax[1].any())
    assert not bool(record.absmean[1].any())


def test_a_channel_record_of_nothing_is_all_zero():
    record = ChannelSizes(3)
    record.update(torch.ones(0, 3))
    record.update(torch.ones(2, 3), torch.zeros(2), torch.ones(2, dtype=torch.bool))
    assert record.inputs.shape == (0, 3)
    assert not bool(record.absmax.any())
    assert not bool(record.absmean.any())


def test_half_precision_inputs_are_kept_in_float32():
    record = ChannelSizes(2)
    record.update(torch.full((3, 2), 1.5, dtype=torch.bfloat16))
    assert record.inputs.dtype == torch.float32
    assert record.absmean[0].tolist() == [1.5, 1.5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_channels_refuse_what_is_not_finite_by_name(bad):
    record = ChannelSizes(3, "layers.0.mlp")
    x = torch.ones(4, 3)
    x[1, 2] = bad
    with pytest.raises(NumericsError, match="index") as caught:
        record.update(x)
    assert caught.value.where == "layers.0.mlp"
    assert not bool(record.counts.any())
    with pytest.raises(NumericsError, match="weight"):
        record.update(torch.ones(1, 3), torch.tensor([bad]))


@pytest.mark.parametrize(
    ("x", "weights", "vision"),
    [
        (torch.ones(2, 4), None, None),
        (torch.ones(3), None, None),
        (torch.ones(2, 3), torch.ones(3), None),
        (torch.ones(2, 3), None, torch.ones(3, dtype=torch.bool)),
    ],
)
def test_shapes_of_channels_must_fit(x, weights, vision):
    with pytest.raises(DataError):
        ChannelSizes(3).update(x, weights, vision)


def test_channel_records_of_different_widths_do_not_merge():
    with pytest.raises(DataError, match="3 and 4"):
        ChannelSizes(3).merge(ChannelSizes(4))


def test_a_sample_of_nothing_is_refused():
    with pytest.raises(DataError, match="empty"):
        ChannelSizes(3, sample=0)
