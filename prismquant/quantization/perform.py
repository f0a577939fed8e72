"""Performing a request: plan, prepare, quantize unit by unit, and finish the checkpoint."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from prismquant.data.batches import Batch
from prismquant.diagnostics.failed_layers import failure_lines
from prismquant.diagnostics.predictions import Predictions
from prismquant.diagnostics.step_record import StepRecord
from prismquant.distributed import Ranks
from prismquant.engine.activation_store import ActivationStore
from prismquant.engine.collectives import require_sharable
from prismquant.engine.gradients import vision_weights
from prismquant.engine.memory_forecast import Forecast, count_tokens, kept_for_gradients
from prismquant.engine.placement import Store
from prismquant.engine.run import run
from prismquant.engine.setup import Reporter, RunSetup
from prismquant.errors import StorageError
from prismquant.export.companions import files_to_copy, links_outside, links_remark
from prismquant.export.compressed_tensors.writer import CheckpointWriter
from prismquant.families.copy_arch import copy_arch
from prismquant.memory import peak_memory_bytes
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.models.config import read_config
from prismquant.models.given_arch import own_arch_file
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import Plan, PlanRow
from prismquant.quantization.prepare import Prepared, prepare
from prismquant.quantization.request import Request, Result
from prismquant.recipe.resolve import resolve
from prismquant.run.directory import NOTHING_TO_RESUME, RunDirectory
from prismquant.run.environment import environment
from prismquant.run.fingerprint import unchanged
from prismquant.run.record import RunRecord, refuse_nonfinite, told_of
from prismquant.runtime.mixed import Precision

_UNREAD = "the recipe needs no calibration data: those that were given were not read"


def perform(asked: Request) -> Result:
    """Quantize a checkpoint.

    Raises:
        PrismQuantError: With what is wrong, where, and the remedy. All that can be checked is
            checked before any long work.
    """
    bound = bind(asked.model)
    plan = make_plan(asked.recipe, bound)
    asked = _with_valid_prediction(asked, plan)
    for line in () if asked.translation is None else asked.translation.lines():
        asked.reporter.remark(line)
    if not plan.needs_data:
        plan = replace(plan, remarks=(*plan.remarks, *_unread(asked)))
        asked = replace(asked, calibration=None)
    if asked.ranks.size > 1:
        require_sharable(plan)
    precision = Precision.chosen(asked.wanted, asked.target, bound.dtype, runs=plan.needs_data)
    refuse_inside(asked.out, bound.folder)
    directory = RunDirectory(asked.out)
    first = asked.ranks.rank == 0
    with directory.claimed(resume=asked.resume) if first else nullcontext(True) as locked:
        if first:
            directory.require_space(plan.total_bytes + _copied_bytes(bound))
        ready = prepare(asked, bound, plan, precision)
        # Trials of a choice may have been resumed, though nothing of the run was there.
        resumed = directory.record_path.exists() or asked.choice is not None
        anew = [NOTHING_TO_RESUME] if asked.resume and not resumed else []
        predictions, unknown = asked.predict(ready.plan, ready.identity) if first else (None, [])
        record = _begun(asked, bound, ready, directory, predictions, locked=locked)
        earlier: tuple[str, ...] = ()
        if not record.finished:
            record = _quantized(asked, bound, ready, directory, record, precision)
            earlier = record.restarts[-1].notes if record.restarts else ()
        own = own_arch_file(bound.folder, read_config(bound.folder).get("model_type"))
        brought = copy_arch(own, asked.out) if first and own is not None else ()
        # A run that is resumed keeps those that it began with.
        lost = unknown if record.predictions == predictions else []
        told = (*_notes(record, bound, directory, brought), *_prediction(asked), *lost)
        notes = (*anew, *earlier, *told)
        return Result(asked.out, ready.plan, record, notes)


def _unread(asked: Request) -> list[str]:
    """Remarks on data, and on options about them, that the recipe has no use for."""
    unread = [_UNREAD] if asked.calibration is not None else []
    if asked.of_data:
        have = "has" if len(asked.of_data) == 1 else "have"
        options = f"{', '.join(asked.of_data)} {have} no effect"
        unread.append(f"the recipe needs no calibration data: {options}")
    return unread


def _begun(
    asked: Request,
    bound: BoundModel,
    ready: Prepared,
    directory: RunDirectory,
    predictions: Predictions | None,
    *,
    locked: bool,
) -> RunRecord:
    """The record of the run as it begins, or of the one that is resumed; alike on all ranks."""
    record = RunRecord(
        identity=ready.identity,
        model=str(asked.model),
        calibration=str(asked.calibration or ""),
        samples=dict(Counter(sample.kind for sample in ready.samples)),
        environment=environment(asked.target) | _unusual(bound, asked.ranks, locked=locked),
        memory=_told(ready.memory, asked.memory_budget),
        choice=asked.choice,
        translation=asked.translation,
        predictions=predictions,
    )
    if asked.ranks.rank == 0:
        record = directory.begin(record, ready.plan, asked.recipe, resume=asked.resume)
    record = RunRecord.from_dict(asked.ranks.gather_json(record.to_dict())[0])
    if asked.strict:
        refuse_nonfinite(record.damaged, bound.folder)
    return record


def _quantized(
    asked: Request,
    bound: BoundModel,
    ready: Prepared,
    directory: RunDirectory,
    record: RunRecord,
    precision: Precision,
) -> RunRecord:
    """Do what is left of the run; the record of all of it on the first rank."""
    ranks, placement = asked.ranks, ready.memory.placement
    writer = CheckpointWriter(asked.out, bound, ready.plan, strict=asked.strict, see=asked.see)
    tokens = count_tokens(bound, ready.surveyed)
    kept = kept_for_gradients(bound, len(ready.answers), tokens, precision)
    # Blocks' outputs wait in files where they do not fit beside all else.
    wait: Store = "disk" if ready.memory.peak_bytes + kept > ready.room else "device"
    with (
        directory.activation_store(ranks.rank, placement.states, "units") as store,
        directory.activation_store(ranks.rank, wait, "gradients") as outputs,
    ):
        setup = RunSetup(
            plan=ready.plan,
            bound=bound,
            batches=_given_away(ready.surveyed),
            sink=writer,
            reporter=asked.reporter,
            placement=placement,
            store=store,
            done={step.name: step for step in record.steps},
            ranks=ranks,
        )
        gradients = replace(ready.batches, parts=tuple((sample,) for sample in ready.answers))
        # Closed before anything else: the workers of a stream must not outlive the run.
        with contextlib.closing(_remaining(setup, gradients, outputs)) as steps:
            if ranks.rank == 0:
                return _recorded(steps, record, directory, writer, asked.reporter)
            deque(steps, maxlen=0)
    return record


def _recorded(
    steps: Iterator[StepRecord],
    record: RunRecord,
    directory: RunDirectory,
    writer: CheckpointWriter,
    reporter: Reporter,
) -> RunRecord:
    """Note every step when its shard is durable, then finish the checkpoint."""
    source, files = writer.bound.folder, record.identity.files
    with directory.unpublished_on_error(), unchanged(source, files) as look:
        for step in steps:
            look()
            step = replace(step, nonfinite=writer.nonfinite.get(step.shard, {}))
            for line in _damage(step.nonfinite):
                reporter.remark(line)
            record = directory.add(record, step, peak_memory_bytes())
        loose = writer.finish()
    return directory.finish(replace(record, nonfinite=loose), writer.last_files)


def _notes(
    record: RunRecord, bound: BoundModel, directory: RunDirectory, brought: Collection[str]
) -> tuple[str, ...]:
    """Notes on what did not go as a user may expect.

    Args:
        record: Of the run.
        bound: The model.
        directory: Of the run.
        brought: Files that are no part of the record and were put there all the same.
    """
    failed, damaged = failure_lines(record.steps), _damage(record.damaged)
    found = directory.foreign_files(record) if record.finished else []
    foreign = [name for name in found if name not in brought]
    beside = f"files that the run has not written lie in its folder: {', '.join(foreign)}"
    return (*failed, *damaged, *links_remark(bound.folder), *[beside] * bool(foreign))


def _with_valid_prediction(asked: Request, plan: Plan) -> Request:
    """The request, without what a search predicted of the model where that is of something else."""
    if asked.recipe.predicted is None:
        return asked

    def is_changed(row: PlanRow) -> bool:
        site, had = row.site, row.config
        meant = resolve(asked.recipe, modality=site.modality, role=site.role, name=site.name).config
        return (had.weights, had.activations) != (meant.weights, meant.activations)

    why = asked.unpredicted
    if not why and (fallen := sum(map(is_changed, plan.quantized))):
        why = f"its formats do not fit {fallen} of the layers, which have fallen back to others"
    if not why:
        return asked
    return replace(asked, recipe=asked.recipe.without_predicted(), unpredicted=why)


def _prediction(asked: Request) -> list[str]:
    """Note on what a search has predicted, which a run does not measure."""
    if asked.unpredicted:
        return [f"the KL divergence that a search predicted is left out: {asked.unpredicted}"]
    told = ", ".join(f"{kind} {loss:.3g}" for kind, loss in (asked.recipe.predicted or {}).items())
    what = (
        f"a search predicted a KL divergence a token of: {told}; `prismquant eval {asked.out} "
        f"--reference {asked.model} --data DATA` shows it beside what it measures"
    )
    return [what] if told else []


def _damage(nonfinite: Mapping[str, str]) -> list[str]:
    return [f"kept damaged, as it is in the source: {line}" for line in told_of(nonfinite)]


def _unusual(bound: BoundModel, ranks: Ranks, *, locked: bool) -> dict[str, str]:
    """Unusual facts of the surroundings, for the record."""
    told = {} if locked else {"lock": "none"}
    if bound.source is not None:
        told["source"] = bound.source.describe()
    if left := links_outside(bound.folder):
        told["links_outside"] = ", ".join(left)
    return told | ({"ranks": str(ranks.size)} if ranks.size > 1 else {})


def _told(memory: Forecast, budget: int | None) -> dict[str, int | str]:
    """A forecast for the record."""
    told: dict[str, int | str] = {
        "predicted_peak_bytes": memory.peak_bytes,
        "where": memory.where,
        "placement": memory.placement.describe(),
    }
    return told | ({} if budget is None else {"budget_bytes": budget})


def _given_away(batches: list[Batch]) -> Iterator[Batch]:
    """The batches, of which nothing is held here once they are taken."""
    while batches:
        yield batches.pop(0)


def _remaining(
    setup: RunSetup, gradients: Sequence[Batch], outputs: ActivationStore
) -> Generator[StepRecord, None, None]:
    """Do the units that no earlier run has finished; nothing at all if there are none.

    Args:
        setup: The run.
        gradients: What gradients are taken of.
        outputs: Where blocks' outputs wait for these.
    """
    if all(step.name in setup.done for step in setup.bound.steps):
        return
    if gradients:
        setup.reporter.stage("model", "gradients")
    # Not a part of the record: model, data and plan decide them, and those are.
    weights = vision_weights(setup.plan, setup.bound, gradients, setup.placement, outputs)
    yield from run(replace(setup, vision_weights=weights))


def _copied_bytes(bound: BoundModel) -> int:
    return sum(path.stat().st_size for path in files_to_copy(bound.folder))


def refuse_inside(out: Path, source: Path) -> None:
    """Refuse a result in the source's folder: it would be taken for a part of the source.

    Raises:
        StorageError: It is to lie there.
    """
    if out.resolve().is_relative_to(source.resolve()):
        raise StorageError(
            "the output folder is the source model's, or lies in it",
            where=str(out),
            remedy="choose another --out",
        )
