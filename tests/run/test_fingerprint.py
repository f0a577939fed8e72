"""What decides a result is noticed when it changes, and told in words that help."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prismquant as pq
from prismquant.data.batch_fingerprint import fingerprint_batch
from prismquant.data.batches import Batch
from prismquant.engine.setup import Silent
from prismquant.errors import NumericsError, StorageError
from prismquant.export.compressed_tensors.writer import CheckpointWriter
from prismquant.formats.spec import spec
from prismquant.recipe.schema import load_recipe
from prismquant.run.differences import differences, plan_differences
from prismquant.run.directory import RunDirectory
from prismquant.run.fingerprint import (
    code_versions,
    fingerprint_batches,
    stamp_files,
    unchanged,
)
from prismquant.run.identity import FileStamp, Identity
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

RTN = load_recipe("w8a8").with_rules({"solver": "rtn"})
IDENTITY = Identity(
    plan="p",
    files={
        "a.safetensors": FileStamp(10, 5_000_000_000, 3, "x"),
        "config.json": FileStamp(2, 5, 4, "y"),
    },
    samples=("1", "2", "3", "4"),
    inputs="i",
    arithmetic="cpu torch.float32",
    versions={"prismquant": "0.1.0", "sources": "s", "torch": "2.13.0", "transformers": "5"},
)


def told(now: Identity, earlier_plan: Any = None, plan: Any = None) -> list[str]:
    return differences(IDENTITY, now, earlier_plan, plan or {})


# Files


@settings(max_examples=60)
@given(size=st.integers(1, 5000), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_bit_of_a_small_file_counts(
    tmp_path_factory: pytest.TempPathFactory, size: int, place: float, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("stamp")
    content = bytearray(os.urandom(size))
    (folder / "w.safetensors").write_bytes(content)
    before = stamp_files(folder, [folder / "w.safetensors"])
    content[int(place * size)] ^= 1 << bit
    (folder / "w.safetensors").write_bytes(content)
    after = stamp_files(folder, [folder / "w.safetensors"])
    assert before["w.safetensors"].digest != after["w.safetensors"].digest


@pytest.mark.parametrize("place", [0.001, 0.3, 0.5, 0.999])
def test_a_tensor_in_a_large_shard_counts_without_reading_it_all(
    tmp_path: Path, place: float
) -> None:
    """Windows lie closer together than the hundredth of a file."""
    path = tmp_path / "w.safetensors"
    header = json.dumps({"w": {"dtype": "U8", "shape": [1 << 23], "data_offsets": [0, 1 << 23]}})
    content = bytearray(struct.pack("<Q", len(header)) + header.encode() + bytes(1 << 23))
    path.write_bytes(content)
    before = stamp_files(tmp_path, [path])["w.safetensors"]
    start = int(place * (len(content) - len(content) // 100))
    content[start : start + len(content) // 100] = b"x" * (len(content) // 100)
    path.write_bytes(content)
    after = stamp_files(tmp_path, [path])["w.safetensors"]
    assert (before.size, before.digest != after.digest) == (after.size, True)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read a\.json: No such file"):
        stamp_files(tmp_path, [tmp_path / "a.json"])


def test_a_file_that_changes_in_a_block_is_noticed_there(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"abc")
    files = stamp_files(tmp_path, [path])
    with unchanged(tmp_path, files) as look:
        look()
    what = r"w\.safetensors of the source model has changed"
    with pytest.raises(StorageError, match=what), unchanged(tmp_path, files) as look:  # noqa: PT012
        path.write_bytes(b"abd")
        os.utime(path, ns=(1, files["w.safetensors"].modified + 1))
        with pytest.raises(StorageError, match=what) as caught:
            look()
        assert "--resume" in str(caught.value.remedy)
    path.unlink()
    with pytest.raises(StorageError, match="is gone"), unchanged(tmp_path, files):
        pass


def test_another_error_is_blamed_on_the_change_behind_it(tmp_path: Path) -> None:
    """Half-written weights give NaN; the user should hear why."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"abc")
    files = stamp_files(tmp_path, [path])
    with pytest.raises(NumericsError), unchanged(tmp_path, files):
        raise NumericsError("NaN")
    with pytest.raises(StorageError, match="changed") as e, unchanged(tmp_path, files):  # noqa: PT012
        path.write_bytes(b"abcd")
        raise NumericsError("NaN")
    assert isinstance(e.value.__context__, NumericsError)


# Batches and code


def batch(**changes: Any) -> Batch:
    mask = torch.ones(1, 3, dtype=torch.bool)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": torch.ones(2, 4)}
    return replace(Batch(inputs, mask, mask, ("a",), ("text",)), **changes)


def _fingerprint(batches: list[Batch]) -> str:
    return fingerprint_batches([fingerprint_batch(batch) for batch in batches])


def test_all_that_the_model_sees_is_in_the_fingerprint_of_batches() -> None:
    pixels = torch.ones(2, 4)
    pixels[1, 3] += 1e-6
    ids = batch().inputs["input_ids"]
    others = [
        [batch(), batch()],
        [batch(vision_mask=torch.zeros(1, 3, dtype=torch.bool))],
        [batch(answer_mask=torch.zeros(1, 3, dtype=torch.bool))],
        [batch(inputs={"input_ids": ids, "pixel_values": pixels})],
        [batch(inputs={"input_ids": ids, "pixel_values": torch.ones(4, 2)})],
        [batch(inputs={"input_ids": ids, "pixel_values": torch.ones(2, 4, dtype=torch.int32)})],
        [batch(inputs={"input_ids": ids})],
    ]
    found = [_fingerprint(batches) for batches in ([], [batch()], *others)]
    assert len(set(found)) == len(found)
    assert found[0] == ""
    assert _fingerprint([batch(ids=("b",))]) == found[1]


def test_the_code_has_a_version_that_its_sources_decide() -> None:
    versions = code_versions()
    assert versions == code_versions()
    assert versions["prismquant"] == pq.__version__
    assert versions["torch"] == torch.__version__
    assert len(versions["sources"]) == 16


# Differences in words


def test_the_same_has_no_differences() -> None:
    assert told(IDENTITY) == []
    # A copy of the same model, made later: times and inodes are new, contents are not.
    copies = {
        name: replace(stamp, modified=9, inode=stamp.inode + 10)
        for name, stamp in IDENTITY.files.items()
    }
    assert told(replace(IDENTITY, files=copies)) == []


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"arithmetic": "cuda bf16"}, ["arithmetic: cpu torch.float32 -> cuda bf16"]),
        ({"samples": ("1", "2", "x", "y")}, ["calibration: 2 of 4 samples differ"]),
        ({"samples": ("1", "2")}, ["calibration: 2 samples instead of 4, 0 of them new"]),
        ({"samples": ("4", "3", "2", "1")}, ["calibration: the same 4 samples in another order"]),
        ({"samples": ("1", "2", "3", "3")}, ["calibration: 1 of 4 samples differ"]),
        (
            {"inputs": "j"},
            [
                "calibration: the same samples become other tokens or pixels: --max-pixels, "
                "--max-frames or --max-length differ, or a library that the processor uses has "
                "changed"
            ],
        ),
        (
            {"versions": {**IDENTITY.versions, "torch": "2.14.0", "sources": "t"}},
            ["code version: torch 2.13.0 -> 2.14.0"],
        ),
        (
            {"versions": {**IDENTITY.versions, "sources": "t"}},
            ["code version: the sources of prismquant were edited"],
        ),
    ],
)
def test_each_part_says_what_differs(changes: dict[str, Any], lines: list[str]) -> None:
    assert told(replace(IDENTITY, **changes)) == lines


@pytest.mark.parametrize(
    ("stamp", "line"),
    [
        (None, "model: shard a.safetensors is gone"),
        (FileStamp(10, 5, 3, "z"), "model: shard a.safetensors has changed"),
        (FileStamp(11, 5, 3, "z"), "model: shard a.safetensors has changed (10 -> 11 bytes)"),
        (
            FileStamp(10, 65_000_000_000, 3, "x"),
            "model: shard a.safetensors was written to at 1970-01-01T00:01:05Z, "
            "after the run began",
        ),
    ],
)
def test_a_file_of_the_model_that_differs_is_named(stamp: FileStamp | None, line: str) -> None:
    files = {"a.safetensors": stamp, "config.json": IDENTITY.files["config.json"]}
    now = replace(IDENTITY, files={k: v for k, v in files.items() if v is not None})
    assert told(now) == [line]


def test_a_model_that_differs_in_all_files_is_told_in_few_lines() -> None:
    files = {f"model-{n}.safetensors": FileStamp(1, 1, 1, "z") for n in range(20)}
    lines = told(replace(IDENTITY, files=files))
    assert len(lines) == 6
    assert lines[-1] == "model: and 17 more"


def test_a_processor_file_explains_other_tokens() -> None:
    """One cause, one line."""
    files = {**IDENTITY.files, "config.json": FileStamp(2, 5, 4, "z")}
    assert told(replace(IDENTITY, files=files, inputs="j")) == ["model: config.json has changed"]


def row(name: str, **values: Any) -> dict[str, Any]:
    beside = {key: values.pop(key) for key in ("stored_bytes", "note") if key in values}
    config = {"weights": spec("int4-g128").to_dict(), "options": {"damping": 0.01}, **values}
    return {"site": {"name": name}, "config": config, **beside}


def test_layers_with_the_same_change_are_told_together() -> None:
    earlier = {
        "recipe": "a",
        "rows": [row(n, stored_bytes=1, note="") for n in "abc"],
        "calibration": {"samples": 64, "seed": 0},
        "edges": [{"edge": {"norm": "norm", "producer": None}, "transform": "awq"}],
        "rotations": [],
        "kv_cache": None,
    }
    now = {
        "recipe": "b",
        "rows": [
            row("a", weights=spec("int8-channel").to_dict(), stored_bytes=2, note="x"),
            row("b", weights=spec("int8-channel").to_dict()),
            row("c", options={"damping": 0.1}),
        ],
        "calibration": {"samples": 128, "seed": 0},
        "edges": [
            {"edge": {"norm": "norm", "producer": None}, "transform": "smoothquant"},
            {"edge": {"norm": None, "producer": "up"}},
        ],
        "rotations": [{"modality": "llm", "seed": 1}],
        "kv_cache": {"spec": "fp8"},
    }
    assert plan_differences(earlier, now) == [
        "a and 1 other: weights int4 g128 sym -> int8 channel sym",
        "c: options.damping 0.01 -> 0.1",
        "calibration: samples 64 -> 128",
        "edges norm: transform awq -> smoothquant",
        "edges up and 2 others: not there before",
    ]
    assert plan_differences(now, earlier)[-1] == "edges up and 2 others: no longer there"
    assert plan_differences(earlier, {**earlier, "recipe": "other"}) == [
        "it gives another plan, in ways that its rows do not show"
    ]
    assert plan_differences(None, now) == [
        "it gives another plan; plan.json of the earlier run cannot be read"
    ]


# A source that changes underneath


class Meanwhile(Silent):
    """Does something once, after the n-th step."""

    def __init__(self, what: Callable[[], None], after: int = 2) -> None:
        self.what, self.left = what, after

    def finish(self, record: Any) -> None:
        """Count steps."""
        self.left -= 1
        if self.left == 0:
            self.what()


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """One's own copy, to be changed."""
    return Path(shutil.copytree(tiny("qwen2_vl"), tmp_path / "model"))


def other_weights(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-4:] = bytes.fromhex("0000803f")
    with path.open("r+b") as file:
        file.write(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_source_that_changes_during_a_run_stops_it_and_a_resume_too(
    model: Path, tmp_path: Path, name: str
) -> None:
    """Until the file is again as it was; then the run ends with the bytes of one in peace."""
    out, path = tmp_path / "out", model / name
    before, content = path.stat(), path.read_bytes()
    with pytest.raises(StorageError, match=f"{name} of the source model has changed while") as e:
        pq.quantize(model, RTN, out, reporter=Meanwhile(lambda: other_weights(path)))
    assert e.value.where == str(path)
    assert not (out / "config.json").exists()
    assert not RunDirectory(out).lock_path.exists()
    assert not list(out.rglob("*tmp"))
    steps = RunDirectory(out).load().steps
    assert len(steps) >= 2
    with pytest.raises(StorageError, match=f"model: .*{name} has changed"):
        pq.quantize(model, RTN, out, resume=True)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    result = pq.quantize(model, RTN, out, resume=True)
    assert result.record.steps[: len(steps)] == steps
    pq.quantize(model, RTN, tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        if file.is_file():
            assert (out / file.name).read_bytes() == file.read_bytes()


def test_a_source_that_is_touched_in_place_is_not_trusted_and_a_copy_is(
    model: Path, tmp_path: Path
) -> None:
    out, path = tmp_path / "out", model / "model.safetensors"
    with pytest.raises(KeyboardInterrupt):
        pq.quantize(model, RTN, out, reporter=Meanwhile(stop))
    os.utime(path)
    with pytest.raises(StorageError, match=r"shard model\.safetensors was written to at"):
        pq.quantize(model, RTN, out, resume=True)
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert pq.quantize(copy, RTN, out, resume=True).record.finished


def stop() -> None:
    raise KeyboardInterrupt


def test_a_source_that_changes_in_the_last_writes_leaves_no_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is copied in the end, just before config.json."""
    real = CheckpointWriter.finish

    def finish(writer: CheckpointWriter) -> None:
        other_weights(model / "model.safetensors")
        real(writer)

    monkeypatch.setattr(CheckpointWriter, "finish", finish)
    with pytest.raises(StorageError, match="has changed"):
        pq.quantize(model, RTN, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert not RunDirectory(tmp_path / "out").load().finished


def test_weights_that_break_while_they_are_read_are_blamed_on_the_change(
    model: Path, tmp_path: Path
) -> None:
    """Cut short in the middle of the run: not a riddle about a tensor, but the cause."""
    path = model / "model.safetensors"

    def cut() -> None:
        write_tensors(path, {"w": torch.ones(2)})

    with pytest.raises(StorageError, match=r"model\.safetensors of the source model has changed"):
        pq.quantize(model, RTN, tmp_path / "out", reporter=Meanwhile(cut))
