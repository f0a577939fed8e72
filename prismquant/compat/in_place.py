"""Quantizing a model that a caller holds in memory: by the engine, and then in place.

The model is written into a temporary folder as it is, quantized there as any other checkpoint is,
and given the result. Until all is done nothing of it changes.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from prismquant.arguments import as_arithmetic, as_bytes, as_device, as_path, default_modes
from prismquant.compat.live_model import (
    LiveModel,
    put_back,
    write_description,
    write_weights,
)
from prismquant.data import Sample
from prismquant.distributed import Alone
from prismquant.engine.setup import Reporter, Silent
from prismquant.errors import ArgumentError, DataError, PrismQuantError, suggest
from prismquant.memory import memory_told
from prismquant.models.bind import bind
from prismquant.outputs import require_empty
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import Plan
from prismquant.quantization.perform import perform
from prismquant.quantization.request import Request, See, as_limits
from prismquant.recipe.adapt import adapted
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.schema import Recipe

# Frames between a warning here and the line of the script that called an entry point.
_TO_CALLER = 7


class EngineOptions(TypedDict, total=False):
    """Wishes that the other tool has no words for, as :func:`prismquant.api.quantize` takes them.

    Attributes:
        kv_cache: A format of keys and values, e.g. ``fp8`` or ``int8-head``.
        batch_size: Samples run together.
        dtype: In which blocks are run, or ``mixed``.
        memory_budget: Bytes that the process may take, or a size such as ``16GiB``.
        fallback: Where a format cannot hold a layer's shape, take the nearest.
        on_failure: Where a solver fails: ``stop``, or ``rtn`` to round to nearest.
        max_pixels: Pixels of a picture, or of a frame of a clip, as the model sees it.
        max_frames: Frames of a clip.
        max_length: Tokens of a sample; longer ones are cut, which is told.
        out: Folder in which the checkpoint is kept, for servers to load; by default it is
            temporary.
        reporter: Is told how far the run is; without one, remarks are warnings.
    """

    kv_cache: str | Mapping[str, Any] | None
    batch_size: int | None
    dtype: torch.dtype | str | None
    memory_budget: int | str | None
    fallback: bool
    on_failure: str | None
    max_pixels: int | None
    max_frames: int | None
    max_length: int | None
    out: str | Path | None
    reporter: Reporter | None


class CompatWarning(UserWarning):
    """Something is not as the other tool would have it, or as a user may expect."""


@dataclass(frozen=True, eq=False)
class Job:
    """A model in memory, and what is to become of it.

    Attributes:
        live: The model.
        imported: The recipe, with what became of the caller's settings.
        samples: Gives so many calibration samples at most; called only where the recipe needs any.
        device: Where the arithmetic happens; None: where the model is.
        see: Is shown the layers that are quantized.
        options: What the caller wishes beside.
        remarks: What a user should know beside all that.
    """

    live: LiveModel
    imported: Imported
    samples: Callable[[int], tuple[Sample, ...]]
    device: Any
    see: See
    options: EngineOptions
    remarks: tuple[str, ...] = ()


@default_modes()
@memory_told("batch_size", "memory_budget")
def quantize_in_place(job: Job) -> Plan:
    """Quantize a model that a caller holds; its weights, and what is around its layers, change.

    Returns:
        The plan, of what was done.

    Raises:
        PrismQuantError: With what is wrong, where, and the remedy; the model is as it was.
    """
    live, options = job.live, job.options
    _require_known(options)
    recipe = adapted(
        job.imported.recipe,
        kv_cache=options.get("kv_cache"),
        fallback=options.get("fallback", False),
        on_failure=options.get("on_failure"),
        batch_size=options.get("batch_size"),
    )
    tensors, collected = live.tensors(), _Collected()
    told = options.get("reporter") or collected
    with tempfile.TemporaryDirectory(prefix="prismquant-") as place, _named_for_callers(place):
        source, out = Path(place) / "model", options.get("out")
        request = _request(job, recipe, source, told)
        if out is not None:
            request = replace(request, out=as_path(out, "out"))
            require_empty(request.out)
        processed = write_description(live, source)
        # Everything that can be refused is, before any weight is written.
        plan = make_plan(recipe, bind(source, headers_required=False))
        request = replace(request, samples=_samples(job, plan, processed=processed))
        write_weights(tensors, source)
        result = perform(request)
        put_back(live, source, request.out, tensors)
    for line in (*job.remarks, *result.plan.remarks, *result.notes):
        told.remark(line)
    translation = job.imported.translation
    heading = "" if translation is None else translation.heading
    if collected.lines.keys() - {heading}:
        warnings.warn("\n".join(collected.lines), CompatWarning, stacklevel=_TO_CALLER)
    return result.plan


def _require_known(options: EngineOptions) -> None:
    """Refuse keywords that are no options.

    Raises:
        ArgumentError: There is one.
    """
    known = EngineOptions.__annotations__
    if unknown := sorted(options.keys() - known):
        raise ArgumentError(f"there is no option {unknown[0]!r}", remedy=suggest(unknown[0], known))


@contextlib.contextmanager
def _named_for_callers(place: str) -> Iterator[None]:
    """Within the block, an error about the temporary folder is one about the model in memory."""
    try:
        yield
    except PrismQuantError as error:
        if error.where is not None and place in error.where:
            inside = Path(error.where).name
            error.where = f"the model in memory{f', {inside}' if '.' in inside else ''}"
        raise


def _request(job: Job, recipe: Recipe, source: Path, told: Reporter) -> Request:
    """The request to the engine, its arguments checked, still without samples."""
    options = job.options
    wanted, budget = options.get("dtype"), options.get("memory_budget")
    most = (options.get("max_pixels"), options.get("max_frames"), options.get("max_length"))
    return Request(
        model=source,
        recipe=recipe,
        out=source.with_name("result"),
        calibration=None,
        target=job.live.device if job.device is None else _device(job.device),
        wanted=None if wanted is None else as_arithmetic(wanted),
        resume=False,
        trust_remote_code=False,
        reporter=told,
        memory_budget=None if budget is None else as_bytes(budget, "memory_budget"),
        ranks=Alone(),
        strict=False,
        limits=as_limits(*most, seq_length=None),
        of_data=(),
        translation=job.imported.translation,
        see=job.see,
    )


def _device(dev: Any) -> torch.device:
    """The device that a caller names.

    Raises:
        ArgumentError: It is none, or is not there.
    """
    try:
        return as_device(dev)
    except PrismQuantError as error:
        remedy = "give another dev; None is where the model is"
        raise ArgumentError(error.what, where="dev", remedy=remedy) from error


def _samples(job: Job, plan: Plan, *, processed: bool) -> tuple[Sample, ...]:
    """Calibration samples; none where the plan needs none.

    Raises:
        DataError: There is no processor that could make batches of them, or they are not whole.
    """
    if not plan.needs_data:
        return ()
    if not processed:
        raise DataError(
            "samples must pass the model, and it has no processor",
            where=type(job.live.holder).__name__,
            remedy="pass the wrapper that has the model as .model and the processor as .processor, "
            "or load the model from a local folder with its processor's files",
        )
    return job.samples(plan.calibration.samples)


class _Collected(Silent):
    """A reporter that keeps remarks, each once."""

    def __init__(self) -> None:
        self.lines: dict[str, None] = {}

    def remark(self, line: str) -> None:
        """Keep it."""
        self.lines[line] = None
