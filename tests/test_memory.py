"""Memory: a run's peak does not grow with the number of blocks."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import prismquant as pq
from prismquant.errors import NumericsError, OutOfMemory
from prismquant.memory import (
    ask_for_large_pages,
    collecting_seldom,
    memory_error,
    memory_told,
    peak_memory_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# Prints by how many bytes the resident set has grown after all large blocks are freed.
_CHURN = """
import resource
from pathlib import Path
from prismquant.memory import keep_heap_compact

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

keep_heap_compact()
first = bytearray(b"x") * (24 << 20)
del first
before, large, small = resident(), [], []
for _ in range(32):
    large.append(bytearray(b"x") * (4 << 20))
    small.append(bytearray(b"x") * 4096)
large.clear()
print(resident() - before)
"""

# The same of blocks that are too small to be given back by themselves.
_SMALL_CHURN = (
    _CHURN.replace("4 << 20", "1 << 19")
    .replace("range(32)", "range(256)")
    .replace("large.clear()", "large.clear()\ngive_back_freed()")
    .replace("import keep_heap_compact", "import give_back_freed, keep_heap_compact")
)


def test_the_peak_is_at_least_what_was_touched() -> None:
    data = bytearray(b"x") * (64 << 20)
    assert peak_memory_bytes() > len(data)


def test_circles_are_collected_as_before_after_an_error_too() -> None:
    before = gc.get_threshold()
    with contextlib.suppress(NumericsError), collecting_seldom():
        assert gc.get_threshold()[0] == 100 * before[0]
        raise NumericsError("some")
    assert gc.get_threshold() == before


def test_large_pages_are_asked_for_unless_that_was_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    ask_for_large_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    ask_for_large_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts pages as Linux does")
def test_freed_blocks_leave_the_resident_set() -> None:
    """Megabytes that go between small blocks that stay are given back, also once glibc has seen
    larger blocks freed; in a process of its own, because the setting is the process's.
    """
    command = [sys.executable, "-c", _CHURN]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 16 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep other heaps")
def test_freed_small_blocks_leave_it_when_they_are_given_back() -> None:
    """Half megabytes go between small blocks that stay: 128 MiB in all."""
    command = [sys.executable, "-c", _SMALL_CHURN]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 16 << 20
    kept = [sys.executable, "-c", _SMALL_CHURN.replace("\ngive_back_freed()", "")]
    done = subprocess.run(kept, check=True, capture_output=True, text=True)
    assert int(done.stdout) > 64 << 20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts pages as Linux does")
def test_four_times_the_blocks_take_the_same_memory(tmp_path: Path) -> None:
    """A block of width 512 is 11 MiB in float32: held, 18 more blocks would add 200 MiB."""
    from bench.memory import peak_of, random_model
    from prismquant.demo.scenes import write_dataset

    data = write_dataset(tmp_path / "data", split="calibration", count=8)
    peaks = []
    for blocks in (6, 24):
        model = random_model(tmp_path / f"m{blocks}", width=512, blocks=blocks)
        command = [sys.executable, "-m", "prismquant", "quantize", str(model), "--recipe", "w4a16"]
        command += ["--calib", str(data), "--out", str(tmp_path / f"o{blocks}")]
        peaks.append(peak_of(command, tmp_path / "log")[0])
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize(
    ("take", "asked"),
    [
        (lambda: torch.empty(1 << 48), "1024.0 TiB"),
        (lambda: np.empty(1 << 48), "2.00 PiB"),
        (lambda: bytearray(1 << 60), None),
        (lambda: _raise(OSError(errno.ENOMEM, "Cannot allocate memory")), None),
        (
            lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.5 GiB")),
            "2.5 GiB",
        ),
        (lambda: _raise(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when")), None),
        (lambda: _raise(RuntimeError("std::bad_alloc")), None),
    ],
)
def test_whoever_runs_out_of_memory_it_is_told_in_words(take: Any, asked: str | None) -> None:
    """What was asked for, as far as the library says, and the flags of the command that help."""
    with pytest.raises(OutOfMemory) as caught, memory_told("--batch-size"):
        take()
    assert ("more were asked for" in caught.value.what) == (asked is not None)
    assert asked is None or f"ran out: {asked} more" in caught.value.what
    assert "--batch-size runs fewer samples together" in str(caught.value.remedy)
    assert "--memory-budget" not in str(caught.value.remedy)
    again = caught.value
    assert memory_error(again) is again


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory"),
        RuntimeError("shapes differ"),
        OSError(2, "gone"),
        ImportError("x.so: cannot allocate memory in static TLS block"),
        NumericsError("layer out of memory"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert memory_error(error) is None
    with pytest.raises(type(error), match=re.escape(str(error))), memory_told():
        raise error


def test_a_run_that_runs_out_of_memory_ends_with_the_flags_that_help(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that it leaves blocks the next one."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "prismquant.algorithms.rtn.RTN.solve_weight", lambda *_, **__: [0] * (1 << 60)
        )
        with pytest.raises(OutOfMemory, match="memory ran out") as caught:
            pq.quantize(
                tiny("qwen2_vl"),
                {"rules": [{"weights": "int8-channel", "solver": "rtn"}]},
                tmp_path / "o",
            )
    assert "--memory-budget" in str(caught.value.remedy)


def _raise(error: Exception) -> None:
    raise error
