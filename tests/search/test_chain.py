"""From a model to its checkpoint: analyzed, searched, quantized, and weighed on the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import prismquant as pq
from prismquant.check import check
from prismquant.search.sensitivity import FLOAT
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FORMATS = "int3-g32,int4-g128,w8a8,fp8,nvfp4+none,kv:fp8"


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def analyzed(
    request: pytest.FixtureRequest,
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A small model, and the file of its sensitivity."""
    folder, file = tiny(request.param), tmp_path_factory.mktemp("analyzed") / "s.json"
    options = {"method": "fisher", "solver": "rtn", "draws": 1, "disable": "*layers.1.mlp*"}
    pq.analyze(folder, FORMATS, file, calibration_file, **options)  # type: ignore[arg-type]
    return folder, file


@pytest.mark.parametrize(
    "asked",
    [
        {"bits": 20},
        {"size": "4.6MB", "reader": "vllm", "cap": "llm=16"},
        {"bits": 24, "cache_bytes": 300, "tensor_parallel": 2},
    ],
    ids=str,
)
def test_the_bytes_on_the_disk_are_those_that_were_promised(
    analyzed: tuple[Path, Path],
    calibration_file: Path,
    tmp_path: Path,
    asked: dict[str, str | int],
) -> None:
    folder, file = analyzed
    found = pq.find_mix(file, out=tmp_path / "r.yaml", **asked)  # type: ignore[arg-type]
    assert len(set(found.mix.formats.values())) > 1
    result = pq.quantize(folder, tmp_path / "r.yaml", tmp_path / "out", calibration_file)
    reader = ShardReader(tmp_path / "out")
    stored = sum(reader.info(name).nbytes for name in reader.names)
    assert stored == found.mix.stored_bytes == result.plan.total_bytes
    if "size" in asked:
        assert stored <= 4_600_000
    disabled = [name for name in found.mix.formats if "language_model.layers.1.mlp" in name]
    assert disabled
    assert {found.mix.formats[name] for name in disabled} == {FLOAT}
    assert (result.plan.kv_cache is not None) == ("cache_bytes" in asked)
    reader_of = "vllm" if "reader" in asked else "prismquant"
    assert check(tmp_path / "out", reader_of).ok
