"""ZeroQuant's distillation: how much it gains, and what its learning rates mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_blocks
import torch

from prismquant.algorithms.block_problem import BlockLayer, BlockProblem, block_loss
from prismquant.algorithms.gptq import GPTQ
from prismquant.algorithms.zeroquant import ZeroQuant
from prismquant.errors import RecipeError


@pytest.mark.parametrize(
    ("name", "share"),
    [("int2-g16", 0.4), ("int3-g16", 0.5), ("int4-g16", 0.6), ("int3-channel-asym", 0.6)],
)
def test_few_bits_gain_a_lot_over_rounding_to_nearest(name, share):
    result = ZeroQuant(iterations=100).tune(tiny_blocks.block(name))
    assert result.loss < share * result.start_loss


def test_the_gain_holds_on_inputs_that_were_not_seen():
    seen, unseen = tiny_blocks.draw(0, 16, 64)[:8], tiny_blocks.draw(0, 16, 64)[8:]
    problem = tiny_blocks.block("int2-g16", inputs=seen)
    other = tiny_blocks.block("int2-g16", inputs=unseen)
    result = ZeroQuant(iterations=100).tune(problem)
    before = block_loss(other, [layer.start for layer in problem.layers])
    assert block_loss(other, result.weights) < 0.5 * before


@pytest.mark.parametrize("name", ["int2-g16", "int4-g16", "int3-channel-asym"])
def test_a_start_of_gptq_is_refined(name):
    result = ZeroQuant(iterations=60).tune(tiny_blocks.block(name, solver=GPTQ()))
    assert result.loss < 0.99 * result.start_loss


def scaled_by(problem: BlockProblem, factor: float) -> BlockProblem:
    """The same block with weights in another unit, which its function undoes."""

    def layer(old: BlockLayer) -> BlockLayer:
        start = replace(old.start, scale=old.start.scale * factor)
        return replace(old, weight=old.weight * factor, start=start)

    return replace(
        problem,
        layers=tuple(layer(old) for old in problem.layers),
        output=lambda call, values: problem.output(
            call, {name: value / factor for name, value in values.items()}
        ),
    )


def test_the_unit_of_the_weights_does_not_matter():
    """Powers of two, so that nothing rounds differently: learning rates are relative to scales."""
    problem = tiny_blocks.block()
    tuner = ZeroQuant(iterations=30, settle=10)
    plain, scaled = tuner.tune(problem), tuner.tune(scaled_by(problem, 2.0**-7))
    for one, two in zip(plain.weights, scaled.weights, strict=True):
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scale, two.scale * 2**7)


def test_the_unit_of_the_output_does_not_matter():
    """Errors far below 1 must not drown in Adam's constant."""
    problem = tiny_blocks.block()
    factor = 2.0**-20
    small = replace(
        problem,
        output=lambda call, values: problem.output(call, values) * factor,
        target=lambda call: problem.target(call) * factor,
    )
    tuner = ZeroQuant(iterations=30, settle=10)
    plain, scaled = tuner.tune(problem), tuner.tune(small)
    assert scaled.loss == pytest.approx(plain.loss * factor**2, rel=0.02)


def test_notes_say_what_was_done():
    notes = ZeroQuant(iterations=10, batch=100).tune(tiny_blocks.block()).diagnostics
    assert (notes.iterations, notes.batch, notes.learning_rate) == (10, 8, 0.01)
    assert 0 < notes.changed_codes < 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"learning_rate": 0.0},
        {"range_learning_rate": 1.5},
        {"batch": 0},
        {"settle": -1},
    ],
)
def test_options_out_of_bounds_are_refused_by_name(options):
    with pytest.raises(RecipeError) as caught:
        ZeroQuant(**options)
    assert caught.value.where == next(iter(options))
