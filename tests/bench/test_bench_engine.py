"""The bench of whole runs: its models are real ones, its clock loses nothing, its ratios hold."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from greenlet import getcurrent, greenlet

from bench.engine import __main__ as engine
from bench.engine import ours
from bench.engine.models import (
    MODELS,
    TOKENS_OF_A_PICTURE,
    Dimensions,
    config_of,
    write_model,
    write_samples,
)
from bench.engine.phases import OTHER, PHASES, Clock, located, timed
from bench.engine.process import measure, thread_environment
from prismquant.api import inspect
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.storage import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RELEASED = [name for name in MODELS if not name.endswith("-cut")]


def small(name: str) -> Dimensions:
    """A released model cut to two narrow blocks."""
    whole = MODELS[name].cut(2)
    text = {"vocab_size": 640, "hidden_size": 128, "intermediate_size": 256}
    text |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    vision = {"hidden_size": 128, "num_heads": 2, "intermediate_size": 256}
    vision |= {"out_hidden_size": 128}
    if whole.family == "qwen2_vl":
        vision = {"embed_dim": 128, "hidden_size": 128, "num_heads": 2}
    return replace(whole, text={**whole.text, **text}, vision={**whole.vision, **vision})


@pytest.fixture(scope="module", params=RELEASED)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint of every family."""
    return write_model(tmp_path_factory.mktemp("model"), small(request.param))


@pytest.mark.slow
def test_a_random_checkpoint_is_one_of_its_family(model: Path) -> None:
    """It binds, has a plan, and every activation stays finite and of ordinary size."""
    bound = bind(model)
    assert bound.dtype == torch.bfloat16
    plan = inspect(model, "w4a16")
    # Two blocks: queries, keys, values, outputs, and three layers of an MLP, or of each expert.
    experts = sum(row.site.expert is not None for row in plan.rows)
    assert len(plan.quantized) == (8 + experts if experts else 14)
    ids = torch.arange(100, 120).unsqueeze(0)
    logits = load_float(model, dtype=torch.float32)(input_ids=ids).logits
    assert 0.1 < float(logits.std()) < 10


def test_a_picture_has_the_tokens_that_are_promised(
    model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Whatever the family's patches."""
    side = MODELS[request.node.callspec.params["model"]].picture_side
    samples = write_samples(tmp_path, count=2, side=side)
    (batch,) = make_batches(
        read_samples(samples),
        load_processor(model),
        batch_size=2,
        vision_token_ids=bind(model).vision_token_ids,
    )
    assert batch.vision_mask.sum(1).tolist() == [TOKENS_OF_A_PICTURE] * 2


@pytest.mark.parametrize("name", RELEASED)
def test_released_dimensions_make_a_configuration(name: str) -> None:
    """Heads divide widths, and sections of rotary frequencies fill half a head."""
    config = config_of(MODELS[name])
    text = config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert head == 128
    assert sum(text.rope_parameters["mrope_section"]) == head // 2
    assert text.num_hidden_layers == MODELS[name].blocks
    assert config.vision_config.depth == MODELS[name].vision_blocks


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("blocks", [1, 2, 4, 100])
def test_a_cut_leaves_special_blocks_in_the_tower(name: str, blocks: int) -> None:
    """And cuts nothing that is shorter."""
    cut = MODELS[name].cut(blocks)
    assert cut.vision_blocks == min(blocks, MODELS[name].vision_blocks)
    if cut.special_blocks is not None:
        assert cut.special_blocks[1]
        assert all(0 <= block < cut.vision_blocks for block in cut.special_blocks[1])
    if blocks == 100:
        assert cut == MODELS[name]


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    """One of other dimensions, or that was cut off, is written anew."""
    dimensions = small("qwen2-vl-2b")

    def written() -> int:
        write_model(tmp_path / "m", dimensions)
        return min(file.stat().st_mtime_ns for file in (tmp_path / "m").glob("*.safetensors"))

    first = written()
    assert written() == first
    (tmp_path / "m" / "config.json").unlink()
    second = written()
    assert second > first
    dimensions = dimensions.cut(1)
    assert written() > second


def test_every_phase_names_functions_that_exist() -> None:
    """What a change of the package has renamed is to be renamed in the table."""
    assert {phase for phase, _, _ in located()} == {phase for phase, _, _ in PHASES}
    for gone in ("nothing", "GPTQ.nothing", "Nothing.run"):
        with pytest.raises(LookupError, match="is gone"):
            located([("sweep", "prismquant.algorithms.gptq", gone)])


def test_phases_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inner phase's time is not the outer one's; errors and generators leave the clock right."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "process_time", lambda: now / 2)

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = Clock()

    def inner() -> None:
        spend(2)
        raise KeyError

    def outer() -> Iterator[int]:
        spend(1)
        with pytest.raises(KeyError):
            timed(clock, "inner", inner)()
        yield 1
        spend(4)

    for _ in timed(clock, "outer", outer)():
        assert clock.phase == OTHER
        spend(8)
    clock.enter("done")
    assert clock.seconds == {"inner": 2, "outer": 5, OTHER: 8}
    assert clock.cpu_seconds == {"inner": 1, "outer": 2.5, OTHER: 4}


def test_a_pass_that_halts_takes_its_phase_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes on meanwhile is not its own, and it is in the same phase when it goes on."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "process_time", lambda: now)
    clock = Clock()

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    def halting() -> None:
        spend(1)
        getcurrent().parent.switch()
        spend(2)

    passes = [greenlet(timed(clock, "forward", halting)) for _ in range(3)]
    for each in passes:
        each.switch()
    timed(clock, "sweep", spend)(20)
    spend(300)
    for each in passes:
        each.switch()
    clock.enter("done")
    assert clock.seconds == {"forward": 9, "sweep": 20, OTHER: 300}


def test_a_command_is_measured_and_its_failure_told(tmp_path: Path) -> None:
    """Peak, status, and the words that say why."""
    log, environment = tmp_path / "log", thread_environment(3)
    assert environment["OMP_NUM_THREADS"] == "3"
    script = "x = b'1' * 50_000_000; print('half', flush=True); raise SystemExit('disk gone\\n---')"
    took = measure([sys.executable, "-c", script], log=log, environment=environment)
    assert (took.code, took.tail) == (1, "disk gone")
    assert 50_000_000 < took.peak < 100_000_000
    assert took.cpu_seconds > 0
    took = measure([sys.executable, "-c", "print('fine')"], log=log, environment=environment)
    assert (took.code, took.tail) == (0, "")


def job(tool: str = engine.OURS, method: str = engine.REFERENCE) -> engine.Job:
    return engine.Job("qwen2-vl-2b", 2, "w4a16", tool, method, samples=2, threads=1)


@pytest.mark.slow
def test_our_run_reports_phases_and_others_without_an_environment_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, with the figures that the tables show."""
    monkeypatch.setattr(engine, "MODELS", {"qwen2-vl-2b": small("qwen2-vl-2b")})
    bench = engine.Bench({}, 0, tmp_path, {})
    row = bench.run(job())
    assert not row.why
    assert row.report["layers"] == 14
    assert row.report["threads"] == 1
    for phase in ("load", "forward", "Hessian", "factorization", "sweep", "pack", "write"):
        assert row.report["phases"][phase] > 0
    assert sum(row.report["phases"].values()) == pytest.approx(row.report["seconds"])
    assert row.size > 0
    missing = bench.run(job("gptqmodel", "gptq"))
    assert missing.why == "not run"
    mine, other = engine.main_table([row, missing])
    assert mine[0] == "qwen2-vl-2b (2 blocks)"
    assert mine[5] == mine[7] == mine[9] == "1.00"
    assert other[4] == "not run"
    assert len(engine.all_tables([missing])) == 1
    _, (headers, phases) = engine.all_tables([row, missing])
    assert len(headers) == 2
    assert "sweep" in [cells[0] for cells in phases]


def test_rows_of_earlier_runs_are_reused_unless_they_failed(tmp_path: Path) -> None:
    """By all that decides a figure."""
    report = {"steps": {"quantize": {"seconds": 3.0}}, "versions": {}}
    done = engine.Row(job("gptqmodel", "gptq"), 4.0, 5.0, 6, 7, report)
    failed = engine.Row(job(), why="failed: no")
    options = engine.parse(["--blocks", "2"])
    write_json(tmp_path / "f.json", engine.facts(options, [done, failed]))
    known = engine.earlier([tmp_path / "f.json"])
    assert known == {done.job: replace(done, reused=True)}
    assert engine.Bench({}, 0, tmp_path, known).run(done.job).reused
    double = engine.Row(job(), 2.0, 10.0, 12, 7, {"seconds": 1.0})
    assert engine.main_table([double, done])[1][4:] == [
        *("4.0", "2.00", "5.0", "0.50", "6 B", "0.50", "3.0")
    ]


def test_the_peers_algorithm_is_a_recipe_of_the_same_formats(tmp_path: Path) -> None:
    """Only how codes are chosen differs."""
    model = write_model(tmp_path / "m", small("qwen2-vl-2b"))
    for setting, formats in {"w4a16": ((4, 128), 0), "w4a8": ((4, 0), 8)}.items():
        assert engine.formats(model, setting) == formats
        preset, _, peers = (inspect(model, ours.recipe_of(setting, m)) for m in ours.METHODS)
        assert [row.config.weights for row in preset.quantized] == [
            row.config.weights for row in peers.quantized
        ]
        assert peers.quantized[0].config.options["refine_passes"] == 0
        assert peers.quantized[0].config.weight_range.kind == "minmax"
