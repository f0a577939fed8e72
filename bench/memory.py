"""Peak memory of a run against the number of blocks: one block is in memory at a time.

    python -m bench.memory [--blocks 8 32] [--width 768] [--samples 16]

Builds random Qwen2-VL models of one width and several depths, quantizes each with GPTQ in a process
of its own, and prints the largest resident set beside the size of the whole model in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.engine.models import copy_companions, write_weights
from bench.engine.process import measure, thread_environment
from prismquant.demo.run import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.models.config import import_transformers
from prismquant.report.tables import format_bytes, rich_table
from prismquant.storage import ShardReader


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
            command = [sys.executable, "-m", "prismquant", "quantize", str(model)]
            command += [
                "--recipe",
                "w4a16",
                "--calib",
                str(data),
                "--out",
                str(work / f"o{blocks}"),
            ]
            peak, seconds = peak_of(command, log)
            results.append({"blocks": blocks, "float32": size, "peak": peak, "seconds": seconds})
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
    facts = {"threads": 1, "torch": torch.__version__, "width": options.width, "imports": empty}
    print(json.dumps({"bench": "memory", **facts, "runs": results}))


if __name__ == "__main__":
    main()
