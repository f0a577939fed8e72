"""Tuning the codes of a whole block on the error of its output.

A solver sees one input and the layers that read it. A tuner sees a block of the model (an attention
and its MLP, say) and a function that runs it with other weights, so it can trade the error of one
layer against that of another, across the nonlinearities between them. It starts from codes that a
solver chose. The measure of success is

    loss = sum over calls and tokens of w_t |output_t - target_t|^2  /  sum of w_t

the mean squared error of the block's output, summed over features, over the tokens that count.

Tuners descend on a latent weight for every layer: the float weight plus an offset in steps of the
grid, and factors on the range that the scale covers. What runs in the block is always the
dequantized result of rounding them, bit for bit what is stored; gradients pass the rounding
straight through (Bengio et al., arXiv 1308.3432). Since many codes flip at once, this may lose what
a solver like GPTQ gained by choosing one code after another. A second phase therefore keeps the
better codes of the two and moves only scales, whose gradients are exact; it gains from any start.

Two invariants: before the first step the latent weights round to exactly the values, scales and
zero points of the start; and what is returned is never worse than the start, measured over all
calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from prismquant.diagnostics.tuning_diagnostics import TuningDiagnostics
from prismquant.errors import FormatError, NumericsError, PrismQuantError
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.numerics.affine import check_finite, from_groups, quantize, simulate, to_groups
from prismquant.numerics.grids import IntGrid
from prismquant.numerics.scales import AnyScale, ScaleFormat, as_scale_format

if TYPE_CHECKING:
    from prismquant.formats.spec import NumberSpec
    from prismquant.numerics.grids import Grid
    from prismquant.numerics.ranges import RangeRule

# Gradients come in units of the start's loss, so they stay far above this.
ADAM_EPSILON = 1e-15

# How far inside its cell, in steps, a latent weight begins whose code is not the nearest one.
_ENTRY_DEPTH = 0.25
# A value further from its code than half a step has been clipped; the rest is rounding noise. On a
# floating-point grid the next step may be twice as long as the one at the weight.
_HALF_STEP = 0.5 + 1e-3
# What scales move at first in the second phase, as a fraction: a step of bfloat16 or less.
_SETTLE_RATE = 0.004
# Factors on ranges stay positive, whatever the learning rate.
_LEAST_FACTOR = 0.05


@dataclass(frozen=True, eq=False)
class BlockLayer:
    """One layer of a block, with the codes to start from.

    Attributes:
        name: What the block's output function and errors call it.
        weight: The float weight, float32 ``[out, in]``.
        range_rule: How the scales of the start were chosen.
        scale_dtype: How scales are stored. A dtype is that of float scales; for scales of 8 bits,
            what else it takes follows from the start.
        start: What a solver chose.

    Raises:
        FormatError: The parts do not fit one another.
        NumericsError: The weight holds NaN or an infinity.
    """

    name: str
    weight: Tensor
    range_rule: RangeRule
    scale_dtype: AnyScale
    start: QuantizedTensor

    def __post_init__(self) -> None:
        if self.weight.dtype != torch.float32 or self.weight.ndim != 2:
            raise FormatError(
                f"tuners work on float32 [out, in], "
                f"not {self.weight.dtype} {list(self.weight.shape)}",
                where=self.name,
            )
        if tuple(self.weight.shape) != self.start.shape:
            raise FormatError(
                f"codes {list(self.start.shape)} are no start for a weight "
                f"{list(self.weight.shape)}",
                where=self.name,
            )
        wanted = self.scale_format.memory_dtype
        if self.start.scale.dtype != wanted:
            raise FormatError(
                f"the start has scales in {self.start.scale.dtype}, not {wanted}",
                where=self.name,
            )
        try:
            check_finite(self.weight, "the weight")
        except PrismQuantError as error:
            raise type(error)(error.what, where=self.name, remedy=error.remedy) from error

    @property
    def scale_format(self) -> ScaleFormat:
        """How scales are stored; a global scale stays that of the start."""
        if self.start.spec.scale == "float":
            return as_scale_format(self.scale_dtype)
        return self.start.scale_format


@dataclass(frozen=True, eq=False)
class BlockProblem:
    """A block to tune, and how to run it.

    Attributes:
        name: What errors call the block.
        layers: Its quantized layers.
        calls: How many recorded calls of the block there are.
        output: Runs call ``i`` with the given weights (by the layers' names, ``[out, in]``) in
            place and returns ``[tokens, features]``; differentiable in the weights.
        target: What call ``i`` should give, ``[tokens, features]``.
        token_weights: How much each token of call ``i`` counts, ``[tokens]``, not negative;
            ``None`` counts all alike. Tokens of weight zero are ignored, whatever they hold.

    Raises:
        FormatError: There are no layers or no calls, or two layers have one name.
    """

    name: str
    layers: tuple[BlockLayer, ...]
    calls: int
    output: Callable[[int, Mapping[str, Tensor]], Tensor]
    target: Callable[[int], Tensor]
    token_weights: Callable[[int], Tensor | None]

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if not names or len(set(names)) != len(names):
            raise FormatError(
                f"the layers of a block need distinct names: {names}", where=self.name
            )
        if self.calls < 1:
            raise FormatError(
                "a block cannot be tuned without calls",
                where=self.name,
                remedy="add calibration data that reaches it",
            )


@dataclass(frozen=True, eq=False)
class BlockResult:
    """What a tuner chose, and what it gained.

    Attributes:
        weights: One for each layer of the problem, in its order.
        loss: The module's loss of these weights over all calls.
        start_loss: That of the start.
        diagnostics: What the record keeps of it.
    """

    weights: tuple[QuantizedTensor, ...]
    loss: float
    start_loss: float
    diagnostics: TuningDiagnostics


class Tuner(Protocol):
    """A method that tunes a block: a frozen dataclass whose fields are its options.

    Every field has a default; ``__post_init__`` raises RecipeError on a value out of bounds.
    ``same_inputs`` says what the targets are: the float block's outputs for the inputs that the
    quantized model gives it, or those of the float model.
    """

    name: ClassVar[str]
    same_inputs: ClassVar[bool]

    def tune(self, problem: BlockProblem) -> BlockResult:
        """Choose codes and scales of every layer of a block; never worse than the start."""
        ...


def block_loss(problem: BlockProblem, weights: Sequence[QuantizedTensor]) -> float:
    """The module's loss of a choice of weights, over all calls.

    Args:
        problem: The block.
        weights: One for each of its layers, in their order.

    Returns:
        The loss; zero when no token counts.

    Raises:
        FormatError: An output, a target and its token weights do not fit one another.
    """
    values = {
        layer.name: quantized.dequantize()
        for layer, quantized in zip(problem.layers, weights, strict=True)
    }
    total, count = 0.0, 0.0
    with torch.no_grad():
        for call in range(problem.calls):
            error, weight = _call_error(problem, call, values)
            total += float(error)
            count += weight
    return total / count if count else 0.0


class Trainable(Protocol):
    """What can be descended on in place of a layer's weight."""

    @property
    def name(self) -> str:
        """Of the layer."""
        ...

    def quantized(self) -> QuantizedTensor:
        """What it stands for now, as it would be stored."""
        ...

    def backward(self, gradient: Tensor, quantized: QuantizedTensor) -> None:
        """Turn the gradient of the dequantized weight into one of what is trained.

        Args:
            gradient: Of the loss in the dequantized weight, ``[out, in]``.
            quantized: What :meth:`quantized` gave for it.
        """
        ...


class Latent:
    """What the first phase changes of a layer: offsets of its weights, factors of its ranges.

    The layer's weight, before it is rounded, is ``weight + offset * step``, with the step that the
    grid has at the weight: the scale, on an integer grid. The scale covers the range of the start
    with its ends multiplied by ``low`` and ``high``; a symmetric range has only ``high``.

    Args:
        layer: The layer.

    Attributes:
        layer: The layer.
        offset: In steps, float32 ``[out, in]``; zero where the start is the nearest code.
        low: Factor of the lower end of each range, float32 like the scale; ``None`` if symmetric.
        high: Factor of the upper end of each range, float32 like the scale.
    """

    def __init__(self, layer: BlockLayer) -> None:
        self.layer = layer
        self._spacing, self._half = _spacing(layer)
        self.offset = _entry_offset(layer, self._spacing)
        self.high = torch.ones_like(layer.start.scale, dtype=torch.float32)
        self.low = None if layer.start.zero_point is None else torch.ones_like(self.high)

    @property
    def name(self) -> str:
        """Of the layer."""
        return self.layer.name

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors of the ranges: one tensor if symmetric, else two."""
        return (self.high,) if self.low is None else (self.low, self.high)

    def quantized(self) -> QuantizedTensor:
        """Round to what would be stored."""
        spec = self.layer.start.spec
        scale, zero = self._stored()
        step = _spread(scale, self.layer.weight, spec) * self._spacing
        codes = quantize(
            self.layer.weight + self.offset * step,
            scale,
            zero,
            spec.grid,
            spec.granularity,
            spec.group_size,
        )
        return replace(self.layer.start, codes=codes, scale=scale, zero_point=zero)

    def backward(self, gradient: Tensor, quantized: QuantizedTensor) -> None:
        """Pass a gradient straight through the rounding, to ``offset`` and the factors.

        Inside the range, the value follows the offset; it follows the scale by the error of
        rounding (Esser et al., arXiv 1902.08153, section 3.1). Clipped values follow the ends of
        the range alone.

        Args:
            gradient: Of the loss in the dequantized weight, ``[out, in]``.
            quantized: What :meth:`quantized` gave for it.
        """
        spec, weight = quantized.spec, self.layer.weight
        scale = quantized.scale.to(torch.float32)
        step = _spread(scale, weight, spec) * self._spacing
        value = quantized.dequantize()
        distance = weight + self.offset * step - value
        passed = torch.where(distance.abs() <= self._half * step.abs(), gradient, 0.0)
        self.offset.grad = passed * step
        of_scale = _unit_sums(gradient * value - passed * weight, spec) / scale
        of_zero = _unit_sums(passed - gradient, spec) * scale
        factors = [factor.detach().requires_grad_() for factor in self.factors]
        with torch.enable_grad():
            stored, zero = self._ranges(None if self.low is None else factors[0], factors[-1])
            total = (stored * of_scale).sum()
            if zero is not None:
                total = total + (zero * of_zero).sum()
            slopes = torch.autograd.grad(total, factors)
        for factor, slope in zip(self.factors, slopes, strict=True):
            factor.grad = slope

    def limit(self) -> None:
        """Keep the factors positive."""
        for factor in self.factors:
            factor.clamp_(min=_LEAST_FACTOR)

    def _stored(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as stored."""
        scale, zero = self._ranges(self.low, self.high)
        grid = self.layer.start.spec.grid
        if zero is not None and isinstance(grid, IntGrid):
            zero = zero.round().clamp(grid.qmin, grid.qmax).to(torch.int8)
        return self.layer.scale_format.kept(scale), zero

    def _ranges(self, low: Tensor | None, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale, rounded as stored, and zero point before rounding, float32 and differentiable."""
        start, form = self.layer.start, self.layer.scale_format
        scale = start.scale.to(torch.float32)
        grid = start.spec.grid
        # Only integer formats have zero points.
        if low is None or start.zero_point is None or not isinstance(grid, IntGrid):
            return _as_stored(scale * high, form, grid), None
        below = start.zero_point.to(torch.float32) - grid.qmin
        share = below / (grid.levels - 1)
        # Written in differences from 1, so that factors of 1 leave the scale as it is.
        wider = (high - 1) * (1 - share) + (low - 1) * share
        stored = _as_stored(scale * (1 + wider), form, grid)
        return stored, grid.qmin + low * below * (scale / stored)


class Scaled:
    """What the second phase changes of a layer: factors of its scales. Codes and zero points stay.

    Args:
        layer: The layer.
        chosen: Its weight so far.

    Attributes:
        factor: Of each scale, float32 like it.
    """

    def __init__(self, layer: BlockLayer, chosen: QuantizedTensor) -> None:
        self._layer = layer
        self._chosen = chosen
        self.factor = torch.ones_like(chosen.scale, dtype=torch.float32)

    @property
    def name(self) -> str:
        """Of the layer."""
        return self._layer.name

    def quantized(self) -> QuantizedTensor:
        """The codes with scales as they would be stored."""
        form = self._layer.scale_format
        moved = self._chosen.scale.to(torch.float32) * self.factor
        scale = form.kept(_as_stored(moved, form, self._chosen.spec.grid))
        return replace(self._chosen, scale=scale)

    def backward(self, gradient: Tensor, quantized: QuantizedTensor) -> None:
        """The exact gradient, but for the rounding of scales to their dtype.

        Args:
            gradient: Of the loss in the dequantized weight, ``[out, in]``.
            quantized: What :meth:`quantized` gave for it.
        """
        slope = _unit_sums(gradient * quantized.dequantize(), quantized.spec)
        self.factor.grad = slope / self.factor


def starting_loss(problem: BlockProblem) -> float:
    """The loss of the start over all calls.

    Args:
        problem: The block.

    Returns:
        The loss.

    Raises:
        NumericsError: It is not finite.
    """
    loss = block_loss(problem, [layer.start for layer in problem.layers])
    if not math.isfinite(loss):
        raise NumericsError(
            f"the block's output error is {loss} before tuning",
            where=problem.name,
            remedy="check the calibration data, or compute in a wider dtype",
        )
    return loss


def schedule_bounds(
    iterations: int, batch: int, settle: int, seed: int
) -> dict[str, tuple[bool, str]]:
    """What :func:`prismquant.errors.check_bounds` takes of the options that all tuners have."""
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
    """How long to descend, and on what.

    Attributes:
        iterations: Steps.
        batch: Calls that a step sees; all of them where there are fewer.
        seed: Of the order of calls.
    """

    iterations: int
    batch: int
    seed: int

    def batches(self, calls: int) -> Iterator[list[int]]:
        """Which calls each step sees: every call once before any comes again.

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
    """What every tuner does around its own step: measure the start, descend, keep the best.

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
        settled = _settle(problem, weights, settle, loss)
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


def _settle(
    problem: BlockProblem, weights: Sequence[QuantizedTensor], schedule: Schedule, unit: float
) -> tuple[QuantizedTensor, ...]:
    """Move the scales alone, by Adam."""
    trainables = [Scaled(*pair) for pair in zip(problem.layers, weights, strict=True)]
    adam = torch.optim.Adam([trainable.factor for trainable in trainables], eps=ADAM_EPSILON)

    def step(left: float) -> None:
        adam.param_groups[0]["lr"] = _SETTLE_RATE * left
        adam.step()
        for trainable in trainables:
            trainable.factor.clamp_(min=_LEAST_FACTOR)

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
            error, weight = _call_error(problem, call, values)
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


def _call_error(
    problem: BlockProblem, call: int, values: Mapping[str, Tensor]
) -> tuple[Tensor, float]:
    """Weighted squared error of one call, a float32 scalar, and the weight of its tokens."""
    output = problem.output(call, values)
    target = problem.target(call)
    if output.shape != target.shape or output.ndim != 2:
        raise FormatError(
            f"call {call} gives {list(output.shape)}, its target is {list(target.shape)}",
            where=problem.name,
            remedy="give both as [tokens, features]",
        )
    error = output.to(torch.float32) - target.to(output.device, torch.float32)
    weights = problem.token_weights(call)
    if weights is None:
        return error.square().sum(), float(len(error))
    if tuple(weights.shape) != (len(error),):
        raise FormatError(
            f"call {call} has {len(error)} tokens and weights {list(weights.shape)}",
            where=problem.name,
        )
    weights = weights.to(error.device, torch.float32)
    # Padding may hold anything, even what is not a number.
    error = torch.where((weights > 0).unsqueeze(1), error, 0.0)
    return (error.square().sum(dim=1) * weights).sum(), float(weights.sum())


def _spacing(layer: BlockLayer) -> tuple[Tensor | float, float]:
    """The distance of neighbouring points of the grid at each weight, in units of its scale.

    Returns:
        The spacing, ``[out, in]`` or one number; and how many spacings a value that is not clipped
        may be away from its code.
    """
    spec = layer.start.spec
    if isinstance(spec.grid, IntGrid):
        return 1.0, _HALF_STEP
    patterns = torch.arange(1 << spec.grid.bits, dtype=torch.uint8).view(torch.int8)
    points = spec.grid.read(patterns)
    points = points[points.isfinite() & (points >= 0)].unique().to(layer.weight.device)
    magnitude = layer.weight.abs() / _spread(layer.start.scale, layer.weight, spec)
    above = torch.searchsorted(points, magnitude, right=True).clamp_(1, len(points) - 1)
    return points[above] - points[above - 1], 2 * _HALF_STEP


def _entry_offset(layer: BlockLayer, spacing: Tensor | float) -> Tensor:
    """The offset, in steps, from which rounding gives the start.

    Where the start is the nearest code there is none. Elsewhere (GPTQ compensates errors, so many
    codes are not the nearest) the latent weight enters the code's cell from the side of the weight,
    deep enough that one step of descent does not undo the choice.
    """
    start, spec = layer.start, layer.start.spec
    target = start.dequantize()

    def misses(values: Tensor) -> Tensor:
        # Compared as values: a floating-point grid has two codes for zero.
        rounded = simulate(
            values, start.scale, start.zero_point, spec.grid, spec.granularity, spec.group_size
        )
        return rounded != target

    step = _spread(start.scale, layer.weight, spec) * spacing
    gap = (target - layer.weight) / step
    into = gap - gap.sign() * (0.5 - _ENTRY_DEPTH)
    offset = torch.where(misses(layer.weight), into, 0.0)
    # A cell that is narrower than a step on one side is entered to its point.
    return torch.where(misses(layer.weight + offset * step), gap, offset)


def _spread(scale: Tensor, like: Tensor, spec: NumberSpec) -> Tensor:
    """Write a scale out for every weight, float32 ``[out, in]``."""
    groups = to_groups(like, spec.granularity, spec.group_size)
    wide = scale.to(torch.float32).unsqueeze(-1).expand_as(groups)
    return from_groups(wide, like.shape, spec.granularity)


def _unit_sums(x: Tensor, spec: NumberSpec) -> Tensor:
    """Sum over all weights that share one scale: ``[out, in]`` to the scale's shape."""
    return to_groups(x, spec.granularity, spec.group_size).sum(dim=-1)


def _as_stored(scale: Tensor, form: ScaleFormat, grid: Grid) -> Tensor:
    """A float32 scale rounded to what is stored; gradients pass straight through."""
    return form.nearest(scale.detach(), grid) + (scale - scale.detach())


def _changed(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The fraction of elements that differ."""
    different = sum(int((a != b).sum()) for a, b in pairs)
    return different / max(sum(a.numel() for a, _ in pairs), 1)
