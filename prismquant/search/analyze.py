"""Analyzing a model: from a request to a sensitivity, unit by unit."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prismquant.data import Sample, read_samples, require_modalities
from prismquant.data.batches import Batch
from prismquant.data.lengths import by_length
from prismquant.data.windows import Windows
from prismquant.engine.collectives import share_of
from prismquant.engine.memory_forecast import count_tokens, kept_for_gradients
from prismquant.engine.placement import Placement, Store
from prismquant.errors import ArgumentError, DataError, grouped
from prismquant.families.true_replay import require_true_replay
from prismquant.memory import keep_heap_compact, resident_bytes
from prismquant.models.arch import Modality
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.outputs import require_result_file
from prismquant.plan.plan import Plan
from prismquant.quantization.prepare import (
    forecast_memory,
    memory_room,
    source_files,
    surveyed_batches,
)
from prismquant.run.directory import NOTHING_TO_RESUME
from prismquant.run.fingerprint import (
    code_versions,
    described_versions,
    fingerprint_batches,
    fingerprint_samples,
    stamp_files,
    unchanged,
)
from prismquant.run.identity import Identity, json_digest
from prismquant.runtime.mixed import Precision
from prismquant.search.analysis import Analysis, UnitScores
from prismquant.search.analysis_notes import analysis_notes
from prismquant.search.analysis_request import AnalysisRequest
from prismquant.search.choices import Choices, UnitRows, make_choices
from prismquant.search.partial_scores import AnalysisIdentity, PartialScores
from prismquant.search.sample_weights import with_sample_weights
from prismquant.search.sensitivity import (
    SENSITIVITY_VERSION,
    TOKEN_CLASSES,
    ChoiceUnit,
    Sensitivity,
    TokenClass,
)
from prismquant.search.sensitivity_file import write_sensitivity
from prismquant.search.token_places import count_places
from prismquant.version import __version__


@dataclass(frozen=True)
class _Prepared:
    """An analysis that can begin.

    Attributes:
        samples: Calibration samples of all ranks.
        batches: Batches of this rank.
        placement: Where units run.
        kept: Where that waits which a method comes back to.
        room: Bytes that the process may take.
        tokens: Places of all ranks by class.
        identity: What decides the scores.
        notes: What a user should know of the data.
    """

    samples: tuple[Sample, ...]
    batches: tuple[Batch, ...]
    placement: Placement
    kept: Store
    room: int
    tokens: Mapping[TokenClass, int]
    identity: AnalysisIdentity
    notes: tuple[str, ...]


def analyze_model(asked: AnalysisRequest) -> Sensitivity:
    """Score every unit of choice of a model, and write the result.

    Returns:
        The sensitivity, as it was written by the first rank.

    Raises:
        PrismQuantError: With what is wrong, where, and the remedy. All that can be checked is
            checked before any long work.
    """
    read = [path for path in (asked.model, asked.calibration) if path and Path(path).exists()]
    keys = [one.name for one in dataclasses.fields(Sensitivity)]
    require_result_file(asked.out, inputs=map(Path, read), keys=keys)
    bound = bind(asked.model)
    choices = make_choices(
        bound,
        asked.formats,
        solver=asked.solver,
        modalities=asked.modalities,
        disable=asked.disable,
    )
    partial, first = PartialScores(asked.out), asked.ranks.rank == 0
    with partial.claimed(resume=asked.resume) if first else nullcontext():
        ready = _prepare(asked, bound, choices)
        for note in (*choices.notes, *ready.notes):
            asked.reporter.remark(note)
        names = [one.unit.name for one in choices.units]
        towers = {one.unit.name: one.unit.modality for one in choices.units}
        done = partial.begin(ready.identity, names) if first else []
        if first and asked.resume and not done:
            asked.reporter.remark(NOTHING_TO_RESUME)
        plain = _scored(asked, bound, choices, ready, partial, done)
        # In the order of the units, so that sums do not depend on what an earlier run had done.
        ordered = [plain[name] for name in names if name in plain]
        scores = {one.unit: one for one in with_sample_weights(ordered, towers)}
        found = _sensitivity(asked, bound, choices, ready, scores)
        _require_any_score(found, asked)
        for note in found.notes[len(choices.notes) + len(ready.notes) :]:
            asked.reporter.remark(note)
        if first:
            write_sensitivity(asked.out, found)
            partial.close()
    return found


def _prepare(asked: AnalysisRequest, bound: BoundModel, choices: Choices) -> _Prepared:
    """Read the samples, look at all of them once, and forecast the memory."""
    ranks, room = asked.ranks, memory_room(asked.memory_budget)
    samples = _samples(asked, choices, room)
    if samples:
        require_true_replay(bound, trust_remote_code=asked.trust_remote_code)
    size = _batch_size(asked)
    # Texts apart: batches without a picture are not run for units of the vision tower.
    order = sorted(by_length(samples), key=lambda sample: sample.kind != "text")
    own = share_of(order, size, ranks)
    batches, found = surveyed_batches(
        own,
        bound,
        batch_size=size,
        limits=asked.limits,
        device=asked.target,
        room=room,
        trust_remote_code=asked.trust_remote_code,
    )
    precision = _precision(asked, bound)
    hungry = _hungriest(bound, choices)
    memory, found = forecast_memory(
        hungry, bound, batches, found, asked.memory_budget, asked.target, precision
    )
    tokens_of = count_tokens(bound, found.batches)
    coming_back = kept_for_gradients(
        bound,
        len(found.batches),
        tokens_of,
        precision,
        losses=asked.method.losses_back,
        whole=True,
    )
    kept: Store = "disk" if memory.peak_bytes + coming_back > room else memory.placement.states
    told = ranks.gather_json([list(found.prints), count_places(found.batches, bound)])
    tokens: Counter[TokenClass] = Counter()
    for _, counted in told:
        tokens.update(counted)
    run = Identity(
        plan="",
        files=stamp_files(bound.folder, source_files(bound.folder)),
        samples=fingerprint_samples(samples),
        inputs=fingerprint_batches(sorted(one for prints, _ in told for one in prints)),
        arithmetic=f"{asked.target.type} {precision.describe()}",
        versions=code_versions() | described_versions(bound.folder, bound.arch),
    )
    settings = _settings(asked, choices)
    identity = AnalysisIdentity(settings, replace(run, plan=json_digest(settings)))
    counts = {name: tokens[name] for name in TOKEN_CLASSES if tokens[name]}
    notes = (*found.remarks(answers=True), *analysis_notes(bound, samples, counts, asked))
    return _Prepared(samples, found.batches, memory.placement, kept, room, counts, identity, notes)


def _batch_size(asked: AnalysisRequest) -> int:
    """Samples that are run together."""
    return 1 if asked.method.one_by_one else asked.batch_size


def _samples(asked: AnalysisRequest, choices: Choices, room: int) -> tuple[Sample, ...]:
    """The calibration samples; none where nothing looks at them.

    Raises:
        DataError: There are none, or the vision tower is to be scored without any picture.
    """
    static = any(
        row.observed for one in choices.units for rows in one.rows.values() for row in rows
    )
    if not asked.method.needs_samples and asked.solver == "rtn" and not static:
        return ()
    if asked.calibration is None:
        raise DataError(
            f"the method {asked.method_name} needs calibration samples", remedy="give --calib FILE"
        )
    left = room - resident_bytes()
    samples = read_samples(
        asked.calibration,
        limit=asked.samples,
        seed=asked.seed,
        most_bytes=left,
        windows=Windows(asked.model, asked.limits.seq_length, asked.trust_remote_code),
    )
    chosen = [one.unit for one in choices.units if len(one.unit.options) > 1]
    if any(unit.modality != Modality.LLM for unit in chosen):
        try:
            require_modalities(samples, {"vision"})
        except DataError as error:
            raise DataError(
                "no sample shows a picture or a clip, so vision tower and projector have no scores",
                where=str(asked.calibration),
                remedy="add samples with pictures, or choose for the language model alone: "
                "--modalities llm",
            ) from error
    return samples


def _precision(asked: AnalysisRequest, bound: BoundModel) -> Precision:
    """Rounding of products would hide the losses of good formats: float32, where it is free."""
    if asked.wanted is None and asked.target.type == "cpu":
        return Precision(torch.float32)
    return Precision.chosen(asked.wanted, asked.target, bound.dtype)


def _hungriest(bound: BoundModel, choices: Choices) -> Plan:
    """The plan whose statistics take the most memory."""
    plans = list(choices.plans.values())
    return max(plans, key=lambda plan: (plan.needs_data, len(plan.quantized)))


def _settings(asked: AnalysisRequest, choices: Choices) -> dict[str, Any]:
    """Settings that decide the scores, as JSON types."""
    content = {
        "method": asked.method_name,
        "options": asdict(asked.method),
        "solver": asked.solver,
        "batch_size": _batch_size(asked),
        "seed": asked.seed,
        "formats": {name: asdict(choice) for name, choice in choices.formats.items()},
        "units": {
            one.unit.name: [option.format for option in one.unit.options] for one in choices.units
        },
    }
    read: dict[str, Any] = json.loads(json.dumps(content))
    return read


def _scored(
    asked: AnalysisRequest,
    bound: BoundModel,
    choices: Choices,
    ready: _Prepared,
    partial: PartialScores,
    done: Sequence[UnitScores],
) -> dict[str, UnitScores]:
    """Scores of all units, those of an earlier analysis among them."""
    ranks, states = asked.ranks, ready.placement.states
    found = {one.unit: one for one in done}
    passed_over = frozenset(ranks.gather_json(sorted(found))[0])
    numbers = {one.unit.name: number for number, one in enumerate(choices.units)}
    losses: dict[str, dict[str, dict[str, float]]] = {}

    def solved(unit: str, option: str, layer: str, loss: float) -> None:
        losses.setdefault(unit, {}).setdefault(option, {})[layer] = loss

    with (
        partial.activation_store(states, f"{ranks.rank}-units") as store,
        partial.activation_store(ready.kept, f"{ranks.rank}-kept") as kept,
        unchanged(bound.folder, ready.identity.run.files) as look,
    ):
        analysis = Analysis(
            bound=bound,
            choices=choices,
            batches=ready.batches,
            placement=ready.placement,
            store=store,
            kept=kept,
            seed=asked.seed,
            done=passed_over,
            room=ready.room,
            stage=asked.reporter.stage,
            solved=solved,
            ranks=ranks,
        )
        asked.reporter.begin(len(analysis.wanted))
        if not analysis.wanted:
            return found
        keep_heap_compact()
        started = time.monotonic()
        for scores in asked.method.scores(analysis):
            look()
            scores = replace(scores, layer_losses=losses.pop(scores.unit, {}))
            found[scores.unit] = scores
            if ranks.rank == 0:
                partial.add(numbers[scores.unit], scores)
            asked.reporter.scored(scores, time.monotonic() - started)
            started = time.monotonic()
    return found


def _sensitivity(
    asked: AnalysisRequest,
    bound: BoundModel,
    choices: Choices,
    ready: _Prepared,
    scores: Mapping[str, UnitScores],
) -> Sensitivity:
    run = ready.identity.run
    units = tuple(_with_scores(one, scores.get(one.unit.name)) for one in choices.units)
    unscored = [f"{unit.name} has no score by this method" for unit in units if _lacks_scores(unit)]
    identity = {
        "settings": run.plan,
        "files": run.files_digest,
        "samples": run.samples_digest,
        "inputs": run.inputs,
        "arithmetic": run.arithmetic,
        "versions": json_digest(run.versions),
    }
    return Sensitivity(
        version=SENSITIVITY_VERSION,
        written_by=__version__,
        model=str(asked.model),
        architecture=bound.arch.name,
        identity=identity,
        method=asked.method_name,
        options={
            **ready.identity.settings["options"],
            "seed": asked.seed,
            "batch_size": _batch_size(asked),
            "modalities": list(asked.modalities),
            "disable": list(asked.disable),
        },
        solver=asked.solver,
        solver_options={},
        calibration={
            "source": str(asked.calibration or ""),
            "samples": dict(Counter(sample.kind for sample in ready.samples)),
            "tokens": dict(ready.tokens),
            "seq_length": asked.limits.seq_length,
        },
        weights=dict(asked.weights),
        formats=choices.formats,
        units=units,
        fixed_bytes=choices.fixed_bytes,
        fixed_weights=choices.fixed_weights,
        notes=(*choices.notes, *ready.notes, *grouped(unscored)),
    )


def _require_any_score(found: Sensitivity, asked: AnalysisRequest) -> None:
    """Refuse a result of which no search could make anything.

    Raises:
        ArgumentError: No unit has a score.
    """
    if not any(option.scores for unit in found.units for option in unit.options):
        raise ArgumentError(
            f"the method {asked.method_name} scores none of the formats on offer",
            where="--method and --formats",
            remedy="use another --method, or offer formats of weights",
        )


def _with_scores(one: UnitRows, scores: UnitScores | None) -> ChoiceUnit:
    if scores is None:
        return one.unit
    names = [layer.name for layer in one.unit.layers]
    options = []
    for option in one.unit.options:
        own = scores.layer_losses.get(option.format, {})
        losses = tuple(own.get(name, 0.0) for name in names) if own else ()
        ordered = _ordered(scores.scores.get(option.format, {}))
        options.append(replace(option, scores=ordered, layer_losses=losses))
    return replace(one.unit, options=tuple(options))


def _lacks_scores(unit: ChoiceUnit) -> bool:
    return any(not option.scores for option in unit.options[1:])


def _ordered(scores: Mapping[TokenClass, Any]) -> dict[TokenClass, Any]:
    return {name: scores[name] for name in TOKEN_CLASSES if name in scores}
