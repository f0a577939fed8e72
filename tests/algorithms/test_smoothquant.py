"""SmoothQuant: the paper's formula, a search that never harms, and what text and vision decide."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismquant.algorithms.output_error import output_error
from prismquant.algorithms.smooth_edge import Consumer, EdgeProblem
from prismquant.algorithms.smoothquant import SmoothQuant
from prismquant.errors import RecipeError
from prismquant.formats.spec import spec
from prismquant.numerics.ranges import RangeRule
from prismquant.statistics.channel_sizes import ChannelSizes

SIZE = 32


def problem(
    weights: str | None = "int8-channel",
    activations: str | None = "int8-token",
    *,
    seed: int = 0,
    outlier: float = 50.0,
    vision: float = 0.5,
    tile: int = 1,
    dead: int | None = None,
) -> EdgeProblem:
    """Inputs with outliers in two channels: one of all tokens, one of vision tokens alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, SIZE * tile, generator=generator)
    marks = torch.rand(300, generator=generator) < vision
    x[:, 3] *= outlier
    x[:, 5] = torch.where(marks, x[:, 5] * 4 * outlier, x[:, 5])
    if dead is not None:
        x[:, dead] = 0.0
    record = ChannelSizes(SIZE * tile)
    record.update(x, None, marks)
    form = None if weights is None else spec(weights)
    sizes = torch.exp(0.5 * torch.randn(SIZE * tile, generator=generator))
    return EdgeProblem(
        "norm",
        SIZE,
        torch.arange(SIZE).repeat(tile),
        tuple(
            Consumer(name, torch.randn(rows, SIZE * tile, generator=generator) * sizes, form)
            for name, rows in (("gate", 24), ("up", 16))
        ),
        None if activations is None else spec(activations),
        RangeRule(),
        torch.bfloat16,
        record,
    )


def by_formula(task: EdgeProblem, alpha: float, inputs: Tensor | None = None) -> Tensor:
    """Equation 4 of the paper, in float64, up to the common factor."""
    weights = torch.cat([r.weight for r in task.consumers]).double().abs().amax(0)
    inputs = task.record.inputs.double().abs().amax(0) if inputs is None else inputs.double()

    def channels(values: Tensor) -> Tensor:
        return values.view(-1, SIZE).amax(0)

    scale = channels(inputs) ** alpha / channels(weights) ** (1 - alpha)
    return (scale / (scale.max() * scale.min()).sqrt()).float()


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.5, 1.0])
def test_scales_are_those_of_the_paper(alpha, tile):
    task = problem(tile=tile)
    result = SmoothQuant(alpha=alpha, search=False).fit(task)
    torch.testing.assert_close(result.scale, by_formula(task, alpha), rtol=1e-5, atol=0)
    assert result.scale.dtype == torch.float32
    assert result.diagnostics.choice.alpha == alpha
    assert result.diagnostics.error_after == pytest.approx(
        output_error(task, result.scale), rel=1e-6
    )


def test_a_strength_that_is_given_is_taken() -> None:
    """Without a word on the search; a search beside it contradicts it."""
    task = problem()
    given, searched = SmoothQuant(alpha=0.1), SmoothQuant()
    assert (given.searches, searched.searches, SmoothQuant(search=False).searches) == (0, 1, 0)
    scales = [method.fit(task).scale for method in (given, SmoothQuant(alpha=0.9))]
    torch.testing.assert_close(scales[0], by_formula(task, 0.1), rtol=1e-5, atol=0)
    torch.testing.assert_close(scales[1], by_formula(task, 0.9), rtol=1e-5, atol=0)
    half = SmoothQuant(search=False).fit(task)
    assert half.diagnostics.choice.alpha == 0.5
    with pytest.raises(RecipeError, match=r"alpha 0\.5 is given, but search: true chooses it"):
        SmoothQuant(alpha=0.5, search=True)


def test_outliers_of_a_static_input_cost_far_less_after_it():
    for activations in ("int8-tensor", "int8-token"):
        notes = SmoothQuant().fit(problem(activations=activations)).diagnostics
        assert notes.error_after < 0.3 * notes.error_before


def test_the_search_finds_the_best_strength_of_its_grid():
    task = problem("int4-channel", "int8-tensor")
    errors = {
        step / 8: output_error(task, SmoothQuant(step / 8, search=False).fit(task).scale)
        for step in range(9)
    }
    result = SmoothQuant(grid=8).fit(task)
    assert result.diagnostics.choice.alpha == min(errors, key=errors.__getitem__)
    assert result.diagnostics.error_after == pytest.approx(min(errors.values()), rel=1e-6)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    weights=st.sampled_from([None, "int4-g8", "int3-channel", "int8-tensor"]),
    activations=st.sampled_from([None, "int8-token", "int8-tensor", "int4-token-asym"]),
    power_of_two=st.booleans(),
    rows=st.sampled_from([2, 100]),
)
def test_the_search_is_never_worse_than_no_scaling(seed, weights, activations, power_of_two, rows):
    task = problem(weights, activations, seed=seed, outlier=1.0 + seed % 5)
    result = SmoothQuant(grid=4, rows=rows, power_of_two=power_of_two).fit(task)
    if result.scale is None:
        assert result.diagnostics.skipped
    else:
        assert output_error(task, result.scale) < output_error(task, None)


def test_a_strength_that_can_only_harm_is_refused_by_the_search_and_obeyed_without():
    """The weight is on its grid already: a scale can only take it off."""
    generator = torch.Generator().manual_seed(0)
    record = ChannelSizes(16)
    record.update(torch.randn(40, 16, generator=generator))
    weight = torch.randint(-127, 128, (8, 16), generator=generator).float()
    weight[:, 0] = 127.0
    task = EdgeProblem(
        "n",
        16,
        torch.arange(16),
        (Consumer("r", weight, spec("int8-channel-narrow")),),
        None,
        RangeRule(),
        torch.float32,
        record,
    )
    assert output_error(task, None) < 1e-12
    assert SmoothQuant().fit(task).scale is None
    forced = SmoothQuant(alpha=0.5, search=False).fit(task)
    assert forced.scale is not None
    assert forced.diagnostics.error_after > 1e-6


def test_scales_that_are_all_one_are_an_exact_no_op():
    record = ChannelSizes(8)
    record.update(torch.full((5, 8), 3.0))
    weights = (Consumer("r", torch.full((4, 8), -0.7), spec("int8-channel")),)
    task = EdgeProblem("n", 8, torch.arange(8), weights, None, RangeRule(), torch.float32, record)
    for method in (SmoothQuant(search=False), SmoothQuant()):
        result = method.fit(task)
        assert result.scale is None
        assert result.diagnostics.skipped


@pytest.mark.parametrize("search", [True, False])
def test_a_channel_that_is_never_active_keeps_its_scale(search):
    result = SmoothQuant(search=search).fit(problem(dead=7))
    assert float(result.scale[7]) == 1
    assert bool(torch.isfinite(result.scale).all())
    assert bool((result.scale > 0).all())


def test_a_channel_that_no_weight_reads_keeps_its_scale():
    task = problem()
    for consumer in task.consumers:
        consumer.weight[:, 9] = 0.0
    assert float(SmoothQuant(search=False).fit(task).scale[9]) == 1


def test_each_modality_can_decide_alone():
    task = problem()
    record = task.record
    for modality, rows in (("text", ~record.vision), ("vision", record.vision)):
        inputs = record.inputs[rows].abs().amax(0)
        result = SmoothQuant(search=False, modality=modality).fit(task)
        torch.testing.assert_close(result.scale, by_formula(task, 0.5, inputs), rtol=1e-5, atol=0)
        assert result.diagnostics.choice.modality == modality
    # The outlier of the vision tokens is none to the text.
    text, vision, both = (
        SmoothQuant(search=False, modality=m).fit(task).scale for m in ("text", "vision", "max")
    )
    assert float(vision[5] / vision[0]) > 5 * float(text[5] / text[0])
    assert float(both[5] / both[3]) > float(text[5] / text[3])


@pytest.mark.parametrize(("share", "only"), [(0.0, "text"), (1.0, "vision")])
@pytest.mark.parametrize("modality", ["max", "text", "vision"])
def test_where_a_modality_has_no_tokens_the_other_decides(modality, share, only):
    task = problem(vision=share)
    result = SmoothQuant(search=False, modality=modality).fit(task)
    torch.testing.assert_close(result.scale, by_formula(task, 0.5), rtol=1e-5, atol=0)
    assert result.diagnostics.choice.modality == only


def test_a_percentile_stands_for_the_largest_magnitude():
    task = problem(vision=0.0)
    inputs = task.record.inputs.abs().kthvalue(math.ceil(0.9 * 300), dim=0).values
    result = SmoothQuant(search=False, percentile=0.9).fit(task)
    torch.testing.assert_close(result.scale, by_formula(task, 0.5, inputs), rtol=1e-5, atol=0)


def test_a_modality_that_the_sample_missed_still_counts_by_its_maximum():
    record = ChannelSizes(4, sample=1)
    record.update(torch.tensor([[100.0, 1, 1, 1]]), None, torch.tensor([True]))
    record.update(torch.ones(1, 4))
    assert not bool(record.vision.any())
    consumer = Consumer("r", torch.ones(2, 4), spec("int8-channel"))
    how = (None, RangeRule(), torch.float32)
    task = EdgeProblem("n", 4, torch.arange(4), (consumer,), *how, record)
    scale = SmoothQuant(search=False, percentile=0.9).fit(task).scale
    assert float(scale[0] / scale[1]) == pytest.approx(10)


def test_powers_of_two_fold_without_rounding():
    task = problem()
    result = SmoothQuant(search=False, power_of_two=True).fit(task)
    assert bool((torch.frexp(result.scale).mantissa == 0.5).all())
    ratio = result.scale / by_formula(task, 0.5)
    assert float(ratio.max()) <= 2**0.5 * 1.001
    assert float(ratio.min()) >= 2**-0.5 * 0.999
    weight = task.consumers[0].weight.bfloat16()
    assert torch.equal(weight * result.scale.bfloat16() / result.scale.bfloat16(), weight)


def test_scales_are_bounded():
    result = SmoothQuant(alpha=1.0, search=False, max_scale=4.0).fit(problem(outlier=1e4))
    assert float(result.scale.max()) <= 4
    assert float(result.scale.min()) >= 0.25


def test_the_weight_of_vision_tokens_reaches_the_measure():
    task = problem("int4-channel", "int8-tensor")
    deaf, fond = (SmoothQuant(vision_weight=w).fit(task).diagnostics for w in (0.0, 100.0))
    assert deaf.error_before != fond.error_before


def test_edges_without_tokens_or_formats_are_skipped_with_the_reason():
    assert "quantized" in SmoothQuant().fit(problem(None, None)).diagnostics.skipped
    task = problem()
    empty = EdgeProblem(**{**vars(task), "record": ChannelSizes(SIZE)})
    result = SmoothQuant(search=False).fit(empty)
    assert result.scale is None
    assert "calibration" in result.diagnostics.skipped


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"alpha": math.nan},
        {"grid": 0},
        {"percentile": 0.5},
        {"percentile": 1.01},
        {"modality": "audio"},
        {"vision_weight": -1.0},
        {"vision_weight": math.inf},
        {"rows": 0},
        {"max_scale": 1.0},
        {"max_scale": math.inf},
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, Any]):
    with pytest.raises(RecipeError, match=next(iter(options))):
        SmoothQuant(**options)
