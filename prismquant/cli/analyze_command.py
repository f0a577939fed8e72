"""The command that analyzes a model."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING

from prismquant.cli.output import console as make_console
from prismquant.cli.output import say_json, show
from prismquant.report.tables import as_text

if TYPE_CHECKING:
    from prismquant.cli.options import AnalyzeOptions


def analyze(asked: AnalyzeOptions) -> None:
    """Score every unit of choice in every format on offer, with exact bytes, for a search."""
    from prismquant.distributed import joined
    from prismquant.report.analysis_progress import AnalysisProgress
    from prismquant.report.sensitivities import modality_table, unit_table
    from prismquant.search.analysis_request import as_token_weights
    from prismquant.search.public import analyze as run
    from prismquant.threads import use_threads

    use_threads(asked.threads)
    console = make_console(stderr=True)
    with joined() as ranks:
        first = ranks.rank == 0
        shown = AnalysisProgress(console, as_token_weights(asked.weight))
        with shown if first else contextlib.nullcontext():
            found = run(
                asked.model,
                asked.formats,
                asked.out,
                asked.calib,
                arch=asked.arch,
                method=asked.method,
                solver=asked.solver,
                samples=asked.samples,
                batch_size=asked.batch_size,
                draws=asked.draws,
                seed=asked.seed,
                weight=asked.weight,
                modalities=asked.modalities,
                disable=asked.disable,
                device=asked.device if asked.device != "cuda" else ranks.device,
                dtype=asked.dtype,
                memory_budget=asked.memory_budget,
                max_pixels=asked.max_pixels,
                max_frames=asked.max_frames,
                max_length=asked.max_length,
                seq_length=asked.seq_length,
                resume=asked.resume,
                trust_remote_code=asked.trust_remote_code,
                reporter=shown if first else None,
                ranks=ranks,
            )
    if not first:
        return
    if asked.as_json:
        # What is about this call alone is not in the file.
        notes = dict.fromkeys([*found.notes, *shown.remarks])
        say_json(asdict(found) | {"notes": list(notes)})
        return
    show(unit_table(found), modality_table(found))
    show(as_text(f"written: {asked.out}"), soft_wrap=True)
