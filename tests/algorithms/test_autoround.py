"""AutoRound: how much it gains, how far it may move, and that it refines what solvers found."""

from __future__ import annotations

import pytest
import tiny_blocks
import torch

from prismquant.algorithms.autoround import AutoRound
from prismquant.algorithms.block_problem import block_loss
from prismquant.algorithms.gptq import GPTQ
from prismquant.errors import RecipeError


@pytest.mark.parametrize(
    ("name", "share"), [("int2-g16", 0.4), ("int3-g16", 0.55), ("int3-channel-asym", 0.6)]
)
def test_few_bits_gain_a_lot_over_rounding_to_nearest(name, share):
    result = AutoRound(iterations=100).tune(tiny_blocks.block(name))
    assert result.loss < share * result.start_loss


def test_the_gain_holds_on_inputs_that_were_not_seen():
    seen, unseen = tiny_blocks.draw(0, 16, 64)[:8], tiny_blocks.draw(0, 16, 64)[8:]
    problem = tiny_blocks.block("int2-g16", inputs=seen)
    other = tiny_blocks.block("int2-g16", inputs=unseen)
    result = AutoRound(iterations=100).tune(problem)
    before = block_loss(other, [layer.start for layer in problem.layers])
    assert block_loss(other, result.weights) < 0.5 * before


@pytest.mark.parametrize("name", ["int2-g16", "int3-g16", "int4-g16", "int3-channel-asym"])
def test_a_start_of_gptq_is_refined(name):
    """Its codes compensate one another, so rounding may not gain, but scales always do."""
    result = AutoRound(iterations=60).tune(tiny_blocks.block(name, solver=GPTQ()))
    assert result.loss < 0.99 * result.start_loss


def test_letting_scales_settle_gains_beyond_rounding():
    problem = tiny_blocks.block("int3-g16")
    rough = AutoRound(iterations=60, settle=0).tune(problem)
    settled = AutoRound(iterations=60).tune(problem)
    assert settled.diagnostics.tuned_loss == rough.loss
    assert settled.loss < 0.97 * rough.loss


@pytest.mark.parametrize("solver", [None, GPTQ()], ids=["rtn", "gptq"])
def test_offsets_stay_within_half_a_step_of_the_weight_or_of_the_start(solver):
    """Whatever the learning rate, each code lies between the start and the weight's neighbours."""
    problem = tiny_blocks.block("int4-channel", solver=solver)
    tuner = AutoRound(iterations=20, learning_rate=0.5, learn_range=False)
    result = tuner.tune(problem)
    moved = 0
    for layer, quantized in zip(problem.layers, result.weights, strict=True):
        place = layer.weight.double() / layer.start.scale.double()
        start, codes = layer.start.codes.double(), quantized.codes.double()
        low = torch.minimum(start, place.floor()).clamp(-8, 7)
        high = torch.maximum(start, place.ceil()).clamp(-8, 7)
        assert bool(((codes >= low) & (codes <= high)).all())
        moved += int((codes != start).sum())
    assert moved > 0 or result.diagnostics.kept_start_codes == 1


def test_the_rate_of_the_first_step_is_one_over_the_iterations_unless_given():
    problem = tiny_blocks.block(calls=2, tokens=8)
    assert AutoRound(iterations=8, settle=0).tune(problem).diagnostics.learning_rate == 1 / 8
    given = AutoRound(iterations=8, settle=0, learning_rate=0.01).tune(problem)
    assert given.diagnostics.learning_rate == 0.01


def test_notes_say_what_was_done():
    notes = AutoRound(iterations=60, batch=100).tune(tiny_blocks.block()).diagnostics
    assert (notes.iterations, notes.batch) == (60, 8)
    assert 0 < notes.changed_codes < 0.5
    assert 0 < notes.changed_scales <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"learning_rate": 0.0},
        {"learning_rate": 2.0},
        {"range_learning_rate": 0.0},
        {"batch": 0},
        {"settle": -1},
        {"momentum": 1.0},
        {"momentum": -0.1},
    ],
)
def test_options_out_of_bounds_are_refused_by_name(options):
    with pytest.raises(RecipeError) as caught:
        AutoRound(**options)
    assert caught.value.where == next(iter(options))
