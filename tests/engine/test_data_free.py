"""Runs without data: bytes and records of a plain loop, in order, within memory, stopped."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save

import prismquant as pq
from prismquant.algorithms.problem import LayerProblem
from prismquant.algorithms.rtn import RTN
from prismquant.diagnostics.step_record import LayerRecord, StepRecord
from prismquant.engine import data_free
from prismquant.engine.data_free import run_without_data
from prismquant.engine.placement import Placement
from prismquant.engine.run import _walk
from prismquant.engine.setup import RunSetup
from prismquant.engine.unit_plan import unit_plans
from prismquant.errors import NumericsError, PlanError, StorageError
from prismquant.export.compressed_tensors.writer import CheckpointWriter
from prismquant.formats.quantized_layer import QuantizedLayer
from prismquant.models.bind import bind
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import PlanRow, problem_groups
from prismquant.plan.source import source_reader
from prismquant.recipe.presets import PRESETS
from prismquant.run.directory import NOTHING_TO_RESUME
from prismquant.runtime.mixed import Precision
from prismquant.shards import ShardReader
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor


def rounding(preset: str) -> pq.Recipe:
    """A preset with rounding to nearest in place of all that needs data."""
    return pq.load_recipe(preset).without_transforms().with_rules({"solver": "rtn"})


def setup_of(folder: Path, recipe: pq.Recipe, out: Path, **fields: Any) -> RunSetup:
    bound = bind(folder)
    plan = make_plan(recipe, bound)
    out.mkdir(parents=True, exist_ok=True)
    setup = RunSetup(plan=plan, bound=bound, batches=(), sink=CheckpointWriter(out, bound, plan))
    return replace(setup, **fields)


def pooled(setup: RunSetup, **how: Any) -> Generator[StepRecord, None, None]:
    """A run without data, with so many workers and so much memory."""
    return run_without_data(setup, _walk(setup), unit_plans(setup.plan, setup.bound), **how)


def by_hand(setup: RunSetup) -> Iterator[StepRecord]:
    """The same in a plain loop: weights in float32, whole groups, one solver after the other."""
    reader, precision = source_reader(setup.plan, setup.bound), setup.placement.precision

    def matrix(row: PlanRow) -> Tensor:
        weight = reader.read(setup.bound.names.to_disk(f"{row.site.name}.weight"))
        weight = weight.to(precision.dtype).float()
        return weight.reshape(row.site.out_features, row.site.in_features)

    for step in setup.bound.steps:
        layers, records = [], []
        rows = [row for row in setup.plan.quantized if row.site.step == step.index]
        for stage in sorted({row.site.stage for row in rows}):
            for group in problem_groups([row for row in rows if row.site.stage == stage]):
                first = group[0]
                assert first.config.weights is not None
                result = RTN().solve(
                    LayerProblem(
                        names=tuple(row.site.name for row in group),
                        weights=tuple(matrix(row) for row in group),
                        spec=first.config.weights,
                        range_rule=first.config.weight_range,
                        scale_dtype=first.site.dtype,
                    )
                )
                for row, weight, loss in zip(group, result.weights, result.losses, strict=True):
                    layers.append(QuantizedLayer(row.site.name, weight))
                    record = LayerRecord(row.site.name, loss, loss, result.diagnostics)
                    weight_of_vision = first.config.vision_weight
                    records.append(replace(record, vision_weight=weight_of_vision))
        yield StepRecord(step.name, setup.sink.write_step(step, layers, {}), 0.0, tuple(records))


def told(records: Sequence[StepRecord]) -> list[dict[str, Any]]:
    """Records without what differs from one run to the next."""
    apart = ("seconds", "threads")  # without data, threads change nothing and are not noted
    return [{k: v for k, v in asdict(record).items() if k not in apart} for record in records]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def compare(folder: Path, recipe: pq.Recipe, work: Path, **fields: Any) -> None:
    """The plain loop and the pool, side by side."""
    reference = setup_of(folder, recipe, work / "loop", **fields)
    assert not reference.plan.needs_data
    expected = told(list(by_hand(reference)))
    found = told(list(pooled(setup_of(folder, recipe, work / "pool", **fields), workers=3)))
    assert found == expected
    assert files_of(work / "pool") == files_of(work / "loop")


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to the disk is what takes longest here, and changes no byte."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# One of each kind of format and layout: the rest differ in widths only.
KINDS = ("w4a16-all", "fp8-all", "nvfp4a16", "mxfp4-all")


@pytest.mark.parametrize("preset", KINDS)
def test_every_family_gives_the_bytes_and_records_of_a_plain_loop(
    tiny_folder: Path, tmp_path: Path, preset: str
) -> None:
    compare(tiny_folder, rounding(preset), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in PRESETS if "-static" not in name])
def test_every_preset_without_data_gives_the_bytes_and_records_of_a_plain_loop(
    tiny_folder: Path, tmp_path: Path, preset: str
) -> None:
    recipe = rounding(preset)
    if make_plan(recipe, bind(tiny_folder)).needs_data:
        pytest.skip("needs data even with rounding to nearest")
    compare(tiny_folder, recipe, tmp_path)


def test_rules_of_one_group_are_followed_layer_by_layer(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Different formats in one block, a tensor's scale, a note, a head with a weight of its own."""
    recipe = rounding("w4a16").with_rules(
        {"match": {"role": "mlp"}, "weights": "fp8-tensor", "weight_range": "mse"},
        {"match": {"name": "*.layers.0.*"}, "vision_weight": 2.0},
        {"match": {"role": "lm_head"}, "weights": "fp8-b128", "fallback": "nearest"},
    )
    compare(tiny("qwen2_vl"), recipe, tmp_path)


@pytest.mark.parametrize("layout", ["native", "old"])
def test_rotated_checkpoints_stream(tiny: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    """Also one whose tied head gets a weight of its own."""
    rotation = {"name": "rotation", "match": {"modality": "llm"}, "options": {"online": True}}
    rule = {"match": {"modality": "llm", "role": ["attn", "mlp"]}, "weights": "int4-g128"}
    recipe = pq.load_recipe({"rules": [rule | {"solver": "rtn"}], "transforms": [rotation]})
    compare(tiny("qwen2_vl", layout=layout, tie=True), recipe, tmp_path)


@pytest.mark.parametrize(
    ("stored", "arithmetic"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_dtypes_on_disk_and_of_the_arithmetic_round_alike(
    tiny: Callable[..., Path], tmp_path: Path, stored: torch.dtype, arithmetic: torch.dtype
) -> None:
    compare(
        tiny("qwen2_vl", dtype=stored),
        rounding("w4a16"),
        tmp_path,
        placement=Placement(precision=Precision(arithmetic)),
    )


def test_a_pool_without_workers_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="0 workers"):
        next(pooled(setup_of(tiny("qwen2_vl"), rounding("w8a8"), tmp_path), workers=0))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_steps_come_in_the_models_order_and_finished_ones_are_left_out(
    tiny: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    folder = tiny("qwen3_vl")
    steps = list(
        pooled(setup_of(folder, rounding("w8a8-all"), tmp_path / "whole"), workers=workers)
    )
    names = [step.name for step in bind(folder).steps]
    assert [step.name for step in steps] == names
    done = {step.name: step for step in (steps[0], steps[3], steps[-1])}
    setup = setup_of(folder, rounding("w8a8-all"), tmp_path / "rest", done=done)
    left = [step.name for step in pooled(setup, workers=workers)]
    assert left == [name for name in names if name not in done]
    for name, data in files_of(tmp_path / "rest").items():
        assert data == (tmp_path / "whole" / name).read_bytes()


def test_the_number_of_threads_is_given_back(tiny: Callable[..., Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        list(pooled(setup_of(tiny("qwen2_vl"), rounding("w8a8"), tmp_path), workers=2))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


class Gate:
    """A sink whose steps wait until so many are under way; tells how many were at most."""

    def __init__(self, sink: Any, wanted: int) -> None:
        self.sink = sink
        self.wanted = wanted
        self.reached = threading.Event()
        self.lock = threading.Lock()
        self.inside = self.most = 0

    def write_step(self, step: Any, layers: Any, changed: Any) -> str:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            if self.inside >= self.wanted:
                self.reached.set()
        self.reached.wait(timeout=300)
        self.reached.set()
        shard: str = self.sink.write_step(step, layers, changed)
        with self.lock:
            self.inside -= 1
        return shard


@pytest.mark.parametrize(("memory", "most"), [(1 << 40, 3), (1, 1)])
def test_memory_bounds_the_steps_in_flight(
    tiny: Callable[..., Path], tmp_path: Path, memory: int, most: int
) -> None:
    setup = setup_of(tiny("qwen2_vl"), rounding("w8a8-all"), tmp_path)
    gate = Gate(setup.sink, most)
    list(pooled(replace(setup, sink=gate), workers=3, memory=memory))
    assert gate.most == most


def damaged(folder: Path, target: Path, name: str) -> Path:
    """A copy of a checkpoint with a NaN in one tensor."""
    shutil.copytree(folder, target)
    reader = ShardReader(target)
    tensors = {key: reader.read(key) for key in reader.names}
    tensors[name].view(-1)[7] = float("nan")
    write_tensors(target / "model.safetensors", tensors)
    return target


@pytest.mark.parametrize("preset", ["w4a16", "nvfp4a16", "fp8"])
def test_a_damaged_weight_is_named(tiny: Callable[..., Path], tmp_path: Path, preset: str) -> None:
    """The second of a group, in the second block: what is before it is yielded first."""
    folder = tiny("qwen2_vl")
    site = "model.language_model.layers.1.mlp.up_proj"
    disk = bind(folder).names.to_disk(f"{site}.weight")
    broken = damaged(folder, tmp_path / "broken", disk)
    names = []
    with pytest.raises(NumericsError, match="1 values that are NaN or infinite") as caught:  # noqa: PT012
        for step in pooled(setup_of(broken, rounding(preset), tmp_path / "out"), workers=4):
            names.append(step.name)  # noqa: PERF401 - what came before the error counts
    order = [step.name for step in bind(folder).steps]
    assert names == order[: order.index("model.language_model.layers.1")]
    assert caught.value.where == site
    assert "damaged" in str(caught.value.remedy)


def test_closing_stops_the_workers_and_leaves_whole_files_only(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """As Ctrl-C does: no thread is left, no temporary file, and a resumed run ends the same."""
    folder, recipe = tiny("qwen3_vl"), rounding("w4a16-all")
    list(pooled(setup_of(folder, recipe, tmp_path / "whole")))
    setup = setup_of(folder, recipe, tmp_path / "cut")
    steps = pooled(setup, workers=2)
    first = next(steps)
    steps.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prismquant")]
    assert not [name for name in files_of(tmp_path / "cut") if name.endswith(".tmp")]
    assert len(files_of(tmp_path / "cut")) < len(files_of(tmp_path / "whole"))
    setup = replace(setup, done={first.name: first})
    list(pooled(setup, workers=2))
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_a_stopped_worker_ends_between_two_blocks_of_rows(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    setup = setup_of(tiny("qwen2_vl"), rounding("w4a16"), tmp_path)
    task = data_free._Task(setup, unit_plans(setup.plan, setup.bound))
    task.stopped.set()
    unit = list(_walk(setup).units())[-2]
    with pytest.raises(data_free._Stopped):
        task(unit)
    assert not files_of(tmp_path)


def test_the_main_function_streams_and_resumes_to_the_same_bytes(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption in the middle, then --resume; the engine is never asked."""
    folder = tiny("qwen2_5_vl")
    monkeypatch.setattr("prismquant.engine.run._visit", None)
    whole = pq.quantize(folder, rounding("w4a16-all"), tmp_path / "whole", resume=True)
    assert NOTHING_TO_RESUME in whole.notes

    class Interrupt:
        def begin(self, steps: int) -> None: ...
        def stage(self, step: str, what: str) -> None: ...
        def finish(self, record: StepRecord) -> None:
            if record.name.endswith("layers.0"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pq.quantize(folder, rounding("w4a16-all"), tmp_path / "cut", reporter=Interrupt())
    record = json.loads((tmp_path / "cut" / "prismquant" / "record.json").read_text())
    assert 0 < len(record["steps"]) < len(bind(folder).steps)
    resumed = pq.quantize(folder, rounding("w4a16-all"), tmp_path / "cut", resume=True)
    assert NOTHING_TO_RESUME not in resumed.notes
    for path in (tmp_path / "whole").glob("*.*"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


def test_shards_are_byte_for_byte_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """Every width, no elements, no axes, names that must be escaped, strides."""
    torch.manual_seed(0)
    kinds = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu]
    kinds += [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float16]
    tensors = {
        f'{number}.{place}é"': torch.randint(0, 2, shape).to(kind)
        for number, kind in enumerate(kinds)
        for place, shape in enumerate([(3, 4), (), (0, 2), (5,)])
    }
    tensors["strided"] = torch.randn(4, 6).T
    write_tensors(tmp_path / "ours.safetensors", tensors)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "ours.safetensors").read_bytes() == save(whole, metadata={"format": "pt"})
    reader = ShardReader(tmp_path)
    for name, tensor in tensors.items():
        assert reader.read(name).dtype == tensor.dtype
        assert torch.equal(reader.read(name).float(), tensor.float())


def test_a_shard_that_shrinks_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"weight": torch.ones(64)})
    reader = ShardReader(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StorageError, match="shorter than its header says"):
        reader.read("weight")
