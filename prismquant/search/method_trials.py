"""Trials of a recipe's alternatives: quantized on few samples, measured on samples held out.

A trial is a walk through the model: calibration samples are looked at as in a run, the samples held
out follow, and at the head their divergence from the float model is measured. Nothing is written,
and one unit is in memory at a time.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from prismquant.data import Sample, require_modalities
from prismquant.data.batches import Batches
from prismquant.data.lengths import by_length
from prismquant.data.survey import Survey, let_go
from prismquant.engine.activation_store import ActivationStore
from prismquant.engine.collectives import share_of
from prismquant.engine.gradients import gradient_samples, vision_weights, wants_gradients
from prismquant.engine.memory_forecast import ONCE, Forecast, enough_gib
from prismquant.engine.quantize import quantize_unit
from prismquant.engine.run import ACTIVATIONS, hand_on, visit_of
from prismquant.engine.unit_plan import QuantizedUnit, Quantizing, unit_plans
from prismquant.engine.walk import ModelWalk, Unit
from prismquant.errors import BudgetError, NumericsError, PlanError, PrismQuantError, listed
from prismquant.memory import give_back_freed, keep_heap_compact, readable_bytes
from prismquant.models.bound import BoundModel
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import Plan
from prismquant.plan.source import source_reader
from prismquant.quantization.prepare import (
    forecast_memory,
    memory_room,
    needed_kinds,
    surveyed_batches,
)
from prismquant.quantization.request import Request
from prismquant.recipe.schema import Recipe
from prismquant.run.directory import RunDirectory
from prismquant.run.method_choice import MethodTrial
from prismquant.runtime.mixed import Precision
from prismquant.search.analysis_request import DEFAULT_WEIGHTS
from prismquant.search.held_out_loss import CHUNK, HeldOutLoss, Sums
from prismquant.search.repair import weighted
from prismquant.search.shared_prefix import SharedPrefix, touched_steps

MOST_LOGITS = 1 << 30
"""Bytes of the unquantized model's logits that are kept between trials."""

# A model may fail to be quantized in one way and not in another; all else is wrong with any.
_OWN_FAILURES = (NumericsError, PlanError)


@dataclass(frozen=True)
class Ask:
    """One trial to make.

    Attributes:
        part: Part of the model that is quantized.
        name: Of the alternative.
        round: The trial's round.
        recipe: The alternative as an ordinary recipe.
        samples: Calibration samples.
    """

    part: str
    name: str
    round: int
    recipe: Recipe
    samples: tuple[Sample, ...]


class TrialRuns:
    """Trials of alternatives of one recipe on one model.

    Args:
        asked: The request, whose recipe has the alternatives.
        bound: The model.
        held_out: Samples that no statistic sees.
        directory: Keeps what waits in files.
    """

    def __init__(
        self,
        asked: Request,
        bound: BoundModel,
        held_out: Sequence[Sample],
        directory: RunDirectory,
    ) -> None:
        self._asked, self._bound, self._directory = asked, bound, directory
        self._held_out = held_out
        self._precision = Precision.chosen(asked.wanted, asked.target, bound.dtype)
        self._stack = contextlib.ExitStack()
        self._loss: HeldOutLoss | None = None
        self._followers: Survey | None = None
        self._batches: tuple[tuple[Sample, ...], Batches, Survey] | None = None
        self._most_needed = 0
        self._prefix = SharedPrefix({})

    def __enter__(self) -> TrialRuns:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def require_memory(self, whole: Mapping[str, Recipe], samples: Sequence[Sample]) -> None:
        """See to it that a memory budget allows all trials, and a run of whichever wins.

        Args:
            whole: Recipes of the alternatives on all blocks, by name.
            samples: All of them.

        Raises:
            BudgetError: It does not, with the alternatives that need more, and how much.
        """
        asked, budget = self._asked, self._asked.memory_budget
        if budget is None:
            return
        self._following()
        seen = self._surveyed(samples)
        own: dict[str, int] = {}
        for name, recipe in whole.items():
            plan = make_plan(recipe, self._bound)
            batches, found = seen if plan.needs_data else (None, Survey())
            try:
                # Later forecasts, and that of the run, find what libraries have loaded by then.
                own[name] = self._forecast(plan, batches, found, budget - ONCE)[0].peak_bytes
            except BudgetError as error:
                own[name] = error.needed
        ranks = asked.ranks.gather_json(own)
        needed = {name: max(one[name] for one in ranks) + ONCE for name in own}
        self._most_needed = max(needed.values())
        if self._most_needed > budget:
            raise _too_small(asked.recipe.name, budget, needed)

    def expect(self, asks: Sequence[Ask]) -> None:
        """Say which trials come next, on the same samples: what they share is computed once."""
        plans = {ask.name: make_plan(ask.recipe, self._bound) for ask in asks}
        # States that wait between trials are in no forecast.
        shared = self._asked.memory_budget is None
        self._prefix = SharedPrefix(
            {
                name: touched_steps(plan, self._bound)
                for name, plan in plans.items()
                if shared and plan.needs_data
            }
        )

    def run(self, ask: Ask) -> MethodTrial:
        """Quantize the model in one way and measure what it loses; alike on all ranks.

        Raises:
            PrismQuantError: It fails, not for what the alternative says: memory is too little, or
                data cannot be read.
        """
        started = time.monotonic()
        trial = MethodTrial(ask.name, ask.round, len(ask.samples), part=ask.part)
        try:
            own = _measured(trial, self._sums(ask))
        except BudgetError:
            # More memory would do: that says nothing about the alternative.
            raise
        except _OWN_FAILURES as error:
            if self._asked.ranks.size > 1 and isinstance(error, NumericsError):
                # The other ranks wait for this one.
                raise
            own = replace(trial, failure=_failure(error), remedy=error.remedy or "")
        give_back_freed()
        return replace(own, seconds=round(time.monotonic() - started, 2))

    @torch.no_grad()
    def _sums(self, ask: Ask) -> Sums:
        """Divergences of one trial."""
        asked, bound, ranks = self._asked, self._bound, self._asked.ranks
        plan = make_plan(ask.recipe, bound)
        batches, found = self._calibration(plan, ask.samples)
        memory, found = self._forecast(plan, batches, found, asked.memory_budget)
        loss = self._held_out_loss(memory)
        said = f"trying {ask.name} on {len(ask.samples)} samples"
        asked.reporter.begin(len(bound.steps))
        keep_heap_compact(ACTIVATIONS)
        states = memory.placement.states
        with self._directory.activation_store(ranks.rank, states, "trial") as store:
            how = Quantizing(
                plan,
                self._vision_weights(plan, ask, batches, found, memory, store),
                ranks,
                lambda unit, what: asked.reporter.stage(f"{said}: {unit}", what),
            )
            walk = ModelWalk(
                bound,
                source_reader(plan, bound),
                found.batches,
                memory.placement,
                visit=visit_of(plan, bound, self._precision),
                store=store,
                ranks=ranks,
                followers=loss.batches,
                start=self._prefix.begin(ask.name),
            )
            try:
                # Files are gone when the trial ends.
                prefix = SharedPrefix({}) if states == "disk" else self._prefix
                return _walked(walk, how, loss, partial(prefix.look, ask.name))
            finally:
                self._prefix.end(ask.name)

    def _calibration(
        self, plan: Plan, samples: tuple[Sample, ...]
    ) -> tuple[Batches | None, Survey]:
        """Batches of this rank, which are the same for all trials on the same samples."""
        if not plan.needs_data:
            return None, Survey()
        require_modalities(samples, needed_kinds(plan))
        if self._batches is None or self._batches[0] != samples:
            self._batches = (samples, *self._surveyed(samples))
        return self._batches[1:]

    def _surveyed(self, samples: Sequence[Sample]) -> tuple[Batches, Survey]:
        asked = self._asked
        # Each rank needs a batch; padding is all that the size of batches changes.
        most = max(1, len(samples) // asked.ranks.size)
        size = min(asked.recipe.calibration.batch_size, most)
        return surveyed_batches(
            share_of(by_length(samples), size, asked.ranks),
            self._bound,
            batch_size=size,
            limits=asked.limits,
            device=asked.target,
            room=memory_room(asked.memory_budget),
            trust_remote_code=asked.trust_remote_code,
        )

    def _forecast(
        self, plan: Plan, batches: Batches | None, found: Survey, budget: int | None
    ) -> tuple[Forecast, Survey]:
        asked, followers = self._asked, self._following()
        making = max(found.making, followers.making, key=lambda cost: cost.peak)
        return forecast_memory(
            plan,
            self._bound,
            batches,
            replace(found, making=making),
            budget,
            asked.target,
            self._precision,
            followers=followers.batches,
            places=CHUNK,
        )

    def _following(self) -> Survey:
        """Batches of this rank's share of the samples held out."""
        if self._followers is None:
            batches, found = self._surveyed(self._held_out)
            budget = self._asked.memory_budget
            self._followers = found if budget is None else let_go(found, batches)
        return self._followers

    def _held_out_loss(self, memory: Forecast) -> HeldOutLoss:
        """The loss, once the float model has been looked at."""
        if self._loss is None:
            asked, states = self._asked, memory.placement.states
            store = self._stack.enter_context(
                self._directory.activation_store(asked.ranks.rank, states, "held-out")
            )
            most = max(memory.peak_bytes, self._most_needed)
            spare = memory_room(asked.memory_budget) - most
            self._loss = HeldOutLoss(
                self._bound,
                self._following().batches,
                DEFAULT_WEIGHTS,
                memory.placement,
                store,
                min(MOST_LOGITS, max(spare, 0)),
                asked.ranks,
            )
            self._loss.look_at_float()
        return self._loss

    def _vision_weights(
        self,
        plan: Plan,
        ask: Ask,
        batches: Batches | None,
        found: Survey,
        memory: Forecast,
        store: ActivationStore,
    ) -> Mapping[str, float]:
        """Weights of vision tokens, where the plan asks gradients for them."""
        if batches is None or not wants_gradients(plan):
            return {}
        unknown = {name for own in self._asked.ranks.gather_json([*found.unknown]) for name in own}
        clear = [sample for sample in ask.samples if sample.id not in unknown]
        answers = gradient_samples(clear, plan.calibration.seed)
        one_by_one = replace(batches, parts=tuple((sample,) for sample in answers))
        return vision_weights(plan, self._bound, one_by_one, memory.placement, store)


def _walked(
    walk: ModelWalk, how: Quantizing, loss: HeldOutLoss, look: Callable[[Unit], None]
) -> Sums:
    """Quantize unit by unit, and look at the followers' logits at the head.

    Args:
        walk: The walk.
        how: What holds for all units.
        loss: Takes the logits.
        look: Looks at each unit before anything is done.
    """
    planned = unit_plans(how.plan, walk.bound)
    sums: Sums = {}
    with contextlib.closing(walk.units()) as units:
        for unit in units:
            found = QuantizedUnit()
            own = planned[unit.name]
            look(unit)
            with unit.loaded():
                hand_on(unit, own, how, found, partial(quantize_unit, unit, own, how, found))
                if unit.step.kind == "head":
                    sums = loss.sums(unit)
            give_back_freed()
    return sums


def _measured(trial: MethodTrial, sums: Sums) -> MethodTrial:
    loss = weighted(sums, DEFAULT_WEIGHTS)
    if not math.isfinite(loss.loss):
        return replace(trial, failure="its divergence is not finite")
    kl: Mapping[str, float] = {name: score.loss for name, score in loss.losses.items()}
    return replace(trial, loss=loss.loss, error=loss.error, kl=kl, parts=dict(loss.parts))


def _failure(error: PrismQuantError) -> str:
    if error.findings:
        return "\n".join(error.findings)
    return f"{error.where}: {error.what}" if error.where else error.what


def _too_small(recipe: str, budget: int, needed: Mapping[str, int]) -> BudgetError:
    dear = [name for name in needed if needed[name] > budget]
    most = max(needed.values())
    without = f"; or take a recipe without {', '.join(dear)}" if len(dear) < len(needed) else ""
    return BudgetError(
        f"a memory budget of {readable_bytes(budget)} is too small to choose among "
        f"{', '.join(needed)}: {enough_gib(most)} are needed for all of them"
        + listed([f"{name} needs {enough_gib(needed[name])}" for name in dear]),
        needed=most,
        where=f"recipe {recipe!r}",
        remedy=f"allow {enough_gib(most)}; a smaller --batch-size, fewer --samples, or smaller "
        f"--max-pixels need less{without}",
    )
