"""Memory: a run's peak does not grow with the number of blocks."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest

from prismquant.memory import keep_heap_compact, peak_memory_bytes


def test_the_peak_is_at_least_what_was_touched() -> None:
    data = bytearray(b"x") * (64 << 20)
    assert peak_memory_bytes() > len(data)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts pages as Linux does")
def test_freed_blocks_leave_the_resident_set() -> None:
    """Between small blocks that stay, megabytes that go are given back."""
    keep_heap_compact()
    before = resident_bytes()
    large, small = [], []
    for _ in range(32):
        large.append(bytearray(b"x") * (4 << 20))
        small.append(bytearray(b"x") * 4096)
    assert resident_bytes() - before > 100 << 20
    large.clear()
    assert resident_bytes() - before < 16 << 20
    assert len(small) == 32


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


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
        peaks.append(peak_of(command)[0])
    assert peaks[1] < 1.1 * peaks[0]
