"""Choosing among a recipe's alternatives by held-out loss, and quantizing with the one that wins.

A part of the calibration samples is held out of all statistics. In each round some blocks of the
model are quantized by every alternative that is left, on samples of the rest, and its KL divergence
from the unquantized model is measured on those held out; the worse ones drop out, and the next
round has more blocks and samples, unless one is clearly ahead. The winner becomes an ordinary
recipe, with which all samples are used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from prismquant.data import Sample, read_samples
from prismquant.engine.collectives import require_sharable
from prismquant.errors import DataError, PlanError, PrismQuantError, listed
from prismquant.memory import resident_bytes
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.plan.make_plan import make_plan
from prismquant.plan.source import source_reader
from prismquant.quantization.perform import perform, refuse_inside
from prismquant.quantization.prepare import memory_room, source_files
from prismquant.quantization.request import Request, Result
from prismquant.recipe.schema import Recipe
from prismquant.run.directory import RunDirectory
from prismquant.run.fingerprint import (
    code_versions,
    described_versions,
    fingerprint_samples,
    stamp_files,
    unchanged,
)
from prismquant.run.identity import Identity
from prismquant.run.method_choice import WHOLE, MethodChoice, MethodTrial, told_parts
from prismquant.runtime.mixed import Precision
from prismquant.search.analysis_notes import bounded_outputs
from prismquant.search.analysis_request import DEFAULT_WEIGHTS
from prismquant.search.held_out import ENOUGH_TEXT, FEWEST, HeldOut, enough_of, hold_out
from prismquant.search.method_trials import Ask, TrialRuns
from prismquant.search.model_parts import one_for_all, parts_of
from prismquant.search.trial_blocks import trial_recipes
from prismquant.search.trial_file import TrialFile


@dataclass(frozen=True)
class Round:
    """One round of a choice.

    Attributes:
        least, most: Parts of the samples that are not held out which its statistics see.
        text: Characters of text that are enough, between these.
        blocks: Part of the blocks of each tower that is quantized.
        fewest_blocks: Blocks that are quantized at least.
        kept: Alternatives that go on to the next round.
    """

    least: float
    most: float
    text: int
    blocks: float
    fewest_blocks: int
    kept: int


ROUNDS = (
    Round(least=0.125, most=1.0, text=ENOUGH_TEXT, blocks=0.13, fewest_blocks=4, kept=2),
    Round(least=0.25, most=1.0, text=2 * ENOUGH_TEXT, blocks=0.25, fewest_blocks=8, kept=1),
)
"""Rounds of a choice."""
CLEAR_ERRORS, CLEAR_PART = 3.0, 0.1
"""Standard errors, and part of the next best loss, by which the first must lead to win at once."""


def quantize_best(asked: Request) -> Result:
    """Quantize a checkpoint by the alternative of the recipe that loses least.

    Where the recipe quantizes the vision tower or the projector beside the language model, each of
    the two parts has a choice of its own, and what is chosen for both is tried once against the
    best single alternative.

    Raises:
        PrismQuantError: With what is wrong, where, and the remedy. All that can be checked is
            checked before any long work.
    """
    bound = bind(asked.model)
    refuse_inside(asked.out, bound.folder)
    names, failed = _fitting(asked, bound)
    for line in bounded_outputs(bound):
        asked.reporter.remark(line)
    parts = hold_out(_samples(asked), asked.recipe.calibration.seed)
    directory = RunDirectory(asked.out)
    first = asked.ranks.rank == 0
    with directory.claimed(resume=asked.resume) if first else nullcontext():
        choice = _Contest(asked, bound, directory, parts).choice(names, failed)
    asked.reporter.remark(f"{choice.told} was chosen: {'; '.join(choice.why.values())}")
    whole = choice.chosen.get(WHOLE)
    recipe = asked.recipe.chosen(whole) if whole else asked.recipe.combined(choice.chosen)
    # In the order of the source, whatever was held out before.
    return perform(replace(asked, recipe=recipe, choice=choice))


def _fitting(asked: Request, bound: BoundModel) -> tuple[list[str], list[MethodTrial]]:
    """Names of the alternatives that can be laid over the model, and why the others cannot.

    Raises:
        PlanError: None can.
    """
    names, failed, first = [], [], None
    for one in asked.recipe.choose:
        try:
            plan = make_plan(asked.recipe.chosen(one.name), bound)
            # A tower that cannot be rotated is told here, before any trial.
            source_reader(plan, bound)
            if asked.ranks.size > 1:
                require_sharable(plan)
        except PrismQuantError as error:
            first = first or error
            failed.append(
                MethodTrial(one.name, 0, 0, failure="\n".join(error.findings) or error.what)
            )
            asked.reporter.remark(f"{one.name} is left out: {failed[-1].told_failure}")
        else:
            names.append(one.name)
    if not names:
        raise PlanError(
            "no alternative of the recipe fits this model:"
            + listed([f"{one.name}: {one.told_failure}" for one in failed]),
            where=f"recipe {asked.recipe.name!r}",
            findings=[f"{one.name}: {line}" for one in failed for line in one.failure.split("\n")],
        ) from first
    return names, failed


def _samples(asked: Request) -> tuple[Sample, ...]:
    """All calibration samples.

    Raises:
        DataError: There are none, or they cannot be read.
    """
    if asked.calibration is None:
        raise DataError(
            f"recipe {asked.recipe.name!r} chooses among "
            f"{', '.join(one.name for one in asked.recipe.choose)} by what they lose on samples",
            remedy="give --calib FILE, or a recipe that leaves no choice",
        )
    settings = asked.recipe.calibration
    left = memory_room(asked.memory_budget) - resident_bytes()
    return read_samples(
        asked.calibration,
        limit=settings.samples,
        seed=settings.seed,
        most_bytes=left,
        windows=asked.windows,
    )


class _Contest:
    """Trials of alternatives, round by round, or the rest of those that were cut off.

    Args:
        asked: The request.
        bound: The model.
        directory: Of the run.
        samples: Samples held out, and the others.
    """

    def __init__(
        self, asked: Request, bound: BoundModel, directory: RunDirectory, samples: HeldOut
    ) -> None:
        self._asked, self._bound, self._samples = asked, bound, samples
        self._file = TrialFile(directory.choice_folder)
        self._identity = _identity(asked, bound, samples)
        self._runs = TrialRuns(asked, bound, samples.held_out, directory)
        self._known: list[MethodTrial] = []
        self._trials: list[MethodTrial] = []
        self._seen: dict[str, None] = {}
        self._names: Sequence[str] = ()

    def choice(self, names: Sequence[str], failed: Sequence[MethodTrial]) -> MethodChoice:
        """Choose an alternative for each part of the model.

        Args:
            names: Of those that can be laid over the model.
            failed: The others.
        """
        asked, first = self._asked, self._asked.ranks.rank == 0
        known = self._file.begin(self._identity, resume=asked.resume) if first else []
        told = asked.ranks.gather_json([vars(trial) for trial in known])[0]
        self._known = [MethodTrial(**one) for one in told]
        self._names = names
        chosen: dict[str, str] = {}
        with unchanged(self._bound.folder, self._identity.files), self._runs:
            for part, recipes in parts_of(asked.recipe, names, self._bound).items():
                chosen[part] = self._winner(part, recipes)
            chosen = self._together(chosen, names)
        why = {part: _why(part, name, self._trials) for part, name in chosen.items()}
        if len(chosen) > 1 and any(trial.part == WHOLE for trial in self._trials):
            why[WHOLE] = f"together {_why(WHOLE, told_parts(chosen), self._trials)}"
        return MethodChoice(
            recipe=asked.recipe.name,
            chosen=chosen,
            why=why,
            weights={str(name): weight for name, weight in DEFAULT_WEIGHTS.items() if weight},
            held_out=tuple(sample.id for sample in self._samples.held_out),
            seen=tuple(self._seen),
            trials=(*failed, *self._trials),
        )

    def _winner(self, part: str, whole: Mapping[str, Recipe]) -> str:
        """Name of the alternative that loses least in a part of the model."""
        names = [*whole]
        if len(names) == 1 and part != WHOLE:
            return names[0]
        for number, one in enumerate(ROUNDS):
            if number and len(names) < 2:
                break
            ranked, complete = self._round(part, {name: whole[name] for name in names}, number)
            names = [t.name for t in ranked[: 1 if leads_clearly(ranked) else one.kept]]
            if not names:
                raise _nothing_works(self._asked, self._trials)
            if complete:
                # More samples alone seldom change what wins.
                break
        return names[0]

    def _together(self, chosen: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
        """The choices of the parts, unless one alternative for the whole model loses less.

        What is lost in one part may hang on the other, which was in floating point so far.
        """
        recipe, joined = self._asked.recipe, told_parts(chosen)
        alone = one_for_all(recipe, chosen, names, self._trials)
        if alone is None:
            return dict(chosen)
        tried = {joined: recipe.combined(chosen), alone: recipe.chosen(alone)}
        ranked, _ = self._round(WHOLE, tried, 0)
        return {WHOLE: alone} if ranked and ranked[0].name == alone else dict(chosen)

    def _round(
        self, part: str, whole: Mapping[str, Recipe], number: int
    ) -> tuple[list[MethodTrial], bool]:
        """Trials of a round, the best first, and whether they were of all blocks."""
        one, asked, rest = ROUNDS[number], self._asked, self._samples.rest
        least, most = (math.ceil(share * len(rest)) for share in (one.least, one.most))
        least = max(FEWEST, asked.ranks.size, least)
        seen = enough_of(rest, least, most, one.text, asked.recipe.calibration.seed)
        self._seen |= dict.fromkeys(sample.id for sample in seen)
        recipes, complete = trial_recipes(whole, self._bound, one.blocks, one.fewest_blocks)
        asks = [Ask(part, name, number, recipes[name], seen) for name in whole]
        self._runs.expect(asks)
        return _best_first([self._trial(ask) for ask in asks]), complete

    def _trial(self, ask: Ask) -> MethodTrial:
        """One trial, made now or known from before."""
        place = (ask.part, ask.name, ask.round)
        trial = next((t for t in self._known if (t.part, t.name, t.round) == place), None)
        if trial is None:
            self._require_memory()
            trial = self._runs.run(ask)
            self._asked.reporter.remark(trial_line(trial))
        self._trials.append(trial)
        if self._asked.ranks.rank == 0:
            self._file.save(self._identity, [*self._trials, *self._known[len(self._trials) :]])
        return trial

    def _require_memory(self) -> None:
        """See once, before the first trial that is made, that all of them fit into memory."""
        names, self._names = self._names, ()
        if names:
            whole = {name: self._asked.recipe.chosen(name) for name in names}
            self._runs.require_memory(whole, (*self._samples.held_out, *self._samples.rest))


def _best_first(trials: Sequence[MethodTrial]) -> list[MethodTrial]:
    """Trials that did not fail, by their loss; of equals the first."""
    return sorted((t for t in trials if t.loss is not None), key=lambda t: t.loss or 0.0)


def _why(part: str, name: str, trials: Sequence[MethodTrial]) -> str:
    """The winner's lead over the next best of the last round, in words."""
    own = [trial for trial in trials if trial.part == part]
    if not own:
        return f"{name} is all that can be chosen there"
    last = max(trial.round for trial in own)
    best, *others = _best_first([trial for trial in own if trial.round == last])
    said = f"its held-out loss is {best.loss:.3g}"
    if not others:
        return f"{said}, and no other alternative could be tried"
    lead, error = _lead(best, others[0])
    return f"{said}, {lead:.2g} ± {error:.1g} below that of {others[0].name}"


def leads_clearly(ranked: Sequence[MethodTrial]) -> bool:
    """Whether the first of a round's trials is so far ahead that another round is not needed."""
    if len(ranked) < 2:
        return False
    lead, error = _lead(ranked[0], ranked[1])
    return lead > CLEAR_ERRORS * error and lead > CLEAR_PART * (ranked[1].loss or 0.0)


def _lead(best: MethodTrial, other: MethodTrial) -> tuple[float, float]:
    """Difference of two losses, with its standard error from differences sample by sample."""
    own, parts = best.parts or {}, other.parts or {}
    gaps = [parts[name] - own[name] for name in own]
    mean = math.fsum(gaps) / len(gaps)
    spread = math.fsum((gap - mean) ** 2 for gap in gaps)
    return math.fsum(gaps), math.sqrt(spread * len(gaps) / (len(gaps) - 1))


def trial_line(trial: MethodTrial) -> str:
    """One trial in words."""
    where = "" if trial.part == WHOLE else f" in the {trial.part} part"
    said = f"tried {trial.name}{where} on {trial.samples} samples"
    if trial.loss is None:
        return f"{said}: it failed: {trial.told_failure}"
    return f"{said}: held-out loss {trial.loss:.3g} ± {trial.error:.1g} ({trial.seconds:.0f} s)"


def _nothing_works(asked: Request, trials: Sequence[MethodTrial]) -> PlanError:
    failed = [one for one in trials if one.failure]
    remedies = dict.fromkeys(one.remedy for one in failed if one.remedy)
    return PlanError(
        "all alternatives of the recipe failed:"
        + listed([f"{one.name}: {one.told_failure}" for one in failed]),
        where=f"recipe {asked.recipe.name!r}",
        remedy="; ".join(remedies) or "take a recipe with another method: `prismquant recipe list`",
        findings=[f"{one.name}: {line}" for one in failed for line in one.failure.split("\n")],
    )


def _identity(asked: Request, bound: BoundModel, parts: HeldOut) -> Identity:
    """Everything that decides the losses."""
    settings: Mapping[str, Any] = {
        "recipe": asked.recipe.to_dict(),
        "rounds": [dataclasses.asdict(one) for one in ROUNDS],
        "clear": [CLEAR_ERRORS, CLEAR_PART],
        "weights": dict(DEFAULT_WEIGHTS),
        "limits": dataclasses.asdict(asked.limits),
    }
    precision = Precision.chosen(asked.wanted, asked.target, bound.dtype, runs=True)
    return Identity(
        plan=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        files=stamp_files(bound.folder, source_files(bound.folder)),
        samples=fingerprint_samples((*parts.held_out, *parts.rest)),
        inputs="",
        arithmetic=f"{asked.target.type} {precision.describe()}",
        versions=code_versions() | described_versions(bound.folder, bound.arch),
    )
