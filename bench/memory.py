"""Peak memory of a run against the number of blocks: one block is in memory at a time.

    python -m bench.memory [--blocks 8 32] [--width 768] [--samples 16]

Builds random Qwen2-VL models of one width and several depths, quantizes each with GPTQ in a process
of its own, and prints the largest resident set beside the size of the whole model in float32. Then
the first again under smaller and smaller memory budgets: what was predicted, what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.engine.models import copy_companions, write_weights
from bench.engine.process import measure, thread_environment
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.models.config import import_transformers
from prismquant.opening import read_json
from prismquant.report.tables import format_bytes, rich_table
from prismquant.shards import ShardReader


def random_model(folder: Path, *, width: int, blocks: int) -> Path:
    """A random Qwen2-VL with the embedded model's tokenizer, processors and vision tower."""
    transformers = import_transformers()
    config = transformers.AutoConfig.from_pretrained(str(CHECKPOINT), local_files_only=True)
    heads = width // 64
    rope = dict(config.text_config.rope_parameters) | {"mrope_section": [8, 12, 12]}
    text = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "rope_parameters": rope,
        "layer_types": None,
        "max_window_layers": blocks,
    }
    fields = config.to_dict()
    fields["text_config"] |= text
    fields["vision_config"] |= {"hidden_size": width}
    config = type(config).from_dict(fields)
    config.dtype = torch.bfloat16
    copy_companions(folder)
    write_weights(folder, config, "qwen2_vl")
    return folder


def peak_of(command: Sequence[str], log: Path) -> tuple[int, float]:
    """Largest resident set of a command in bytes, and its seconds.

    Raises:
        ChildProcessError: It failed.
    """
    took = measure(command, log=log, environment=thread_environment(1))
    if took.code:
        raise ChildProcessError(took.tail)
    return took.peak, took.seconds


def quantized(
    model: Path, data: Path, out: Path, log: Path, budget: int | None = None
) -> dict[str, Any]:
    """One run in a process of its own: its peak, the predicted one, seconds, and how it went on.

    Raises:
        ChildProcessError: It failed, for instance because the budget is too small.
    """
    command = [sys.executable, "-m", "prismquant", "quantize", str(model), "--recipe", "w4a16"]
    command += ["--calib", str(data), "--out", str(out)]
    peak, seconds = peak_of(command + ([f"--memory-budget={budget}"] if budget else []), log)
    memory = read_json(out / "prismquant" / "record.json")["memory"]
    shutil.rmtree(out)
    return {"peak": peak, "seconds": seconds, "budget": budget, **memory}


def placements_of(model: Path, data: Path, work: Path, log: Path) -> list[dict[str, Any]]:
    """Runs under smaller and smaller budgets, each just below what the last was predicted to take,
    until one is refused."""
    runs = [quantized(model, data, work / "budget", log)]
    with contextlib.suppress(ChildProcessError):
        while True:
            budget = runs[-1]["predicted_peak_bytes"] - 1
            runs.append(quantized(model, data, work / "budget", log, budget))
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all depths and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = write_dataset(work / "data", split="calibration", count=options.samples)
        log = work / "log.txt"
        empty, _ = peak_of([sys.executable, "-c", "import prismquant.api, transformers"], log)
        for blocks in options.blocks:
            model = random_model(work / f"m{blocks}", width=options.width, blocks=blocks)
            reader = ShardReader(model)
            size = 2 * sum(reader.info(name).nbytes for name in reader.names)
            run = quantized(model, data, work / f"o{blocks}", log)
            results.append({"blocks": blocks, "float32": size, **run})
        budgets = placements_of(work / f"m{options.blocks[0]}", data, work, log)
    first = results[0]
    rows = [
        [
            str(r["blocks"]),
            format_bytes(r["float32"]),
            format_bytes(r["peak"]),
            format_bytes(r["peak"] - empty),
            f"{r['peak'] / first['peak']:.3f}",
            f"{r['seconds']:.0f}",
        ]
        for r in results
    ]
    headers = ["blocks", "model, float32", "peak", "above imports", "of the first", "seconds"]
    title = f"GPTQ W4A16, width {options.width}, {options.samples} samples, 1 thread"
    Console(width=100, highlight=False).print(rich_table(headers, rows, title=title))
    told = [
        [
            format_bytes(run["budget"]) if run["budget"] else "none",
            run["placement"],
            format_bytes(run["predicted_peak_bytes"]),
            format_bytes(run["peak"]),
            f"{run['peak'] / run['predicted_peak_bytes']:.2f}",
            f"{run['seconds']:.0f}",
        ]
        for run in budgets
    ]
    titles = ["budget", "placement", "predicted", "measured", "of it", "seconds"]
    Console(width=120, highlight=False).print(rich_table(titles, told))
    facts = {"threads": 1, "torch": torch.__version__, "width": options.width, "imports": empty}
    print(json.dumps({"bench": "memory", **facts, "runs": results, "budgets": budgets}))


if __name__ == "__main__":
    main()
