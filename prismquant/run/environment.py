"""Surroundings of a run, for its record: versions, processors, threads, the time."""

from __future__ import annotations

import platform
import time

import torch

from prismquant.version import __version__


def utc_now() -> str:
    """The time, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def environment(device: torch.device) -> dict[str, str]:
    """Versions, the thread count and the processors, for the record."""
    facts = {
        "prismquant": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "started": utc_now(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts
