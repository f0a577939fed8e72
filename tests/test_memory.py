"""Memory: a run's peak does not grow with the number of blocks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from prismquant.memory import ask_for_large_pages, peak_memory_bytes

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
