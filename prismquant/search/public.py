"""Analysis as a function: its arguments are those of the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from prismquant.algorithms.methods import SOLVERS
from prismquant.arguments import (
    MAX_BATCH,
    as_arithmetic,
    as_bytes,
    as_choice,
    as_count,
    as_device,
    as_flag,
    as_path,
    as_source,
    default_modes,
)
from prismquant.distributed import Alone, Ranks
from prismquant.memory import memory_told
from prismquant.models.given_arch import described_by
from prismquant.quantization.request import as_limits
from prismquant.search.analysis_methods import MAX_DRAWS, build_method, method_name
from prismquant.search.analysis_request import (
    AnalysisReporter,
    AnalysisRequest,
    SilentAnalysis,
    as_modalities,
    as_patterns,
    as_token_weights,
)
from prismquant.search.analyze import analyze_model
from prismquant.search.format_grammar import formats_on_offer
from prismquant.search.sensitivity import Sensitivity

_SAMPLES, _BATCH = 64, 8
_MAX_SEED = 2**31 - 1


@default_modes()
def analyze(
    model: str | Path,
    formats: str | Iterable[str],
    out: str | Path,
    calibration: str | Path | None = None,
    *,
    method: str | None = None,
    solver: str = "gptq",
    samples: int | None = None,
    batch_size: int | None = None,
    draws: int | None = None,
    seed: int = 0,
    weight: str | Mapping[str, float] | None = None,
    modalities: str | Iterable[str] | None = None,
    disable: str | Iterable[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    memory_budget: int | str | None = None,
    max_pixels: int | None = None,
    max_frames: int | None = None,
    max_length: int | None = None,
    seq_length: int | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    reporter: AnalysisReporter | None = None,
    ranks: Ranks | None = None,
    arch: str | Path | None = None,
) -> Sensitivity:
    """Score every unit of choice of a model in every format on offer, with exact bytes.

    Args:
        model: Folder of the checkpoint.
        formats: Formats on offer, such as ``int4-g128``, ``int8-channel+int8-token``, ``w4a8`` or
            ``kv:fp8``; see :mod:`prismquant.search.format_grammar`.
        out: File of the result; an earlier result there is replaced.
        calibration: A data file or the name of a data set. Answers are not needed.
        method: The method of scoring, a key of
            :data:`prismquant.search.analysis_methods.METHODS`; by default the first of them.
        solver: The method that chooses the codes that are scored: ``gptq`` or ``rtn``.
        samples: At most so many calibration samples; 64 by default.
        batch_size: Samples run together, 8 by default; methods that take gradients run them one by
            one.
        draws: Of random losses, where the method draws any.
        seed: Chooses samples, and all that is drawn.
        weight: Weight of each class of token in the sum of scores: ``answer=1,text=0.2``, or a
            mapping; classes that are not named count for nothing.
        modalities: Those that are chosen for: ``vision``, ``projector``, ``llm``; by default all.
        disable: Names of layers, or of modules that hold them, in which ``*`` stands for anything;
            a unit of choice with such a layer is left alone.
        device: Where the arithmetic happens, e.g. ``cpu`` or ``cuda:1``.
        dtype: In which blocks are run, or ``mixed``; by default float32 on a CPU, else the
            checkpoint's.
        memory_budget: Bytes that the process may take on a CPU, or a size such as ``4GiB``.
        max_pixels: Pixels of a picture, or of a frame of a clip, as the model sees it.
        max_frames: Frames of a clip.
        max_length: Tokens of a sample; longer ones are cut, which is told.
        seq_length: Tokens of a window that running text is cut into; by default 2048, or as many as
            the model has positions.
        resume: Go on with an analysis that was cut off.
        trust_remote_code: Allow code in the checkpoint's folder to build the processor.
        reporter: Is told how far the analysis is.
        ranks: The processes that share the work.
        arch: An architecture file that describes the model, in place of the package's.

    Returns:
        The sensitivity, as it was written to ``out``.

    Raises:
        PrismQuantError: With what is wrong, where, and the remedy. All that can be checked is
            checked before any long work.
    """
    name = method_name(method)
    given = {"draws": None if draws is None else as_count(draws, "draws", most=MAX_DRAWS)}
    of_data = {
        "--samples": samples,
        "--batch-size": batch_size,
        "--max-pixels": max_pixels,
        "--max-frames": max_frames,
        "--max-length": max_length,
        "--seq-length": seq_length,
    }
    asked = AnalysisRequest(
        model=as_path(model, "model"),
        calibration=None if calibration is None else as_source(calibration, "calibration"),
        formats=formats_on_offer(formats),
        out=as_path(out, "out"),
        method_name=name,
        method=build_method(name, given),
        solver=as_choice(solver, "solver", SOLVERS),
        samples=_SAMPLES if samples is None else as_count(samples, "samples"),
        batch_size=_BATCH
        if batch_size is None
        else as_count(batch_size, "batch_size", most=MAX_BATCH),
        seed=as_count(seed, "seed", least=0, most=_MAX_SEED),
        weights=as_token_weights(weight),
        modalities=as_modalities(modalities),
        disable=as_patterns(disable),
        target=as_device(device),
        wanted=None if dtype is None else as_arithmetic(dtype),
        memory_budget=None if memory_budget is None else as_bytes(memory_budget, "memory_budget"),
        limits=as_limits(max_pixels, max_frames, max_length, seq_length),
        resume=as_flag(resume, "resume"),
        of_data=[option for option, value in of_data.items() if value is not None],
        trust_remote_code=as_flag(trust_remote_code, "trust_remote_code"),
        reporter=reporter or SilentAnalysis(),
        ranks=ranks or Alone(),
    )
    smaller = [] if asked.method.one_by_one else ["--batch-size"]
    with memory_told("--memory-budget", *smaller, "--max-pixels"), described_by(arch):
        return analyze_model(asked)
