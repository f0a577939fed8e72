"""One run of ours in a process of its own; its report tells the seconds of each phase.

    python -m bench.engine.ours MODEL CALIBRATION.jsonl OUT --setting w4a16 --method preset

``peers`` is what llm-compressor and gptqmodel do by default: the sweep follows the diagonal of the
Hessian, nothing is refined, ranges reach to the largest weight, and a hundredth of the diagonal's
mean damps it; like them it runs in the checkpoint's bfloat16, of which ours by default takes only
the products of linear layers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from prismquant.memory import ask_for_large_pages

ask_for_large_pages()  # as the command line does, before torch is imported

import torch  # noqa: E402

from bench.engine.phases import Clock, watch  # noqa: E402
from bench.peers.worker import REPORT  # noqa: E402
from prismquant import __version__  # noqa: E402
from prismquant.api import quantize  # noqa: E402
from prismquant.models.config import import_transformers  # noqa: E402
from prismquant.recipe.schema import Recipe, load_recipe  # noqa: E402

METHODS = ("preset", "preset in float32", "peers")
# In which blocks are run; None for our default.
_DTYPES = {"preset": None, "preset in float32": torch.float32, "peers": torch.bfloat16}
_AS_PEERS = {
    "weight_range": "minmax",
    "options": {
        "order": "activation",
        "scale_weighting": "none",
        "damping": 0.01,
        "damping_basis": "mean",
        "refine_passes": 0,
    },
}


def recipe_of(setting: str, method: str) -> Recipe:
    """A preset as it is, or with the peers' algorithm."""
    recipe = load_recipe(setting)
    return recipe.with_rules(_AS_PEERS, name=f"{setting} peers") if method == "peers" else recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Quantize and write the report beside the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--setting", required=True, help="a preset")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    options = parser.parse_args(arguments)
    versions = {"torch": torch.__version__, "prismquant": __version__}
    versions["transformers"] = import_transformers().__version__
    recipe = recipe_of(options.setting, options.method)
    clock = Clock()
    watch(clock)
    dtype = _DTYPES[options.method]
    result = quantize(options.model, recipe, options.out, options.calibration, dtype=dtype)
    clock.enter("done")  # which closes the account of the phase before
    report = {
        "seconds": sum(clock.seconds.values()),
        "cpu_seconds": sum(clock.cpu_seconds.values()),
        "layers": len(result.plan.quantized),
        "loss": sum(layer.loss for step in result.record.steps for layer in step.layers),
        "phases": clock.seconds,
        "cpu_phases": clock.cpu_seconds,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
    (options.out / REPORT).write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
