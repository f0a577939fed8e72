"""The main job as functions: inspect, quantize, load, measure.

Each puts together what the layers below do, in the order recipe, bind, plan, engine, export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

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
    refuse_idle,
)
from prismquant.data import read_samples
from prismquant.distributed import Alone, Ranks
from prismquant.engine.setup import Reporter, Silent
from prismquant.evaluate.figures import Fidelity, Outcome
from prismquant.evaluate.measure_folder import Measurement, measure_folder
from prismquant.export.exporter import Progress
from prismquant.export.exporters import EXPORTERS, Exported, build_exporter, export_checkpoint
from prismquant.memory import (
    available_bytes,
    memory_told,
)
from prismquant.models.bind import bind
from prismquant.models.given_arch import described_by
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import Plan
from prismquant.quantization.perform import perform
from prismquant.quantization.request import Request, Result, as_limits
from prismquant.recipe.adapt import adapted, why_unpredicted
from prismquant.recipe.alternative import choice_lines
from prismquant.recipe.importers.import_recipe import RecipeSource, import_recipe
from prismquant.recipe.schema import Recipe
from prismquant.search.choose_method import quantize_best
from prismquant.search.constraints import Asked, parse_constraints
from prismquant.search.find_mix import (
    AsAnalyzed,
    FoundMix,
    SearchRequest,
    Verification,
    search_mix,
)
from prismquant.search.pareto import MAX_POINTS
from prismquant.search.predicted_layers import Predictor
from prismquant.search.repair import MAX_SWAPS


@default_modes()
def inspect(
    model: str | Path,
    recipe: RecipeSource,
    *,
    kv_cache: str | Mapping[str, Any] | None = None,
    fallback: bool = False,
    on_failure: str | None = None,
    tensor_parallel: int | None = None,
    arch: str | Path | None = None,
) -> Plan:
    """Plan of a recipe for a model, from its configuration and the headers of its shards alone.

    Args:
        model: Folder of the checkpoint.
        recipe: As in :func:`quantize`.
        kv_cache: A format of keys and values, added to the recipe; as in :func:`quantize`.
        fallback: Where a format cannot hold a layer's shape, take the nearest.
        on_failure: Where a solver fails: ``stop``, or ``rtn`` to round to nearest.
        tensor_parallel: Devices that will share each layer when it is served.
        arch: An architecture file that describes the model, in place of the package's.

    Raises:
        ArgumentError, RecipeError, ModelError, PlanError: Something does not fit; the message says
            what.
    """
    folder, imported = as_path(model, "model"), import_recipe(recipe)
    chosen = adapted(
        imported.recipe,
        kv_cache=kv_cache,
        fallback=fallback,
        on_failure=on_failure,
        tensor_parallel=tensor_parallel,
    )
    with described_by(arch):
        bound = bind(folder, headers_required=False)
    first = chosen.chosen(chosen.choose[0].name) if chosen.choose else chosen
    left = choice_lines(chosen.name, chosen.choose) if chosen.choose else ()
    plan = make_plan(first, bound)
    return replace(plan, remarks=(*imported.lines, *plan.remarks, *left))


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
    seq_length: int | None = None,
    arch: str | Path | None = None,
) -> Result:
    """Quantize a checkpoint, block by block, into a folder that transformers and vLLM load.

    Args:
        model: Folder of the source checkpoint.
        recipe: A preset's name, a file, a dictionary or a recipe; also of another tool, see
            :func:`prismquant.recipe.importers.import_recipe.import_recipe`.
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
        seq_length: Tokens of a window that running text (a ``.txt`` file) is cut into; by default
            2048, or as many as the model has positions.
        arch: An architecture file that describes the model, in place of the package's.

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
        "--seq-length": seq_length,
    }
    imported = import_recipe(recipe)
    chosen = adapted(
        imported.recipe,
        kv_cache=kv_cache,
        fallback=fallback,
        on_failure=on_failure,
        tensor_parallel=tensor_parallel,
        solver=solver,
        samples=samples,
        batch_size=batch_size,
    )
    asked = Request(
        model=as_path(model, "model"),
        recipe=chosen,
        out=as_path(out, "out"),
        calibration=(imported.data or None)
        if calibration is None
        else as_source(calibration, "calibration"),
        target=as_device(device),
        wanted=wanted,
        resume=as_flag(resume, "resume"),
        trust_remote_code=as_flag(trust_remote_code, "trust_remote_code"),
        reporter=reporter or Silent(),
        memory_budget=None if memory_budget is None else as_bytes(memory_budget, "memory_budget"),
        ranks=ranks or Alone(),
        strict=as_flag(strict, "strict"),
        limits=as_limits(max_pixels, max_frames, max_length, seq_length),
        of_data=[option for option, value in of_data.items() if value is not None],
        translation=imported.translation,
        predict=Predictor(chosen, recipe),
        unpredicted=why_unpredicted(imported.recipe, chosen),
    )
    with described_by(arch):
        return quantize_best(asked) if chosen.choose else perform(asked)


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
    seq_length: int | None = None,
    arch: str | Path | None = None,
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
        seq_length: Tokens of a window that running text is cut into; by default 2048, or as many as
            the model has positions.
        arch: An architecture file that describes model and reference, in place of the package's.

    Raises:
        PrismQuantError: A checkpoint or the data cannot be read, or the reference has another
            vocabulary.
    """
    with described_by(arch):
        return measure_folder(
            Measurement(
                folder=as_path(model, "model"),
                source=as_source(data, "data"),
                reference=None if reference is None else as_path(reference, "reference"),
                limit=None if limit is None else as_count(limit, "limit"),
                batch_size=as_count(batch_size, "batch_size", most=MAX_BATCH),
                dtype=None if dtype is None else as_dtype(dtype, known=(*FLOATS, "float64")),
                generated=as_flag(generated, "generated"),
                trust_remote_code=as_flag(trust_remote_code, "trust_remote_code"),
                limits=as_limits(max_pixels, max_frames, max_length, seq_length),
            )
        )


@default_modes()
def find_mix(
    sensitivity: str | Path,
    *,
    out: str | Path | None = None,
    pareto: str | Path | None = None,
    points: int | None = None,
    verify: str | Path | None = None,
    swaps: int | None = None,
    model: str | Path | None = None,
    calibration: str | Path | None = None,
    progress: Progress | None = None,
    **asked: Unpack[Asked],
) -> FoundMix:
    """Find the mix of formats that loses least within constraints, and write it as a recipe.

    Args:
        sensitivity: The file that ``prismquant analyze`` wrote.
        out: File of the recipe; an earlier one of the same command is replaced. None: none.
        pareto: Folder of the whole front: ``front.json``, ``front.svg`` and a recipe a point; must
            not exist or be empty. Without any bound the mix at the knee of the front is taken.
        points: Sizes at which the front is computed; 64 by default.
        verify: Samples with answers that no statistic saw: the model is quantized to the mix and
            measured on them, and swaps of formats that help are kept.
        swaps: At most so many are tried, 8 by default, each of which quantizes the model once.
        model: Folder of the model, for ``verify``; by default where it lay when it was analyzed.
        calibration: Calibration data, for ``verify``; by default those of the analysis, as many.
        progress: Is told how many sizes, or mixes to measure, are done, of how many, and the next.
        asked: The constraints, see :class:`~prismquant.search.constraints.Asked`.

    Raises:
        ArgumentError: An argument is no such value or has nothing to do, or nothing bounds the mix.
        StorageError, DataError: A file cannot be read, or a result cannot be written there.
        PlanError: No mix keeps to the constraints; says which least can, and what holds it there.
        PrismQuantError: The mix cannot be quantized to, or measured.
    """
    given = {"swaps": swaps, "model": model, "calibration": calibration}
    if pareto is None:
        refuse_idle({"points": points}, "--pareto")
    if verify is None:
        refuse_idle(given, "--verify")
    request = SearchRequest(
        source=as_path(sensitivity, "sensitivity"),
        constraints=parse_constraints(asked),
        out=None if out is None else as_path(out, "out"),
        pareto=None if pareto is None else as_path(pareto, "pareto"),
        points=as_count(64 if points is None else points, "points", least=2, most=MAX_POINTS),
        verification=None if verify is None else _verification(verify, **given),
    )
    return search_mix(request, progress or (lambda done, total, name: None))


def _verification(data: Any, *, swaps: Any, model: Any, calibration: Any) -> Verification:
    source = as_source(data, "verify")
    most = as_count(8 if swaps is None else swaps, "swaps", least=0, most=MAX_SWAPS)
    # What is wrong with the samples is said before anything is quantized.
    read = read_samples(source, require_answers=True, most_bytes=available_bytes())
    text = any(sample.running for sample in read)

    def trial(
        folder: Path, recipe: Recipe, data: AsAnalyzed, place: Path
    ) -> tuple[int, Sequence[Outcome]]:
        window, count = data.seq_length, data.samples
        result = quantize(folder, recipe, place, data.source, samples=count, seq_length=window)
        # Conversations are not cut.
        window = window if text else None
        found = measure(place, source, reference=folder, seq_length=window)
        return result.plan.total_bytes, found.outcomes

    return Verification(
        data=str(source),
        trial=trial,
        swaps=most,
        model=None if model is None else as_path(model, "model"),
        calibration=None if calibration is None else str(as_source(calibration, "calibration")),
    )
