"""The main job as functions: inspect, quantize, load, measure.

Each puts together what the layers below do, in the order recipe, bind, plan, engine, export.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prismquant.arguments import (
    FLOATS,
    MAX_BATCH,
    as_arithmetic,
    as_bytes,
    as_choice,
    as_count,
    as_device,
    as_dtype,
    as_flag,
    as_path,
    as_source,
    default_modes,
)
from prismquant.data import Sample, read_samples, require_modalities
from prismquant.data.batches import Batch, Batches, by_length, make_batches
from prismquant.data.media import Limits
from prismquant.data.survey import Survey, let_go, position_limit, survey
from prismquant.diagnostics.failed_layers import failure_lines
from prismquant.diagnostics.step_record import StepRecord
from prismquant.distributed import Alone, Ranks
from prismquant.engine.activation_store import ActivationStore
from prismquant.engine.collectives import require_sharable, share_of
from prismquant.engine.gradients import gradient_samples, vision_weights, wants_gradients
from prismquant.engine.memory_forecast import (
    Forecast,
    choose_placement,
    count_tokens,
    forecast,
    kept_for_gradients,
)
from prismquant.engine.placement import Store, placements
from prismquant.engine.run import run
from prismquant.engine.setup import Reporter, RunSetup, Silent
from prismquant.errors import DataError, PlanError, StorageError
from prismquant.evaluate.fidelity import evaluate_model
from prismquant.evaluate.figures import Fidelity
from prismquant.evaluate.shared_vocabulary import require_same_vocabulary
from prismquant.export.companions import files_to_copy, links_outside, links_remark
from prismquant.export.compressed_tensors.writer import CheckpointWriter
from prismquant.export.exporter import Progress
from prismquant.export.exporters import EXPORTERS, Exported, build_exporter, export_checkpoint
from prismquant.export.load_quantized import load_model
from prismquant.memory import (
    available_bytes,
    free_device_bytes,
    give_back_freed,
    memory_told,
    peak_memory_bytes,
    readable_bytes,
    resident_bytes,
)
from prismquant.models.arch import Modality
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.models.config import config_value, identify, native_config
from prismquant.models.processor import load_processor
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import Plan
from prismquant.plan.unseen import unseen_vision
from prismquant.recipe.adapt import adapted
from prismquant.recipe.schema import Recipe, load_recipe
from prismquant.run.directory import RunDirectory, environment
from prismquant.run.fingerprint import (
    code_versions,
    fingerprint_batches,
    fingerprint_samples,
    stamp_files,
    unchanged,
)
from prismquant.run.identity import Identity
from prismquant.run.record import RunRecord, refuse_nonfinite, told_of
from prismquant.runtime.mixed import Precision, Wanted
from prismquant.shards import ShardReader

# Tokens of a call on a CPU: products are as fast as with more, and activations as large as these
# come from memory that is already there.
_CPU_TOKENS = 640
# No picture, clip or sample has more of anything.
_MOST = 2**31 - 1

_UNREAD = "the recipe needs no calibration data: those that were given were not read"

RecipeSource = str | Path | Mapping[str, Any] | Recipe


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: The checkpoint.
        plan: What was done.
        record: How well.
        notes: What was damaged, or differs, of the earlier run that this one went on with; which
            layers were rounded to nearest because their solver failed; and which tensors that stay
            in floating point hold NaN or infinities.
    """

    folder: Path
    plan: Plan
    record: RunRecord
    notes: tuple[str, ...] = ()


@default_modes()
def inspect(
    model: str | Path,
    recipe: RecipeSource,
    *,
    kv_cache: str | Mapping[str, Any] | None = None,
    fallback: bool = False,
    on_failure: str | None = None,
    tensor_parallel: int | None = None,
) -> Plan:
    """What a recipe would do to a model. Reads the configuration and the shards' headers, no
    weights.

    Args:
        model: Folder of the checkpoint.
        recipe: A preset's name, a file, a dictionary or a recipe.
        kv_cache: A format of keys and values, added to the recipe; as in :func:`quantize`.
        fallback: Where a format cannot hold a layer's shape, take the nearest.
        on_failure: Where a solver fails: ``stop``, or ``rtn`` to round to nearest.
        tensor_parallel: Devices that will share each layer when it is served.

    Raises:
        ArgumentError, RecipeError, ModelError, PlanError: Something does not fit; the message says
            what.
    """
    folder = as_path(model, "model")
    chosen = adapted(
        load_recipe(recipe),
        kv_cache=kv_cache,
        fallback=fallback,
        on_failure=on_failure,
        tensor_parallel=tensor_parallel,
    )
    return make_plan(chosen, bind(folder, headers_required=False))


@default_modes()
@memory_told("--memory-budget", "--batch-size", "--max-pixels")
def quantize(
    model: str | Path,
    recipe: RecipeSource,
    out: str | Path,
    calibration: str | Path | None = None,
    *,
    samples: int | None = None,
    batch_size: int | None = None,
    solver: str | None = None,
    kv_cache: str | Mapping[str, Any] | None = None,
    fallback: bool = False,
    on_failure: str | None = None,
    tensor_parallel: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
    memory_budget: int | str | None = None,
    ranks: Ranks | None = None,
    strict: bool = False,
    max_pixels: int | None = None,
    max_frames: int | None = None,
    max_length: int | None = None,
) -> Result:
    """Quantize a checkpoint, block by block, into a folder that transformers and vLLM load.

    Args:
        model: Folder of the source checkpoint.
        recipe: A preset's name, a file, a dictionary or a recipe.
        out: Folder of the result; must not exist or be empty, unless ``resume``.
        calibration: A data file or the name of a data set. Not needed by recipes of ``rtn`` and
            dynamic activations.
        samples: At most so many calibration samples, in place of the recipe's number.
        batch_size: Samples run together, in place of the recipe's number.
        solver: Use this method for every layer: ``rtn`` or ``gptq``.
        kv_cache: A format of keys and values (``fp8``, ``int8-head`` ..), or ``none``.
        fallback: Where a format cannot hold a layer's shape, take the nearest.
        on_failure: Where a solver fails: ``stop``, or ``rtn`` to round to nearest.
        tensor_parallel: Devices that will share each layer when it is served.
        device: Where the arithmetic happens, e.g. ``cpu`` or ``cuda:1``. The number of threads is a
            setting of the whole process and left to the caller (``torch.set_num_threads``); only
            the command line chooses one.
        dtype: In which blocks are run, or ``mixed``: float32 with linear layers in bfloat16. By
            default, on a CPU ``mixed`` if it multiplies bfloat16 and the checkpoint is stored in
            it, else float32; on other devices the checkpoint's.
        resume: Go on with a run that was cut off.
        trust_remote_code: Allow code in the checkpoint's folder to build the processor.
        reporter: Is told how far the run is.
        memory_budget: Bytes that the process may take on a CPU, or a size such as ``4GiB``; by
            default what the system can spare. What does not fit waits on disk, in the output
            folder, or is computed again.
        ranks: The processes that share the work, from :func:`prismquant.distributed.joined`; all
            of them call this alike. The first one writes, and returns the record.
        strict: Refuse what is only told otherwise: statistics of the language model that no picture
            and no clip reaches, and NaN or infinities in tensors that stay in floating point.
        max_pixels: Pixels of a picture, or of a frame of a clip, as the model sees it; by default
            as many as the model's processor allows.
        max_frames: Frames of a clip; by default 64 of a file, or as the data say, and all of a
            list.
        max_length: Tokens of a sample; longer ones are cut, which is told. By default a sample
            that is longer than the model allows is refused.

    Raises:
        PrismQuantError: With what is wrong, where, and the remedy. All that can be checked is
            checked before any long work.
    """
    wanted = None if dtype is None else as_arithmetic(dtype)
    of_data = {
        "--samples": samples,
        "--batch-size": batch_size,
        "--max-pixels": max_pixels,
        "--max-frames": max_frames,
        "--max-length": max_length,
    }
    chosen = adapted(
        load_recipe(recipe),
        kv_cache=kv_cache,
        fallback=fallback,
        on_failure=on_failure,
        tensor_parallel=tensor_parallel,
        solver=solver,
        samples=samples,
        batch_size=batch_size,
    )
    return _quantize(
        as_path(model, "model"),
        chosen,
        as_path(out, "out"),
        None if calibration is None else as_source(calibration, "calibration"),
        target=as_device(device),
        wanted=wanted,
        resume=as_flag(resume, "resume"),
        trust_remote_code=as_flag(trust_remote_code, "trust_remote_code"),
        reporter=reporter or Silent(),
        memory_budget=None if memory_budget is None else as_bytes(memory_budget, "memory_budget"),
        ranks=ranks or Alone(),
        strict=as_flag(strict, "strict"),
        limits=_limits(max_pixels, max_frames, max_length),
        of_data=[option for option, value in of_data.items() if value is not None],
    )


def _quantize(
    model: Path,
    recipe: Recipe,
    out: Path,
    calibration: str | Path | None,
    *,
    target: torch.device,
    wanted: Wanted,
    resume: bool,
    trust_remote_code: bool,
    reporter: Reporter,
    memory_budget: int | None,
    ranks: Ranks,
    strict: bool,
    limits: Limits,
    of_data: Sequence[str],
) -> Result:
    """Do what :func:`quantize` says, its arguments checked.

    Options in ``of_data`` were given, and say something of calibration data alone.
    """
    bound = bind(model)
    plan = make_plan(recipe, bound)
    if not plan.needs_data:
        unread = [_UNREAD] if calibration is not None else []
        if of_data:
            have = "has" if len(of_data) == 1 else "have"
            options = f"{', '.join(of_data)} {have} no effect"
            unread.append(f"the recipe needs no calibration data: {options}")
        plan, calibration = replace(plan, remarks=(*plan.remarks, *unread)), None
    if ranks.size > 1:
        require_sharable(plan)
    precision = Precision.chosen(wanted, target, bound.dtype, runs=plan.needs_data)
    _refuse_inside(out, bound.folder)
    directory = RunDirectory(out)
    first = ranks.rank == 0
    with directory.claimed(resume=resume) if first else nullcontext(True) as locked:
        if first:
            directory.require_space(plan.total_bytes + _copied_bytes(bound))
        room = _room(memory_budget)
        samples = _calibration_samples(plan, calibration, room)
        plan = _with_unseen(plan, samples, reporter, strict=strict)
        own = share_of(by_length(samples), recipe.calibration.batch_size, ranks)
        most = _CPU_TOKENS if target.type == "cpu" else None
        size = recipe.calibration.batch_size
        batches = make_batches(
            own,
            load_processor(bound.folder, trust_remote_code=trust_remote_code) if own else None,
            batch_size=size,
            vision_token_ids=bound.vision_token_ids,
            limits=limits,
            most_tokens=most,
        )
        found = survey(batches, most_bytes=room, positions=position_limit(bound.config))
        plan, answers = _with_answers(plan, samples, found, ranks, reporter)
        memory, found = _forecast(plan, bound, batches, found, memory_budget, target, precision)
        identity = _identity(
            plan, bound, samples, found.prints, f"{target.type} {precision.describe()}", ranks
        )
        record = RunRecord(
            identity=identity,
            model=str(model),
            calibration=str(calibration or ""),
            samples=dict(Counter(sample.kind for sample in samples)),
            environment=environment(target) | _unusual(bound, ranks, locked=locked),
            memory=_told(memory, memory_budget),
        )
        if first:
            record = directory.begin(record, plan, recipe, resume=resume)
        record = RunRecord.from_dict(ranks.gather_json(record.to_dict())[0])
        if strict:
            refuse_nonfinite(record.damaged, bound.folder)
        if record.finished:
            return Result(out, plan, record, _notes(record, bound, directory))
        writer = CheckpointWriter(out, bound, plan, strict=strict)
        surveyed = list(found.batches)
        del found
        kept = kept_for_gradients(bound, len(answers), count_tokens(bound, surveyed), precision)
        # Blocks' outputs wait in files where they do not fit beside all else.
        wait: Store = "disk" if memory.peak_bytes + kept > room else "device"
        with (
            directory.activation_store(ranks.rank, memory.placement.states, "units") as store,
            directory.activation_store(ranks.rank, wait, "gradients") as outputs,
        ):
            setup = RunSetup(
                plan=plan,
                bound=bound,
                batches=_given_away(surveyed),
                sink=writer,
                reporter=reporter,
                placement=memory.placement,
                store=store,
                done={step.name: step for step in record.steps},
                ranks=ranks,
            )
            gradients = replace(batches, parts=tuple((sample,) for sample in answers))
            # Closed before anything else: the workers of a stream must not outlive the run.
            with contextlib.closing(_remaining(setup, gradients, outputs)) as steps:
                if first:
                    record = _recorded(steps, record, directory, writer, reporter)
                else:
                    deque(steps, maxlen=0)
        earlier = record.restarts[-1].notes if record.restarts else ()
        return Result(out, plan, record, (*earlier, *_notes(record, bound, directory)))


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


def _notes(record: RunRecord, bound: BoundModel, directory: RunDirectory) -> tuple[str, ...]:
    """What did not go as a user may expect."""
    failed, damaged = failure_lines(record.steps), _damage(record.damaged)
    foreign = directory.foreign_files(record) if record.finished else []
    beside = f"files that the run has not written lie in its folder: {', '.join(foreign)}"
    return (*failed, *damaged, *links_remark(bound.folder), *[beside] * bool(foreign))


def _damage(nonfinite: Mapping[str, str]) -> list[str]:
    return [f"kept damaged, as it is in the source: {line}" for line in told_of(nonfinite)]


def _unusual(bound: BoundModel, ranks: Ranks, *, locked: bool) -> dict[str, str]:
    """What else to tell of the surroundings."""
    told = {} if locked else {"lock": "none"}
    if left := links_outside(bound.folder):
        told["links_outside"] = ", ".join(left)
    return told | ({"ranks": str(ranks.size)} if ranks.size > 1 else {})


def _limits(max_pixels: Any, max_frames: Any, max_length: Any) -> Limits:
    given = {"max_pixels": max_pixels, "max_frames": max_frames, "max_length": max_length}
    return Limits(
        **{
            name: None if value is None else as_count(value, name, most=_MOST)
            for name, value in given.items()
        }
    )


def _room(budget: int | None) -> int:
    """Bytes that the process may take.

    Raises:
        PlanError: It takes more already.
    """
    resident = resident_bytes()
    if budget is not None and budget <= resident:
        raise PlanError(
            f"a memory budget of {readable_bytes(budget)} is too small: the process alone takes "
            f"{readable_bytes(resident)}",
            remedy="allow more with --memory-budget",
        )
    return resident + available_bytes() if budget is None else budget


def _forecast(
    plan: Plan,
    bound: BoundModel,
    batches: Batches,
    found: Survey,
    budget: int | None,
    device: torch.device,
    precision: Precision,
) -> tuple[Forecast, Survey]:
    """How the run will go about it, and the peak that is expected; and the batches for it.

    Pixels that stay in memory are the first that must go.

    Raises:
        PlanError: The budget is too small.
    """
    tokens = count_tokens(bound, found.batches)
    give_back_freed()
    resident = resident_bytes()
    spare = resident + available_bytes() if budget is None and device.type == "cpu" else budget

    def forecasts(found: Survey, resident: int) -> list[Forecast]:
        return [
            forecast(
                plan,
                bound,
                tokens,
                resident=resident,
                placement=placement,
                making=found.making,
            )
            for placement in placements(device, precision)
        ]

    tried = forecasts(found, resident)
    if found.kept_bytes and spare is not None and tried[0].peak_bytes > spare:
        resident -= found.kept_bytes
        found = let_go(found, batches)
        tried = forecasts(found, resident)
    if budget is not None or spare is None:
        return choose_placement(tried, budget, free_device_bytes(device)), found
    return next((one for one in tried if one.peak_bytes <= spare), tried[-1]), found


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


def _optional_dtype(value: Any) -> torch.dtype | None:
    return None if value is None else as_dtype(value, known=(*FLOATS, "float64"))


@default_modes()
def export(
    folder: str | Path,
    format: str,
    out: str | Path,
    *,
    weights_only: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a finished run in another format, without choosing any code again.

    Args:
        folder: A finished run, or another checkpoint in compressed-tensors format.
        format: ``dense``, ``compressed-tensors``, ``gptq``, ``awq`` ..; the keys of
            :data:`prismquant.export.exporters.EXPORTERS`.
        out: Folder of the result; must not exist or be empty.
        weights_only: Drop quantized inputs, outputs and caches where the format cannot say them.
        options: Of the format, such as ``{"dtype": "float32"}`` of ``dense``.
        progress: Is told how far the export is.

    Raises:
        PrismQuantError: The checkpoint cannot be read, or the format cannot hold all of its layers;
            the message lists which and why, and nothing was written.
    """
    given = dict(options or {})
    if given.get("dtype") is not None:
        given["dtype"] = as_dtype(given["dtype"])
    exporter = build_exporter(as_choice(format, "format", EXPORTERS), given)
    return export_checkpoint(
        as_path(folder, "folder"),
        exporter,
        as_path(out, "out"),
        weights_only=as_flag(weights_only, "weights_only"),
        progress=progress,
    )


@default_modes()
@memory_told("--batch-size", "--max-pixels", "--limit")
def measure(
    model: str | Path,
    data: str | Path,
    *,
    reference: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    dtype: torch.dtype | str | None = "float32",
    generated: bool = False,
    trust_remote_code: bool = False,
    max_pixels: int | None = None,
    max_frames: int | None = None,
    max_length: int | None = None,
) -> Fidelity:
    """Measure a model's answers, alone and against a reference.

    Args:
        model: Folder of the checkpoint to measure.
        data: Evaluation samples; each must end with an assistant's answer.
        reference: Folder of the model to compare with, usually the unquantized one.
        limit: At most so many samples.
        batch_size: Samples run together.
        dtype: Of the arithmetic, e.g. ``bfloat16``; None keeps the checkpoint's.
        generated: Also decode greedily and compare normalized text.
        trust_remote_code: Allow code in the folder to build the processor.
        max_pixels: Pixels of a picture, or of a frame of a clip, as the model sees it.
        max_frames: Frames of a clip.
        max_length: Tokens of a sample; longer ones are cut, which is told.

    Raises:
        PrismQuantError: A checkpoint or the data cannot be read, or the reference has another
            vocabulary.
    """
    folder, source = as_path(model, "model"), as_source(data, "data")
    wanted = _optional_dtype(dtype)
    most = None if limit is None else as_count(limit, "limit")
    size = as_count(batch_size, "batch_size", most=MAX_BATCH)
    decoded = as_flag(generated, "generated")
    trusted = as_flag(trust_remote_code, "trust_remote_code")
    other = None if reference is None else as_path(reference, "reference")
    limits = _limits(max_pixels, max_frames, max_length)
    room = _room(None)
    samples = read_samples(source, limit=most, require_answers=True, most_bytes=available_bytes())
    processor = load_processor(folder, trust_remote_code=trusted)
    if other is not None:
        require_same_vocabulary(folder, processor, other, trust_remote_code=trusted)
    arch = identify(folder)
    config = native_config(arch, folder)
    batches = make_batches(
        samples,
        processor,
        batch_size=size,
        vision_token_ids=[int(config_value(config, key)) for key in arch.vision_token_ids],
        limits=limits,
    )
    found = survey(batches, most_bytes=room, positions=position_limit(config))
    loaded = load_model(folder, dtype=wanted)
    compared = load_model(other, dtype=wanted) if other else None
    result = evaluate_model(
        loaded,
        (batch.whole() for batch in found.batches),
        reference=compared,
        generated=decoded,
        processor=processor,
    )
    return replace(result, notes=found.remarks(answers=True))


def _calibration_samples(
    plan: Plan, source: str | Path | None, most_bytes: int
) -> tuple[Sample, ...]:
    if not plan.needs_data:
        return ()
    if source is None:
        raise DataError(
            f"recipe {plan.recipe!r} needs calibration data",
            remedy="give --calib FILE; only `solver: rtn` with dynamic activations needs none",
        )
    settings = plan.calibration
    left = most_bytes - resident_bytes()
    samples = read_samples(source, limit=settings.samples, seed=settings.seed, most_bytes=left)
    require_modalities(samples, _needed_kinds(plan))
    return samples


def _with_unseen(
    plan: Plan, samples: Sequence[Sample], reporter: Reporter, *, strict: bool
) -> Plan:
    """The plan with a remark on statistics that no vision token will reach, which is told.

    Raises:
        PlanError: There are such, and that is not to be.
    """
    lines = unseen_vision(plan, samples)
    for line in lines:
        if strict:
            raise PlanError(
                line,
                where=f"recipe {plan.recipe!r}",
                remedy="add samples with pictures or clips, or leave out --strict",
            )
        reporter.remark(line)
    return replace(plan, remarks=(*plan.remarks, *lines))


def _needed_kinds(plan: Plan) -> set[str]:
    """Kinds of samples without which a layer that needs statistics would see nothing."""
    balanced = {name for edge in plan.edges for name in edge.edge.consumers}
    hungry = [row for row in plan.quantized if row.needs_tokens or row.site.name in balanced]
    return {"vision" for row in hungry if row.site.modality is not Modality.LLM}


def _with_answers(
    plan: Plan, samples: Sequence[Sample], found: Survey, ranks: Ranks, reporter: Reporter
) -> tuple[Plan, tuple[Sample, ...]]:
    """The plan with remarks on what the data lack, which are told; and samples for gradients.

    Raises:
        DataError: Gradients are wanted, and no sample with a picture or a clip has an answer.
    """
    wanted = wants_gradients(plan)
    known = ranks.gather_json([list(found.cut), dict(found.unknown)])
    together = Survey(
        cut=tuple(name for cut, _ in known for name in cut),
        unknown={name: why for _, unknown in known for name, why in unknown.items()},
    )
    answers: tuple[Sample, ...] = ()
    if wanted:
        clear = [sample for sample in samples if sample.id not in together.unknown]
        answers = gradient_samples(clear, plan.calibration.seed)
    lines = together.remarks(answers=wanted)
    for line in lines:
        reporter.remark(line)
    return replace(plan, remarks=(*plan.remarks, *lines)), answers


def _identity(
    plan: Plan,
    bound: BoundModel,
    samples: Sequence[Sample],
    prints: Sequence[str],
    arithmetic: str,
    ranks: Ranks,
) -> Identity:
    # The same for any number of ranks.
    dealt = sorted(one for own in ranks.gather_json(list(prints)) for one in own)
    return Identity(
        plan=plan.fingerprint(),
        files=stamp_files(bound.folder, _source_files(bound.folder)),
        samples=fingerprint_samples(samples),
        inputs=fingerprint_batches(dealt),
        arithmetic=arithmetic,
        versions=code_versions(),
    )


def _source_files(folder: Path) -> list[Path]:
    """All files of a source that decide the result, or become a part of it."""
    reader = ShardReader(folder)
    shards = {folder / reader.info(name).file for name in reader.names}
    return [folder / "config.json", *sorted(shards), *files_to_copy(folder)]


def _copied_bytes(bound: BoundModel) -> int:
    return sum(path.stat().st_size for path in files_to_copy(bound.folder))


def _refuse_inside(out: Path, source: Path) -> None:
    """A result in the source's folder would be taken for a part of the source."""
    if out.resolve().is_relative_to(source.resolve()):
        raise StorageError(
            "the output folder is the source model's, or lies in it",
            where=str(out),
            remedy="choose another --out",
        )
