"""Preparing a run: its samples, their batches, the memory forecast, and the run's identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prismquant.data import Sample, read_samples, require_modalities
from prismquant.data.batches import Batch, Batches, make_batches
from prismquant.data.lengths import by_length
from prismquant.data.media import Limits
from prismquant.data.survey import Survey, let_go, position_limit, survey
from prismquant.data.windows import window_remarks
from prismquant.distributed import Ranks
from prismquant.engine.collectives import share_of
from prismquant.engine.gradients import gradient_samples, wants_gradients
from prismquant.engine.memory_forecast import (
    Forecast,
    choose_placement,
    count_tokens,
    forecast,
)
from prismquant.engine.placement import placements
from prismquant.engine.setup import Reporter
from prismquant.errors import BudgetError, DataError, PlanError
from prismquant.export.companions import files_to_copy
from prismquant.families.true_replay import require_true_replay
from prismquant.memory import (
    available_bytes,
    free_device_bytes,
    give_back_freed,
    readable_bytes,
    resident_bytes,
)
from prismquant.models.arch import Modality
from prismquant.models.bound import BoundModel
from prismquant.models.processor import load_processor
from prismquant.plan.plan import Plan
from prismquant.plan.unseen import unseen_vision
from prismquant.quantization.request import Request
from prismquant.run.fingerprint import (
    code_versions,
    described_versions,
    fingerprint_batches,
    fingerprint_samples,
    stamp_files,
)
from prismquant.run.identity import Identity
from prismquant.runtime.mixed import Precision
from prismquant.shards import ShardReader
from prismquant.sources.recognize import SECTION_FILES

# Tokens of a call on a CPU: products are as fast as with more, and activations as large as these
# come from memory that is already there.
_CPU_TOKENS = 640


@dataclass(frozen=True)
class Prepared:
    """A run that can begin.

    Attributes:
        plan: The plan, with remarks on what the data lack.
        samples: Calibration samples of all ranks.
        batches: How batches of this rank are made.
        surveyed: These batches, to be taken one by one.
        answers: Samples that gradients are taken of.
        room: Bytes that the process may take.
        memory: The memory forecast, with the placement that was chosen.
        identity: What decides the bytes of the result.
    """

    plan: Plan
    samples: tuple[Sample, ...]
    batches: Batches
    surveyed: list[Batch]
    answers: tuple[Sample, ...]
    room: int
    memory: Forecast
    identity: Identity


def prepare(asked: Request, bound: BoundModel, plan: Plan, precision: Precision) -> Prepared:
    """Read the calibration data, look at all of them once, and forecast the run's memory.

    Raises:
        PrismQuantError: The data cannot be read or lack something, or the budget is too small.
    """
    ranks, reporter, size = asked.ranks, asked.reporter, asked.recipe.calibration.batch_size
    room = memory_room(asked.memory_budget)
    samples = _calibration_samples(plan, asked, room)
    if plan.needs_data or plan.edges or plan.towers:
        require_true_replay(
            bound,
            scales=bool(plan.edges),
            rotations=bool(plan.towers),
            trust_remote_code=asked.trust_remote_code,
        )
    if bound.arch.sees:
        plan = _with_unseen(plan, samples, reporter, strict=asked.strict)
    own = share_of(by_length(samples), size, ranks)
    batches, found = surveyed_batches(
        own,
        bound,
        batch_size=size,
        limits=asked.limits,
        device=asked.target,
        room=room,
        trust_remote_code=asked.trust_remote_code,
    )
    plan, answers = _with_answers(plan, samples, found, ranks, reporter)
    memory, found = forecast_memory(
        plan, bound, batches, found, asked.memory_budget, asked.target, precision
    )
    arithmetic = f"{asked.target.type} {precision.describe()}"
    identity = _identity(plan, bound, samples, found.prints, arithmetic, ranks)
    return Prepared(plan, samples, batches, list(found.batches), answers, room, memory, identity)


def surveyed_batches(
    samples: Sequence[Sample],
    bound: BoundModel,
    *,
    batch_size: int,
    limits: Limits,
    device: torch.device,
    room: int,
    trust_remote_code: bool,
) -> tuple[Batches, Survey]:
    """Batches of samples, made when they are asked for, and what a first look at all of them finds.

    Args:
        samples: Those of this rank, in the order in which they are batched.
        bound: The model.
        batch_size: Samples run together, at most.
        limits: Sizes of pictures, clips and samples.
        device: Where batches run.
        room: Bytes that the process may take.
        trust_remote_code: Allow code in the checkpoint's folder to build the processor.

    Raises:
        PrismQuantError: The processor cannot be loaded, or a sample cannot be read or is too long.
    """
    processor = (
        load_processor(bound.folder, trust_remote_code=trust_remote_code) if samples else None
    )
    batches = make_batches(
        samples,
        processor,
        batch_size=batch_size,
        vision_token_ids=bound.vision_token_ids,
        limits=limits,
        most_tokens=_CPU_TOKENS if device.type == "cpu" else None,
        one_kind=bound.arch.one_kind,
    )
    return batches, survey(batches, most_bytes=room, positions=position_limit(bound.config))


def memory_room(budget: int | None) -> int:
    """Bytes that the process may take.

    Raises:
        BudgetError: It takes more already.
    """
    resident = resident_bytes()
    if budget is not None and budget <= resident:
        raise BudgetError(
            f"a memory budget of {readable_bytes(budget)} is too small: the process alone takes "
            f"{readable_bytes(resident)}",
            needed=resident,
            remedy="allow more with --memory-budget",
        )
    return resident + available_bytes() if budget is None else budget


def forecast_memory(
    plan: Plan,
    bound: BoundModel,
    batches: Batches | None,
    found: Survey,
    budget: int | None,
    device: torch.device,
    precision: Precision,
    *,
    followers: Sequence[Batch] = (),
    places: int = 0,
) -> tuple[Forecast, Survey]:
    """Placement of the run with the peak that is expected, and the batches for it.

    Pixels that stay in memory are the first that must go.

    Args:
        plan: What is done.
        bound: To which model.
        batches: How calibration batches are made; None where there are none.
        found: These batches.
        budget: Bytes that the process may take; None: what the system can spare.
        device: Where units run.
        precision: In which dtypes.
        followers: Batches that pass all units beside these.
        places: Places whose logits are looked at together at the head; 0: none are.

    Raises:
        BudgetError: The budget is too small.
    """
    tokens = count_tokens(bound, [*found.batches, *followers])
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
                places=places,
            )
            for placement in placements(device, precision)
        ]

    tried = forecasts(found, resident)
    if batches and found.kept_bytes and spare is not None and tried[0].peak_bytes > spare:
        resident -= found.kept_bytes
        found = let_go(found, batches)
        tried = forecasts(found, resident)
    if budget is not None or spare is None:
        return choose_placement(tried, budget, free_device_bytes(device)), found
    return next((one for one in tried if one.peak_bytes <= spare), tried[-1]), found


def _calibration_samples(plan: Plan, asked: Request, most_bytes: int) -> tuple[Sample, ...]:
    if not plan.needs_data:
        return ()
    if asked.samples is not None:
        require_modalities(asked.samples, needed_kinds(plan))
        return asked.samples
    if asked.calibration is None:
        raise DataError(
            f"recipe {plan.recipe!r} needs calibration data",
            remedy="give --calib FILE; only `solver: rtn` with dynamic activations needs none",
        )
    settings = plan.calibration
    left = most_bytes - resident_bytes()
    samples = read_samples(
        asked.calibration,
        limit=settings.samples,
        seed=settings.seed,
        most_bytes=left,
        windows=asked.windows,
    )
    require_modalities(samples, needed_kinds(plan))
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


def needed_kinds(plan: Plan) -> set[str]:
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
    lines = (*window_remarks(samples), *together.remarks(answers=wanted))
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
        files=stamp_files(bound.folder, source_files(bound.folder)),
        samples=fingerprint_samples(samples),
        inputs=fingerprint_batches(dealt),
        arithmetic=arithmetic,
        versions=code_versions() | described_versions(bound.folder, bound.arch),
    )


def source_files(folder: Path) -> list[Path]:
    """All files of a source that decide the result, or become a part of it."""
    reader = ShardReader(folder)
    shards = {folder / reader.info(name).file for name in reader.names}
    declared = [folder / name for name in SECTION_FILES if (folder / name).is_file()]
    return [folder / "config.json", *declared, *sorted(shards), *files_to_copy(folder)]
