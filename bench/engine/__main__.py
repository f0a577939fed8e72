"""Whole runs of ours and of other tools on the same models, samples, settings and threads.

    python -m bench.engine [--models qwen2-vl-2b qwen2.5-vl-7b-cut qwen3-vl-8b-cut]
        [--settings w4a16 w4a8] [--methods preset ..] [--blocks N] [--samples 32] [--threads 1]
        [--llm-compressor-python PATH] [--gptqmodel-python PATH] [--auto-round-python PATH]
        [--auto-round-iterations N] [--work DIR] [--reuse FILE.json ...] [--out FILE.md]

Models are random, with the dimensions of released ones (``-cut``: four blocks in each tower;
``--blocks`` cuts further); samples are a picture of 256 tokens and a question each. The linear
layers of the language model's blocks are quantized. Each run is a process of its own, from a
checkpoint in the page cache to the tool's own compressed checkpoint on the disk, at the tool's
defaults: so others run the model in bfloat16, ours its linear layers if the processor multiplies
bfloat16. Peak memory is that of the largest process. Where other processes share the machine,
seconds of CPU are the fairer figure; gptqmodel refuses to work with one worker, and may use two
cores whatever the threads.

Ours is shown as its preset has it, which every ratio is to, and with the others' algorithm. By
default auto-round only rounds to nearest; the 200 iterations that it is made for take hours.

``--out`` also writes the figures beside the table, as JSON, after each run; ``--reuse`` takes runs
that such files have instead of running them again. Models stay in ``--work`` for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.engine import ours
from bench.engine.models import MODELS, Dimensions, write_model, write_samples
from bench.engine.process import measure, thread_environment
from bench.peers.worker import REPORT
from prismquant.api import inspect
from prismquant.report.tables import NOTHING, format_bytes, markdown_table, rich_table
from prismquant.shards import weight_bytes
from prismquant.storage import write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
OURS = "prismquant"
REFERENCE = ours.METHODS[0]
HEADERS = (
    *("model", "setting", "tool", "method", "seconds", "of ours", "CPU seconds", "of ours"),
    *("peak memory", "of ours", "of it quantizing"),
)


@dataclass(frozen=True)
class Peer:
    """A tool: the module that runs it, its method, and why it quantizes no inputs."""

    module: str
    method: str
    refuses_inputs: str = ""


PEERS: Mapping[str, Peer] = {
    "llm-compressor": Peer("llm_compressor", "gptq"),
    "gptqmodel": Peer("gptq_model", "gptq", "does not quantize inputs"),
    "auto-round": Peer("auto_round", "signround", "stores W4A8 as large as the float model"),
}


@dataclass(frozen=True)
class Job:
    """What is run: one model under one setting by one tool; equal jobs can share a measurement.

    Attributes:
        model: A key of :data:`~bench.engine.models.MODELS`.
        blocks: To which its towers were cut, or None.
        setting: A preset.
        tool, method: Who does it, and how.
        samples: Calibration samples.
        threads: Of every library.
    """

    model: str
    blocks: int | None
    setting: str
    tool: str
    method: str
    samples: int
    threads: int

    @property
    def title(self) -> str:
        """The model, and what was cut off it."""
        return self.model if self.blocks is None else f"{self.model} ({self.blocks} blocks)"


@dataclass(frozen=True)
class Row:
    """A job's figures; ``why`` says why there are none.

    Attributes:
        job: What was run.
        seconds, cpu_seconds: Of the process, from start to end.
        peak: Bytes of its largest resident set.
        size: Bytes of the checkpoint's shards that it left.
        report: What the process says of itself: seconds of its phases or steps, versions.
        load: The machine's load average when it ended.
        reused: Whether the figures are of an earlier run.
        why: Why there are none.
    """

    job: Job
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: int = 0
    size: int = 0
    report: Mapping[str, Any] = field(default_factory=dict)
    load: float = 0.0
    reused: bool = False
    why: str = ""


@dataclass(frozen=True)
class Bench:
    """What all jobs share.

    Attributes:
        pythons: Interpreters of the tools that are there.
        iterations: Of auto-round.
        work: Where models, results and logs go.
        known: Rows of earlier runs.
    """

    pythons: Mapping[str, str]
    iterations: int
    work: Path
    known: Mapping[Job, Row]

    def dimensions(self, job: Job) -> Dimensions:
        """Of a job's model."""
        whole = MODELS[job.model]
        return whole if job.blocks is None else whole.cut(job.blocks)

    def prepared(self, job: Job) -> tuple[Path, Path]:
        """A job's model, in the page cache, and its samples; both are written if need be."""
        dimensions = self.dimensions(job)
        name = job.model if job.blocks is None else f"{job.model}-{job.blocks}-blocks"
        model = write_model(self.work / name, dimensions)
        side = dimensions.picture_side
        samples = write_samples(
            self.work / f"samples-{job.samples}-{side}", count=job.samples, side=side
        )
        for file in model.glob("*.safetensors"):
            with file.open("rb", buffering=0) as shard:
                while shard.read(1 << 24):
                    pass
        return model, samples

    def run(self, job: Job) -> Row:
        """A job's row, from an earlier run where there is one."""
        if job in self.known:
            return self.known[job]
        if job.tool != OURS and job.tool not in self.pythons:
            return Row(job, why="not run")
        model, samples = self.prepared(job)
        weights, inputs = formats(model, job.setting)
        if inputs and job.tool != OURS and PEERS[job.tool].refuses_inputs:
            return Row(job, why=PEERS[job.tool].refuses_inputs)
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        command = [self.pythons.get(job.tool, sys.executable), "-m"]
        files = [str(path.resolve()) for path in (model, samples, out)]
        if job.tool == OURS:
            command += ["bench.engine.ours", *files, "--setting", job.setting]
            command += ["--method", job.method]
        else:
            command += [f"bench.engine.{PEERS[job.tool].module}", *files]
            command += ["--bits", str(weights[0]), "--group-size", str(weights[1])]
            command += ["--activation-bits", str(inputs), "--samples", str(job.samples)]
            command += ["--iterations", str(self.iterations)]
        # Some tools leave logs in the folder where they run.
        environment = thread_environment(job.threads) | {"PYTHONPATH": str(ROOT)}
        environment |= {"HF_HUB_OFFLINE": "1"}
        log = (
            self.work.resolve()
            / f"{job.model}-{job.setting}-{job.tool}-{job.method.split()[0]}.log"
        )
        took = measure(command, log=log, environment=environment, folder=self.work)
        try:
            if took.code:
                return Row(job, why=f"failed: {took.tail}")
            return Row(
                job,
                took.seconds,
                took.cpu_seconds,
                took.peak,
                weight_bytes(out),
                json.loads((out / REPORT).read_text(encoding="utf-8")),
                os.getloadavg()[0],
            )
        finally:
            shutil.rmtree(out, ignore_errors=True)


def formats(model: Path, setting: str) -> tuple[tuple[int, int], int]:
    """A preset as others are told it: bits and group size (0: a row) of weights, bits of inputs."""
    row = inspect(model, setting).quantized[0]
    assert row.config.weights is not None
    inputs = row.config.activations.bits if row.config.activations is not None else 0
    return (row.config.weights.bits, row.config.weights.group_size or 0), inputs


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Everything that the command line asks for, ours first."""
    iterations = options.auto_round_iterations
    methods = [(OURS, method) for method in options.methods]
    for tool, peer in PEERS.items():
        name = peer.method
        if tool == "auto-round":
            name = f"{name} {iterations} iterations" if iterations else "rtn"
        methods.append((tool, name))
    for model in options.models:
        for setting in options.settings:
            for tool, method in methods:
                if tool in options.tools:
                    yield Job(
                        *(model, options.blocks, setting, tool, method),
                        *(options.samples, options.threads),
                    )


def earlier(files: Sequence[Path]) -> dict[Job, Row]:
    """Rows that files of earlier runs have; later files win. Failures are tried again."""
    known = {}
    for file in files:
        for raw in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            row = Row(**{**raw, "job": Job(**raw["job"]), "reused": True})
            if not row.why:
                known[row.job] = row
    return known


def references(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """Our preset's row of each model and setting."""
    return {
        (row.job.model, row.job.setting): row
        for row in rows
        if row.job.tool == OURS and row.job.method == REFERENCE and not row.why
    }


def cells(row: Row, reference: Row | None) -> list[str]:
    """A row of the main table."""
    job = row.job
    names = [job.title, job.setting, job.tool, job.method]
    if row.why:
        return [*names, row.why, *[""] * (len(HEADERS) - len(names) - 1)]

    def ratio(name: str) -> str:
        base = getattr(reference, name) if reference is not None else 0
        return f"{getattr(row, name) / base:.2f}" if base else NOTHING

    steps = row.report.get("steps")
    quantizing = steps["quantize"]["seconds"] if steps else row.report["seconds"]
    return [
        *names,
        *(f"{row.seconds:.1f}", ratio("seconds")),
        *(f"{row.cpu_seconds:.1f}", ratio("cpu_seconds")),
        *(format_bytes(row.peak), ratio("peak")),
        f"{quantizing:.1f}",
    ]


def main_table(rows: Sequence[Row]) -> list[list[str]]:
    """All rows of the main table."""
    base = references(rows)
    return [cells(row, base.get((row.job.model, row.job.setting))) for row in rows]


def phase_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Seconds of CPU in each phase of our runs: headers and rows, none without such a run."""
    mine = [row for row in rows if "cpu_phases" in row.report]
    if not mine:
        return [], []
    headers = ["phase, CPU seconds"]
    headers += [f"{r.job.title} {r.job.setting} {r.job.method}" for r in mine]
    spent = [row.report["cpu_phases"] for row in mine]
    totals: dict[str, float] = {}
    for phases in spent:
        for name, seconds in phases.items():
            totals[name] = totals.get(name, 0.0) + seconds
    names = sorted(totals, key=lambda name: -totals[name])
    # What passed before and after: imports, and giving memory back.
    around = [
        f"{row.cpu_seconds - sum(phases.values()):.1f}"
        for row, phases in zip(mine, spent, strict=True)
    ]
    table = [[name, *(f"{phases.get(name, 0.0):.1f}" for phases in spent)] for name in names]
    return headers, [*table, ["start and end", *around]]


def all_tables(rows: Sequence[Row]) -> list[tuple[Sequence[str], list[list[str]]]]:
    """Headers and rows of both tables, of the second where there is something in it."""
    phases = phase_table(rows)
    return [(HEADERS, main_table(rows)), *([phases] if phases[0] else [])]


def facts(options: argparse.Namespace, rows: Sequence[Row]) -> dict[str, Any]:
    """All there is to say, for JSON."""
    versions = {row.job.tool: dict(row.report["versions"]) for row in rows if row.report}
    return {
        "bench": "engine",
        "threads": options.threads,
        "cores": len(os.sched_getaffinity(0)),
        "samples": options.samples,
        "versions": versions,
        "rows": [asdict(row) for row in rows],
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description="whole runs")
    models = ["qwen2-vl-2b", "qwen2.5-vl-7b-cut", "qwen3-vl-8b-cut"]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=models)
    parser.add_argument("--settings", nargs="+", choices=["w4a16", "w4a8"], default=None)
    parser.add_argument("--tools", nargs="+", choices=[OURS, *PEERS], default=[OURS, *PEERS])
    parser.add_argument("--methods", nargs="+", choices=ours.METHODS, default=list(ours.METHODS))
    parser.add_argument("--blocks", type=int, default=None, help="cut both towers to so many")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    for tool in PEERS:
        parser.add_argument(f"--{tool}-python", type=Path, metavar="PATH")
    parser.add_argument("--auto-round-iterations", type=int, default=0, metavar="N")
    parser.add_argument("--work", type=Path, default=None, help="keep models and logs there")
    parser.add_argument("--reuse", type=Path, nargs="+", default=[], metavar="FILE.json")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.md")
    options = parser.parse_args(arguments)
    options.settings = options.settings or ["w4a16", "w4a8"]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all jobs and print the tables."""
    options = parse(arguments)
    given = {tool: getattr(options, f"{tool}_python".replace("-", "_")) for tool in PEERS}
    # Absolute, because tools run elsewhere; not resolved, because a link tells the environment.
    pythons = {tool: str(path.absolute()) for tool, path in given.items() if path}
    console = Console(width=160, highlight=False)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(pythons, options.auto_round_iterations, work, earlier(options.reuse))
        for job in jobs(options):
            rows.append(bench.run(job))
            console.print(" | ".join(main_table(rows)[-1]), style="dim", markup=False)
            if options.out is not None:  # after each row: a full run takes hours
                tables = "\n".join(markdown_table(*table) for table in all_tables(rows))
                write_text(options.out, tables)
                write_json(options.out.with_suffix(".json"), facts(options, rows))
    title = f"{options.samples} samples, {options.threads} thread(s)"
    for table in all_tables(rows):
        console.print(rich_table(*table, title=title))
    print(json.dumps(facts(options, rows)))


if __name__ == "__main__":
    main()
