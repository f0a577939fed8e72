"""Descent on a block's latent weights, then on its scales alone; the better codes are kept.

Since many codes flip at once, descent may lose what a solver like GPTQ gained by choosing one code
after another. A second phase therefore keeps the better codes of the two and moves only scales,
whose gradients are exact; it gains from any start. What is returned is never worse than the start,
measured over all calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prismquant.algorithms.block_problem import (
    BlockProblem,
    BlockResult,
    block_loss,
    call_error,
    starting_loss,
)
from prismquant.algorithms.latent_weight import LEAST_FACTOR, Latent, Scaled, Trainable
from prismquant.diagnostics.tuning_diagnostics import TuningDiagnostics
from prismquant.formats.quantized_layer import QuantizedTensor

# Gradients come in units of the start's loss, so they stay far above this.
ADAM_EPSILON = 1e-15
# What scales move at first in the second phase, as a fraction: a step of bfloat16 or less.
_SCALE_RATE = 0.004


def schedule_bounds(
    iterations: int, batch: int, settle: int, seed: int
) -> dict[str, tuple[bool, str]]:
    """Bounds of the options that all tuners have, for :func:`prismquant.errors.check_bounds`."""
    return {
        "iterations": (1 <= iterations <= 100_000, "from 1 to 100000"),
        "batch": (1 <= batch <= 4096, "from 1 to 4096 calls"),
        "settle": (0 <= settle <= 100_000, "from 0 to 100000"),
        "seed": (-(2**63) <= seed < 2**63, "an integer of 64 bits"),
    }


def idle_without_ranges() -> dict[str, str]:
    """Options of tuners that change nothing where ranges are not learned, and why."""
    return dict.fromkeys(("settle", "range_learning_rate"), "learn_range is false")


@dataclass(frozen=True)
class Schedule:
    """Schedule of a descent: its steps, and the calls that each sees.

    Attributes:
        iterations: Steps.
        batch: Calls that a step sees; all of them where there are fewer.
        seed: Of the order of calls.
    """

    iterations: int
    batch: int
    seed: int

    def batches(self, calls: int) -> Iterator[list[int]]:
        """Calls that each step sees: every call once before any comes again.

        Args:
            calls: How many there are.

        Yields:
            Indices of calls, distinct within a batch.
        """
        generator = torch.Generator().manual_seed(self.seed)
        size = min(self.batch, calls)
        queue: list[int] = []
        for _ in range(self.iterations):
            if len(queue) < size:
                fresh: list[int] = torch.randperm(calls, generator=generator).tolist()
                # What is left of the last round comes first, and only once in this batch.
                late = [call for call in fresh if call in queue[:size]]
                queue += [call for call in fresh if call not in late] + late
            yield queue[:size]
            queue = queue[size:]


def refine(
    problem: BlockProblem,
    latents: Sequence[Latent],
    schedule: Schedule,
    settle: Schedule,
    step: Callable[[float], None],
    diagnostics: TuningDiagnostics,
) -> BlockResult:
    """Measure the start, descend, keep the best: all of a tuner but its own step.

    Args:
        problem: The block.
        latents: One for each of its layers, at the start.
        schedule: Of the descent.
        settle: Of the phase after it, see :func:`conclude`.
        step: As for :func:`descend`.
        diagnostics: Those that the tuner knows itself.

    Returns:
        The best weights, and all diagnostics.

    Raises:
        NumericsError: The start's loss is not finite.
        FormatError: Outputs, targets and token weights do not fit one another.
    """
    start_loss = starting_loss(problem)
    done = descend(problem, latents, schedule, start_loss, step) if start_loss > 0 else 0
    batch = min(schedule.batch, problem.calls)
    tuned = [latent.quantized() for latent in latents]
    known = replace(diagnostics, iterations=done, batch=batch)
    return conclude(problem, start_loss, tuned, settle, known)


def descend(
    problem: BlockProblem,
    trainables: Sequence[Trainable],
    schedule: Schedule,
    unit: float,
    step: Callable[[float], None],
) -> int:
    """Take steps on the gradient of the loss.

    Args:
        problem: The block.
        trainables: One for each of its layers.
        schedule: How many steps, and on which calls.
        unit: The loss in units of which gradients are given, above zero: the start's.
        step: Moves the trainables by the gradients that they hold; is given what is left of the
            descent, from 1 down.

    Returns:
        Steps taken: fewer than planned when the loss is no longer finite.
    """
    done = 0
    for calls in schedule.batches(problem.calls):
        if not math.isfinite(_accumulate(problem, trainables, calls, unit)):
            break
        step(1 - done / schedule.iterations)
        done += 1
    return done


def conclude(
    problem: BlockProblem,
    start_loss: float,
    tuned: Sequence[QuantizedTensor],
    settle: Schedule,
    diagnostics: TuningDiagnostics,
) -> BlockResult:
    """Keep the better of start and tuned weights over all calls, then let their scales settle.

    Args:
        problem: The block.
        start_loss: The start's loss.
        tuned: What the first phase found, one for each layer.
        settle: Of the second phase; no iterations leave it out.
        diagnostics: What is known of the first phase.

    Returns:
        The best weights, and all diagnostics.
    """
    start = tuple(layer.start for layer in problem.layers)
    tuned_loss = block_loss(problem, tuned)
    # Written so that a loss that is not a number loses.
    kept = not tuned_loss < start_loss
    weights, loss = (start, start_loss) if kept else (tuple(tuned), tuned_loss)
    settled_loss = None
    if settle.iterations and loss > 0:
        settled = _tune_scales(problem, weights, settle, loss)
        settled_loss = block_loss(problem, settled)
        if settled_loss < loss:
            weights, loss = settled, settled_loss
    pairs = list(zip(start, weights, strict=True))
    scales = [(a.scale.to(torch.float32), b.scale.to(torch.float32)) for a, b in pairs]
    told = replace(
        diagnostics,
        loss_before=start_loss,
        loss=loss,
        tuned_loss=tuned_loss,
        kept_start_codes=kept,
        settled_loss=settled_loss,
        changed_codes=_changed([(a.codes, b.codes) for a, b in pairs]),
        changed_scales=_changed(scales),
    )
    return BlockResult(weights, loss, start_loss, told)


def _tune_scales(
    problem: BlockProblem, weights: Sequence[QuantizedTensor], schedule: Schedule, unit: float
) -> tuple[QuantizedTensor, ...]:
    """Move the scales alone, by Adam."""
    trainables = [Scaled(*pair) for pair in zip(problem.layers, weights, strict=True)]
    adam = torch.optim.Adam([trainable.factor for trainable in trainables], eps=ADAM_EPSILON)

    def step(left: float) -> None:
        adam.param_groups[0]["lr"] = _SCALE_RATE * left
        adam.step()
        for trainable in trainables:
            trainable.factor.clamp_(min=LEAST_FACTOR)

    descend(problem, trainables, schedule, unit, step)
    return tuple(trainable.quantized() for trainable in trainables)


def _accumulate(
    problem: BlockProblem, trainables: Sequence[Trainable], calls: Sequence[int], unit: float
) -> float:
    """Run some calls and leave the gradient of their loss, over ``unit``, in the trainables.

    One call at a time is held in memory; the weights are rounded once for all of them.

    Returns:
        The loss of these calls; zero when no token counts.
    """
    quantized = [trainable.quantized() for trainable in trainables]
    leaves = [q.dequantize().requires_grad_() for q in quantized]
    values = {t.name: leaf for t, leaf in zip(trainables, leaves, strict=True)}
    total, count = 0.0, 0.0
    with torch.enable_grad():
        for call in calls:
            error, weight = call_error(problem, call, values)
            total += float(error.detach())
            count += weight
            # A call may reach none of the layers.
            if error.requires_grad:
                error.backward()
    divisor = count * unit if count else 1.0
    for trainable, leaf, q in zip(trainables, leaves, quantized, strict=True):
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.div_(divisor)
        trainable.backward(gradient, q)
    return total / count if count else 0.0


def _changed(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The fraction of elements that differ."""
    different = sum(int((a != b).sum()) for a, b in pairs)
    return different / max(sum(a.numel() for a, _ in pairs), 1)
