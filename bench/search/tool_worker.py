"""What the programs that run other tools' searches share; nothing is imported from prismquant."""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def arguments(text: str, **more: Any) -> argparse.Namespace:
    """Words of the command line that all of them take.

    Args:
        text: What the program does.
        more: Settings of one option more, by its name.
    """
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", required=True, help="mean of the codes")
    parser.add_argument("--formats", type=int, nargs="+", default=[2, 3, 4], help="their bits")
    parser.add_argument("--group-size", type=int, default=32)
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args()


def float_model(folder: Path) -> Any:
    """The float model of a checkpoint, in float32."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model


def samples(folder: Path) -> list[dict[str, torch.Tensor]]:
    """All samples, in the order of their names."""
    return [load_file(path) for path in sorted(folder.glob("*.safetensors"))]


def spent(watch: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Seconds, seconds of CPU and peak memory in bytes by now.

    Args:
        watch: From :func:`bench.peers.worker.stopwatch`, started with the search.
    """
    took = watch()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": took["seconds"], "cpu": took["cpu_seconds"], "peak": peak}


def tell(out: Path, told: Mapping[str, Any]) -> None:
    """Write what was found."""
    out.write_text(json.dumps(told), encoding="utf-8")
