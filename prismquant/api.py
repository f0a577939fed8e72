"""The main job as functions: inspect, quantize, load, measure.

Each puts together what the layers below do, in the order recipe, bind, plan, engine, export.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prismquant.errors import DataError, PrismQuantError, StorageError
from prismquant.evaluate.fidelity import Fidelity, evaluate_model
from prismquant.export.compressed_tensors import CheckpointWriter
from prismquant.export.exporter import Progress
from prismquant.export.load import load_model
from prismquant.export.table import Exported, build_exporter, export_checkpoint
from prismquant.memory import peak_memory_bytes
from prismquant.models.arch import Modality
from prismquant.models.bind import BoundModel, bind
from prismquant.models.load import load_processor
from prismquant.pipeline.batches import Batch, make_batches
from prismquant.pipeline.checkpoint import RunDirectory, RunRecord, environment
from prismquant.pipeline.data import Sample, fingerprint, read_samples, require_modalities
from prismquant.pipeline.engine import Reporter, Run, Silent, run
from prismquant.pipeline.gradients import gradient_samples, vision_weights, wants_gradients
from prismquant.pipeline.plan import Plan, make_plan
from prismquant.recipe.schema import Recipe, load_recipe
from prismquant.storage import ShardReader

RecipeSource = str | Path | Mapping[str, Any] | Recipe


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: The checkpoint.
        plan: What was done.
        record: How well.
    """

    folder: Path
    plan: Plan
    record: RunRecord


def inspect(model: str | Path, recipe: RecipeSource) -> Plan:
    """What a recipe would do to a model. Reads the configuration and the shards' headers, no
    weights.

    Args:
        model: Folder of the checkpoint.
        recipe: A preset's name, a file, a dictionary or a recipe.

    Raises:
        RecipeError, ModelError, PlanError: Something does not fit; the message says what.
    """
    return make_plan(load_recipe(recipe), bind(Path(model), headers_required=False))


def quantize(
    model: str | Path,
    recipe: RecipeSource,
    out: str | Path,
    calibration: str | Path | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """Quantize a checkpoint, block by block, into a folder that transformers and vLLM load.

    Args:
        model: Folder of the source checkpoint.
        recipe: A preset's name, a file, a dictionary or a recipe.
        out: Folder of the result; must not exist or be empty, unless ``resume``.
        calibration: A data file or the name of a data set. Not needed by recipes of ``rtn`` and
            dynamic activations.
        device: Where the arithmetic happens.
        dtype: In which blocks are run; float32 on a CPU, else the checkpoint's.
        resume: Go on with a run that was cut off.
        trust_remote_code: Allow code in the checkpoint's folder to build the processor.
        reporter: Is told how far the run is.

    Raises:
        PrismQuantError: With what is wrong, where, and the remedy. All that can be checked is
            checked before any long work.
    """
    recipe = load_recipe(recipe)
    bound = bind(Path(model))
    plan = make_plan(recipe, bound)
    target = _device(device)
    arithmetic = dtype or (torch.float32 if target.type == "cpu" else bound.dtype)
    samples = _calibration_samples(plan, calibration)
    _refuse_inside(Path(out), bound.folder)
    directory = RunDirectory(Path(out))
    directory.require_free(resume=resume)
    batches = _batches(bound, samples, recipe.calibration.batch_size, trust_remote_code)
    answers = gradient_samples(samples, plan.calibration.seed) if wants_gradients(plan) else ()
    record = directory.begin(
        RunRecord(
            identity=_identity(plan, bound, samples, f"{target.type} {arithmetic}"),
            model=str(model),
            calibration=str(calibration or ""),
            samples=dict(Counter(sample.kind for sample in samples)),
            environment=environment(),
        ),
        plan,
        recipe,
        resume=resume,
    )
    if record.finished:
        return Result(Path(out), plan, record)
    reporter = reporter or Silent()
    if answers:
        reporter.stage("model", "gradients")
    job = Run(
        plan=plan,
        bound=bound,
        batches=batches,
        sink=(writer := CheckpointWriter(Path(out), bound, plan)),
        reporter=reporter,
        device=target,
        dtype=arithmetic,
        done={step.name: step for step in record.steps},
        # Not a part of the record: model, data and plan decide them, and those are.
        vision_weights=vision_weights(
            plan,
            bound,
            _batches(bound, answers, 1, trust_remote_code),
            device=target,
            dtype=arithmetic,
        ),
    )
    for step in run(job):
        record = replace(
            record,
            steps=(*record.steps, step),
            seconds=record.seconds + step.seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )
        directory.save(record)
    writer.finish()
    record = replace(record, finished=True)
    directory.save(record)
    return Result(Path(out), plan, record)


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Load a checkpoint, quantized or not, and its processor. Needs no other quantization library.

    Args:
        folder: A checkpoint in compressed-tensors format, or in floating point.
        dtype: Of the arithmetic; the checkpoint's by default.
        trust_remote_code: Allow code in the folder to build the processor.

    Returns:
        The model, in evaluation mode, with inputs quantized as the checkpoint says; and the
        processor.

    Raises:
        ModelError, FormatError, StorageError: The checkpoint cannot be read.
    """
    processor = load_processor(Path(folder), trust_remote_code=trust_remote_code)
    return load_model(Path(folder), dtype=dtype), processor


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
            :data:`prismquant.export.table.EXPORTERS`.
        out: Folder of the result; must not exist or be empty.
        weights_only: Drop quantized inputs, outputs and caches where the format cannot say them.
        options: Of the format, such as ``{"dtype": torch.float32}`` of ``dense``.
        progress: Is told how far the export is.

    Raises:
        PrismQuantError: The checkpoint cannot be read, or the format cannot hold all of its layers;
            the message lists which and why, and nothing was written.
    """
    exporter = build_exporter(format, options)
    return export_checkpoint(
        Path(folder), exporter, Path(out), weights_only=weights_only, progress=progress
    )


def measure(
    model: str | Path,
    data: str | Path,
    *,
    reference: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    dtype: torch.dtype | None = torch.float32,
    generated: bool = False,
    trust_remote_code: bool = False,
) -> Fidelity:
    """Measure a model's answers, alone and against a reference.

    Args:
        model: Folder of the checkpoint to measure.
        data: Evaluation samples; each must end with an assistant's answer.
        reference: Folder of the model to compare with, usually the unquantized one.
        limit: At most so many samples.
        batch_size: Samples run together.
        dtype: Of the arithmetic; None keeps the checkpoint's.
        generated: Also decode greedily and compare normalized text.
        trust_remote_code: Allow code in the folder to build the processor.

    Raises:
        PrismQuantError: A checkpoint or the data cannot be read.
    """
    samples = read_samples(data, limit=limit, require_answers=True)
    loaded, processor = load(model, dtype=dtype, trust_remote_code=trust_remote_code)
    compared = load_model(Path(reference), dtype=dtype) if reference else None
    config: Any = loaded.config
    keys = ("image_token_id", "video_token_id")
    placeholders = {getattr(config, key) for key in keys if getattr(config, key, None) is not None}
    batches = make_batches(samples, processor, batch_size=batch_size, vision_token_ids=placeholders)
    return evaluate_model(
        loaded, batches, reference=compared, generated=generated, processor=processor
    )


def _calibration_samples(plan: Plan, source: str | Path | None) -> tuple[Sample, ...]:
    if not plan.needs_data:
        return ()
    if source is None:
        raise DataError(
            f"recipe {plan.recipe!r} needs calibration data",
            remedy="give --calib FILE; only `solver: rtn` with dynamic activations needs none",
        )
    settings = plan.calibration
    samples = read_samples(source, limit=settings.samples, seed=settings.seed)
    require_modalities(samples, _needed_kinds(plan))
    return samples


def _needed_kinds(plan: Plan) -> set[str]:
    """Kinds of samples without which a layer that needs statistics would see nothing."""
    balanced = {name for edge in plan.edges for name in edge.edge.consumers}
    hungry = [row for row in plan.quantized if row.needs_data or row.site.name in balanced]
    return {"vision" for row in hungry if row.site.modality is not Modality.LLM}


def _batches(
    bound: BoundModel, samples: Sequence[Sample], batch_size: int, trust_remote_code: bool
) -> list[Batch]:
    if not samples:
        return []
    processor = load_processor(bound.folder, trust_remote_code=trust_remote_code)
    ids = bound.vision_token_ids
    return list(make_batches(samples, processor, batch_size=batch_size, vision_token_ids=ids))


def _identity(
    plan: Plan, bound: BoundModel, samples: Sequence[Sample], arithmetic: str
) -> dict[str, str]:
    return {
        "plan": plan.fingerprint(),
        "model": _model_fingerprint(bound.folder),
        "data": fingerprint(samples) if samples else "",
        "arithmetic": arithmetic,
    }


def _model_fingerprint(folder: Path) -> str:
    """SHA-256 over the configuration, the headers, and both ends of every shard."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    reader = ShardReader(folder)
    for name in sorted(reader.names):
        digest.update(f"{name} {reader.info(name)}".encode())
    window = 1 << 16
    for shard in sorted({reader.info(name).file for name in reader.names}):
        with (folder / shard).open("rb") as file:
            digest.update(file.read(window))
            file.seek(max(0, (folder / shard).stat().st_size - window))
            digest.update(file.read(window))
    return digest.hexdigest()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise PrismQuantError(
            f"device {name!r} cannot be used: {reason}", remedy="use --device cpu"
        ) from error
    return device


def _refuse_inside(out: Path, source: Path) -> None:
    """A result in the source's folder would be taken for a part of the source."""
    if out.resolve().is_relative_to(source.resolve()):
        raise StorageError(
            "the output folder is the source model's, or lies in it",
            where=str(out),
            remedy="choose another --out",
        )
