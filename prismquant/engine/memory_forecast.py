"""Memory forecast: the peak of a run, told before it begins, and the placement that fits.

What a run holds at a time is known from shapes: one unit's weights, the calibration set's hidden
states, what halted passes hold, one stage's Hessians and what the solver makes of them. Two of
these can be done without, at a price: passes can start from the beginning for every stage (up to
twice the forward passes), and hidden states can wait elsewhere. The first placement whose peak fits
is taken, fastest first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import ProblemShape
from prismquant.data.batches import Batch
from prismquant.data.media import Cost
from prismquant.engine.placement import Placement
from prismquant.engine.streamed_model import narrow_modules
from prismquant.errors import BudgetError
from prismquant.models.arch import Modality
from prismquant.models.bound import BoundModel, BoundStep
from prismquant.plan.plan import Plan, PlanRow, problem_groups
from prismquant.runtime.mixed import Precision

_FLOAT32 = 4
# Hidden-wide tensors that a halted pass holds: the stream, what is normed, queries, keys, values.
_HELD = 5
# Tensors between the layers of an expert that are alive at once: gate, up, and their product.
_BETWEEN = 3
# Intermediate tensors of one call that are alive at once, in units of its widest layer.
_ALIVE = 4
# Bytes of a logit of two models with what is made of both, in float32 and float64.
_A_LOGIT = 40
# What libraries load when they are first used, and what the allocator and large pages round up.
_SLACK = 222 << 20
# One of them is a compiler, which the first layer that is solved calls for.
_COMPILER = 130 << 20
ONCE = _SLACK + _COMPILER
"""Bytes that a process takes once; a forecast later in the same process counts them twice."""


@dataclass(frozen=True)
class TowerTokens:
    """Rows that pass a tower.

    Attributes:
        total: In all calls.
        largest: In the largest call.
    """

    total: int = 0
    largest: int = 0


@dataclass(frozen=True)
class Forecast:
    """A predicted peak.

    Attributes:
        placement: Where units run, and where hidden states wait.
        peak_bytes: Largest resident set, with what the process has already.
        where: The unit in which the peak is reached, on the device if it has memory of its own.
        device_bytes: Largest sum of what lies on a device with memory of its own; 0 on a CPU.
    """

    placement: Placement
    peak_bytes: int
    where: str
    device_bytes: int = 0


def count_tokens(bound: BoundModel, batches: Sequence[Batch]) -> dict[Modality, TowerTokens]:
    """Patches in the vision tower, and tokens in the language model; padding included."""
    patches = next((s.in_features for s in bound.sites if bound.steps[s.step].kind == "entry"), 1)
    keys = [group[0] for group in bound.arch.input_groups]
    vision = [
        batch.inputs[key].numel() // patches
        for batch in batches
        for key in keys
        if key in batch.inputs
    ]
    text = [batch.inputs["input_ids"].numel() for batch in batches]
    return {
        Modality.VISION: TowerTokens(sum(vision), max(vision, default=0)),
        Modality.LLM: TowerTokens(sum(text), max(text, default=0)),
    }


def kept_for_gradients(
    bound: BoundModel,
    samples: int,
    tokens: dict[Modality, TowerTokens],
    precision: Precision,
    *,
    losses: int = 1,
    whole: bool = False,
) -> int:
    """Bytes of what waits for the way back: outputs of all blocks, and gradients at one of them.

    Args:
        bound: The model.
        samples: How many there are.
        tokens: Of the calibration batches; no sample is larger than the largest of them.
        precision: In which dtypes units run.
        losses: Losses whose gradients go back.
        whole: Whether they go back through the vision tower, too.
    """
    total = 0
    for tower in (Modality.LLM, Modality.VISION) if whole else (Modality.LLM,):
        blocks = [s for s in bound.steps if s.modality is tower and s.kind == "block" and s.sites]
        widths = [min(site.in_features for site in block.sites) for block in blocks]
        total += tokens[tower].largest * (sum(widths) + losses * max(widths, default=0))
    return samples * total * precision.dtype.itemsize


def forecast(
    plan: Plan,
    bound: BoundModel,
    tokens: dict[Modality, TowerTokens],
    *,
    resident: int,
    placement: Placement,
    making: Cost | None = None,
    places: int = 0,
) -> Forecast:
    """The peak of a run.

    Args:
        plan: What is done.
        bound: To which model.
        tokens: From :func:`count_tokens`.
        resident: Bytes that the process has before it begins.
        placement: Where units run, and where hidden states wait.
        making: What making the pixels of a batch takes, where they do not stay in memory.
        places: Places whose logits are looked at together at the head; 0: no data pass it.
    """
    outline = _Outline(plan, bound, tokens, placement, making or Cost(), places)
    first = min((row.site.step for row in plan.quantized), default=len(bound.steps))
    peaks = {step.name: outline.step(step) for step in bound.steps}
    peaks["embeddings"] = outline.embeddings()
    if not placement.on_host:
        # The host holds what waits there, and makes pixels; the rest is the device's.
        where = max(peaks, key=lambda name: peaks[name])
        aside = max(outline.aside(step) for step in bound.steps)
        return Forecast(placement, resident + aside + _COMPILER + _SLACK, where, peaks[where])
    compiled = {"embeddings", *(step.name for step in bound.steps if step.index >= first)}
    peaks = {name: peak + _COMPILER * (name in compiled) for name, peak in peaks.items()}
    where = max(peaks, key=lambda name: peaks[name])
    return Forecast(placement, resident + peaks[where] + _SLACK, where)


def weight_dtype(plan: Plan, step: BoundStep, precision: Precision) -> torch.dtype:
    """In which dtype weights of a step's linear layers are held, where that loses nothing of them.

    Args:
        plan: What is done.
        step: The step.
        precision: In which dtypes blocks are run.
    """
    tuned = any(row.config.tuner for row in plan.quantized if row.site.step == step.index)
    moved = any(edge.edge.step == step.index for edge in plan.edges)
    # Tuners run blocks in their own precision, and moved scale is rounded as it is stored.
    if tuned or moved or step.kind != "block":
        return precision.dtype
    return precision.products or precision.dtype


def choose_placement(
    forecasts: Sequence[Forecast], budget: int | None, device_bytes: int | None = None
) -> Forecast:
    """The first forecast that fits.

    Args:
        forecasts: One for each placement, fastest first.
        budget: Bytes that the process may take; None: as many as it likes.
        device_bytes: Bytes that are free on the device, where it has memory of its own. Where no
            placement fits in them, the last one is tried all the same: the device tells best.

    Raises:
        BudgetError: None fits the budget.
    """
    fitting = [one for one in forecasts if budget is None or one.peak_bytes <= budget]
    for one in fitting:
        if device_bytes is None or one.device_bytes <= device_bytes:
            return one
    if fitting:
        return fitting[-1]
    least = min(forecasts, key=lambda one: one.peak_bytes)
    enough = enough_gib(least.peak_bytes)
    raise BudgetError(
        f"a memory budget of {(budget or 0) / 2**30:.2f} GiB is too small: {enough} are needed "
        f"({least.placement.describe()})",
        needed=least.peak_bytes,
        where=least.where,
        remedy=f"allow {enough}; a smaller --batch-size, fewer --samples, smaller "
        "--max-pixels, or another method for the widest layers need less",
    )


@dataclass(frozen=True)
class _Outline:
    """Bytes by unit where it runs, beyond what the process has already."""

    plan: Plan
    bound: BoundModel
    tokens: dict[Modality, TowerTokens]
    placement: Placement
    making: Cost
    places: int = 0

    @property
    def precision(self) -> Precision:
        return self.placement.precision

    @property
    def itemsize(self) -> int:
        return self.precision.dtype.itemsize

    @property
    def chains(self) -> int:
        return 2 if self.plan.needs_float_chain else 1

    def step(self, step: BoundStep) -> int:
        rows = [row for row in self.plan.quantized if row.site.step == step.index]
        if self.places and step.kind == "head":
            return self._logits(step, rows)
        flows = (self.plan.needs_data and step.kind != "head") or bool(self.places)
        if not rows and not flows:
            return 0
        # Solved layers wait for the end of the step, a byte a weight.
        codes = sum(row.site.in_features * row.site.out_features for row in rows)
        loaded = self._parameters(step) * self.itemsize * self.chains
        size = self._weight_itemsize(step)
        weights = self._parameters(step) * size * self.chains + codes
        solving = max((self._solving(group, size) for group in _groups(rows)), default=0)
        if not self.plan.needs_data:
            passing = self._states(step) + self._call(step) if self.places else 0
            return max(loaded, weights + solving) + passing
        states, held = self._states(step), self._held(step, rows) + self._routed(step)
        flowing = max(solving, self._call(step), self._pixels(step, rows))
        return states + max(loaded, weights + held + flowing)

    def _logits(self, step: BoundStep, rows: Sequence[PlanRow]) -> int:
        """The head, as it is and beside it the float one, with logits of some places of both."""
        words, hidden = self.bound.shapes[f"{self.bound.arch.embeddings}.weight"]
        size = words * hidden * self.itemsize
        solving = max((self._solving(group, self.itemsize) for group in _groups(rows)), default=0)
        looked_at = size + self.places * words * _A_LOGIT
        return self._states(step) + size + max(solving, looked_at)

    def embeddings(self) -> int:
        """The rows of the table that are used, as they are on disk and in the arithmetic."""
        if not (self.plan.needs_data or self.places):
            return 0
        rows, hidden = self.bound.shapes[f"{self.bound.arch.embeddings}.weight"]
        used = min(rows, self.tokens[Modality.LLM].total)
        last = next(s for s in reversed(self.bound.steps) if s.kind == "block")
        return used * hidden * (self.bound.dtype.itemsize + self.itemsize) + self._states(last)

    def aside(self, step: BoundStep) -> int:
        """Bytes in the host's memory beside a device: hidden states, and pixels that are made."""
        tokens, width = self._tokens(step), self._hidden(step) * self.itemsize * self.chains
        waiting = tokens.total * width if self.placement.states == "host" else 0
        return waiting + (self.making.peak if step.kind == "entry" else 0)

    def _parameters(self, step: BoundStep) -> int:
        prefix = f"{step.name}."
        return sum(math.prod(s) for n, s in self.bound.shapes.items() if n.startswith(prefix))

    def _states(self, step: BoundStep) -> int:
        """Hidden states of the step's tower; in the language model also those that are about it."""
        count = self._tokens(step)
        number = count.total if self.placement.states == "device" else count.largest
        return number * self._hidden(step) * self.itemsize * self.chains

    def _pixels(self, step: BoundStep, rows: Sequence[PlanRow]) -> int:
        """Bytes of a batch's pixels at the entry unit, while they are made or pass it."""
        if step.kind != "entry":
            return 0
        pixels = self.making.pixels
        cast = pixels * self.itemsize // _FLOAT32 if self.itemsize != _FLOAT32 else 0
        if not self.placement.on_host:
            return pixels + cast + self._call(step)
        # Statistics look at one batch while the next one is made.
        before = pixels if rows else 0
        return max(self.making.peak + before, pixels + cast + self._call(step))

    def _held(self, step: BoundStep, rows: Sequence[PlanRow]) -> int:
        halts = step.kind != "entry" and self.placement.paused
        if not halts or not any(row.needs_data for row in rows):
            return 0
        flow = self._flow_itemsize(step)
        widest = max(row.site.in_features * flow[row.site.name] for row in rows)
        width = _HELD * self._hidden(step) * self.itemsize + widest
        return self._tokens(step).total * width * self.chains

    def _routed(self, step: BoundStep) -> int:
        """Input and output of a step's experts for all calls, and what passes the one in question.

        An expert that is sent few tokens may take all.
        """
        inner = max((s.out_features for s in step.sites if s.expert and s.fuse_key), default=0)
        if not inner:
            return 0
        hidden = self._hidden(step)
        # A halted pass holds the input, which is counted there.
        wide = hidden * (2 if self.placement.paused else 3) + _BETWEEN * inner
        count = self._tokens(step)
        # Of a halted pass a dealt input stays as well: a row for each expert and token.
        rows = sum(site.expert.dealt for site in step.sites if site.expert and not site.fuse_key)
        dealt = (count.total if self.placement.paused else count.largest) * rows * hidden
        return (count.total * wide + dealt) * self.itemsize

    def _call(self, step: BoundStep) -> int:
        flow = self._flow_itemsize(step)
        sites = step.sites if step.kind != "head" else ()
        widest = max((site.out_features * flow[site.name] for site in sites), default=self.itemsize)
        rows = self._tokens(step).largest
        if step.kind == "projector" and sites:
            # It joins the hidden states of several patches in each of its rows.
            rows = math.ceil(rows * self._hidden(step) / min(site.in_features for site in sites))
        return rows * widest * _ALIVE

    def _flow_itemsize(self, step: BoundStep) -> dict[str, int]:
        """Bytes of a number that a layer is given or gives, by layer."""
        narrow = tuple(f"{name}." for name in narrow_modules(self.bound, step))
        products = self.precision.products or self.precision.dtype
        return {
            site.name: (products if site.name.startswith(narrow) else self.precision.dtype).itemsize
            for site in step.sites
        }

    def _weight_itemsize(self, step: BoundStep) -> int:
        """Bytes of a weight while the step is run."""
        dtype = weight_dtype(self.plan, step, self.precision)
        exact = dtype == self.bound.dtype and not self.plan.towers
        return dtype.itemsize if exact else self.itemsize

    def _solving(self, rows: Sequence[PlanRow], itemsize: int) -> int:
        columns, count = rows[0].site.in_features, sum(row.site.out_features for row in rows)
        config = rows[0].config
        shape = ProblemShape(columns, count, hessian=config.needs_hessian)
        peak = build_solver(config.solver, config.options).peak_bytes(shape)
        if not shape.hessian:
            return peak
        # Solvers work on float32: weights in another dtype are converted.
        own = _FLOAT32 * columns * count if itemsize < _FLOAT32 else 0
        return _FLOAT32 * columns**2 + peak + own

    def _tokens(self, step: BoundStep) -> TowerTokens:
        return self.tokens[self._tower(step)]

    def _tower(self, step: BoundStep) -> Modality:
        return Modality.LLM if step.modality is Modality.LLM else Modality.VISION

    def _hidden(self, step: BoundStep) -> int:
        tower = self._tower(step)
        blocks = [s for s in self.bound.steps if s.modality is tower and s.kind == "block"]
        sites = (blocks[0] if blocks else step).sites
        return min((site.in_features for site in sites), default=1)


def _groups(rows: Sequence[PlanRow]) -> Iterator[list[PlanRow]]:
    yield from problem_groups(rows)


def enough_gib(count: int) -> str:
    """A number of bytes in GiB, rounded up, e.g. ``0.87 GiB``."""
    return f"{math.ceil(count / 2**30 * 100) / 100:.2f} GiB"
