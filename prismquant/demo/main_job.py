"""The main job on the embedded model: float, rounding to nearest and GPTQ side by side.

Calibration and evaluation data are drawn afresh from disjoint seeds, so nothing is measured on
what it was calibrated with.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prismquant.api import measure, quantize
from prismquant.arguments import as_path
from prismquant.demo.scenes import write_dataset
from prismquant.outputs import require_empty
from prismquant.recipe.schema import load_recipe
from prismquant.report.tables import Variant, reference_variant, variant
from prismquant.storage import storage_error, write_json

CHECKPOINT = Path(__file__).parent / "checkpoint"
RECIPES = ("w4a16", "w4a8")
SOLVERS = ("rtn", "gptq")
CALIBRATION_SAMPLES = 128
EVALUATION_SAMPLES = 600


@dataclass(frozen=True)
class DemoReport:
    """The measures of the demonstration.

    Attributes:
        title: What the rows have in common.
        rows: One per variant, the unquantized model first.
    """

    title: str
    rows: tuple[Variant, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"title": self.title, "rows": [asdict(row) for row in self.rows]}


def run_demo(out: str | Path, say: Callable[[str], None]) -> DemoReport:
    """Quantize the embedded model in four ways and measure each against the original.

    What a demonstration that fails has written is removed again, so that it can be repeated.

    Args:
        out: Folder for data, checkpoints and ``results.json``; must not exist or be empty.
        say: Is told what happens, a line at a time.

    Raises:
        ArgumentError: No folder is called so.
        StorageError: The folder is in use or cannot be written.
    """
    folder = as_path(out, "out")
    require_empty(folder)
    try:
        return _run(folder, say)
    except BaseException as error:
        for name in ("calibration", "evaluation", *(f"{r}-{s}" for r in RECIPES for s in SOLVERS)):
            shutil.rmtree(folder / name, ignore_errors=True)
        if isinstance(error, OSError):
            raise storage_error(error, folder) from error
        raise


def _run(out: Path, say: Callable[[str], None]) -> DemoReport:
    calibration = write_dataset(out / "calibration", split="calibration", count=CALIBRATION_SAMPLES)
    evaluation = write_dataset(out / "evaluation", split="evaluation", count=EVALUATION_SAMPLES)
    say(f"data: {CALIBRATION_SAMPLES} calibration and {EVALUATION_SAMPLES} evaluation questions")
    rows: list[Variant] = []
    for recipe in RECIPES:
        for solver in SOLVERS:
            name = f"{recipe} {solver}"
            folder = out / f"{recipe}-{solver}"
            rule = {"solver": solver} | ({"weight_range": "minmax"} if solver == "rtn" else {})
            chosen = load_recipe(recipe).with_rules(rule, name=f"{recipe}-{solver}")
            result = quantize(CHECKPOINT, chosen, folder, calibration)
            fidelity = measure(folder, evaluation, reference=CHECKPOINT, batch_size=32)
            measured = fidelity.to_dict()
            if not rows:
                rows.append(reference_variant("float", measured, size=result.plan.float_bytes))
            rows.append(variant(name, measured, size=result.plan.total_bytes))
            say(f"{name}: quantized in {result.record.seconds:.1f} s, loaded again and measured")
    report = DemoReport("embedded model, language model quantized", tuple(rows))
    write_json(out / "results.json", report.to_dict())
    return report
