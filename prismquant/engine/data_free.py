"""Recipes without data: from shard to shard, without a model object.

Where nothing must be seen of a layer's input, a step is its tensors: they are read, rounded and
written, and no step waits for another. A pool of threads takes whole steps, as many at a time as
memory allows. A weight stays in the dtype that it has on disk and is widened a block of rows at a
time, while the block is in the cache.

The invariant: shards, losses and notes are bit for bit those of the engine, whatever the number of
workers, and steps are yielded in the model's order. A step that is ready before its turn lies on
the disk already, but it is not claimed until its turn comes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import Note, scale_format
from prismquant.algorithms.rtn import RTN, round_weight
from prismquant.diagnostics.step_record import LayerRecord, StepRecord
from prismquant.engine.chain import source_reader
from prismquant.engine.group import require_finite
from prismquant.engine.job import Run
from prismquant.errors import NumericsError, PlanError
from prismquant.formats.quantized_layer import QuantizedLayer
from prismquant.memory import keep_heap_compact
from prismquant.models.bound import BoundStep
from prismquant.numerics.affine import check_finite
from prismquant.plan.plan import Plan, PlanRow, problem_groups

DEFAULT_MEMORY = 2 << 30
"""Bytes of weights, codes and packed tensors that are in flight at a time."""


class _Stopped(Exception):  # noqa: N818 - the run has ended, nothing is wrong with the step
    """Ends a worker's step between two blocks of rows."""


def streams(plan: Plan) -> bool:
    """Whether a plan can be carried out tensor by tensor: no data, and a solver that needs none."""
    solvers = (build_solver(row.config.solver, row.config.options) for row in plan.quantized)
    return not plan.needs_data and all(isinstance(solver, RTN) for solver in solvers)


def stream(
    job: Run, *, workers: int | None = None, memory: int = DEFAULT_MEMORY
) -> Iterator[StepRecord]:
    """Quantize a model tensor by tensor.

    Args:
        job: A run whose plan :func:`streams`.
        workers: Steps worked on at a time; by default as many as torch has threads. The threads
            are shared out among them.
        memory: Bytes that the steps in flight may take; a larger step is worked on alone.

    Yields:
        The record of each step when its shard is durable, in the model's order; steps already in
        ``job.done`` are left out. Closing the iterator stops all workers.

    Raises:
        PlanError: The plan needs data, or there are no workers.
        NumericsError: A weight is not finite.
        StorageError: A shard cannot be read or written.
    """
    if not streams(job.plan):
        raise PlanError("only recipes that need no data can be streamed", where=job.plan.recipe)
    if workers is not None and workers < 1:
        raise PlanError(f"{workers} workers do nothing", remedy="use 1 or more")
    return _stream(job, workers or torch.get_num_threads(), memory)


def _stream(job: Run, workers: int, memory: int) -> Iterator[StepRecord]:
    keep_heap_compact()
    steps = job.bound.steps
    job.reporter.begin(len(steps))
    left = [step for step in steps if step.name not in job.done]
    with _crew(_Task(job), left, workers, memory) as crew:
        for step in steps:
            done = job.done.get(step.name)
            if done is None:
                job.reporter.stage(step.name, "round")
                done = crew.result(step)
                yield done
            job.reporter.finish(done)


class _Task:
    """What is done with one step. Called from many threads, it changes nothing of its own."""

    def __init__(self, job: Run) -> None:
        self.job = job
        self.stopped = threading.Event()
        self.reader = source_reader(job.plan, job.bound)
        self._rows: dict[str, list[PlanRow]] = {}
        for row in job.plan.quantized:
            self._rows.setdefault(job.bound.steps[row.site.step].name, []).append(row)

    @torch.no_grad()
    def __call__(self, step: BoundStep) -> StepRecord:
        """Read, round and write a step."""
        started = time.monotonic()
        layers: list[QuantizedLayer] = []
        records: list[LayerRecord] = []
        for members in self._groups(step):
            for layer, record in self._round(members):
                layers.append(layer)
                records.append(record)
        self.pulse()
        shard = self.job.sink.write_step(step, layers, {})
        return StepRecord(step.name, shard, time.monotonic() - started, tuple(records))

    def pulse(self) -> None:
        """Called now and then; ends the work if the run has ended."""
        if self.stopped.is_set():
            raise _Stopped

    def bytes_of(self, step: BoundStep) -> int:
        """Most bytes that a step takes: plain tensors, codes, packed codes, a group's weights."""
        rows = self._rows.get(step.name, [])
        names = self.job.bound.names
        owned = (
            name for name in self.reader.names if names.to_module(name).startswith(f"{step.name}.")
        )
        size = sum(self.reader.info(name).nbytes for name in owned)
        sources = {row.site.name: self._source_bytes(row) for row in rows}
        codes = sum(row.site.out_features * row.site.in_features + row.stored_bytes for row in rows)
        groups = (sum(sources[row.site.name] for row in group) for group in self._groups(step))
        return size - sum(sources.values()) + codes + max(groups, default=0)

    def _groups(self, step: BoundStep) -> list[list[PlanRow]]:
        """Rows that are solved together, in the engine's order."""
        rows = self._rows.get(step.name, [])
        if not self.job.plan.calibration.layer_sequential:
            return problem_groups(rows)
        stages = sorted({row.site.stage for row in rows})
        return [
            group
            for stage in stages
            for group in problem_groups([row for row in rows if row.site.stage == stage])
        ]

    def _round(self, rows: Sequence[PlanRow]) -> Iterator[tuple[QuantizedLayer, LayerRecord]]:
        """Layers that share an input, and the global scale where there is one."""
        spec = rows[0].config.weights
        if spec is None:
            return
        # Only a global scale needs all the weights at once.
        kept = [self._weight(row) for row in rows] if spec.scale == "e4m3" else []
        try:
            largest = [_magnitude(weight) for weight in kept]
            form = scale_format(spec, rows[0].config.weight_range, rows[0].site.dtype, largest)
        except NumericsError:
            self._refuse(rows)
            raise
        for index, row in enumerate(rows):
            weight = kept[index] if kept else self._weight(row)
            try:
                rounded = round_weight(weight, spec, row.config.weight_range, form, self.pulse)
            except NumericsError:
                self._refuse(rows)
                raise
            notes = dict(RTN().notes) | self._notes(rows[0])
            record = LayerRecord(
                row.site.name, row.config.solver, rounded.loss, rounded.loss, notes
            )
            yield QuantizedLayer(row.site.name, rounded.weight), record

    def _refuse(self, rows: Sequence[PlanRow]) -> None:
        """Say of weights, one of which cannot be rounded, which is damaged and how far."""
        for row in rows:
            require_finite(self._weight(row), row.site.name)

    def _weight(self, row: PlanRow) -> Tensor:
        """A weight as a matrix, in the dtype on disk unless the run's arithmetic is narrower."""
        site, names = row.site, self.job.bound.names
        self.pulse()
        weight = self.reader.read(names.to_disk(f"{site.name}.weight"))
        if self.job.precision.dtype != torch.float32:
            weight = weight.to(self.job.precision.dtype)
        return weight.to(self.job.device).reshape(site.out_features, site.in_features)

    def _source_bytes(self, row: PlanRow) -> int:
        return self.reader.info(self.job.bound.names.to_disk(f"{row.site.name}.weight")).nbytes

    def _notes(self, row: PlanRow) -> dict[str, Note]:
        """What the engine tells of a group beside its solver's notes."""
        asked = row.config.vision_weight
        weight = self.job.vision_weights.get(row.site.name, 1.0) if asked == "gradient" else asked
        return {} if weight == 1 else {"vision_weight": weight}


@dataclass
class _Running:
    """A step that a worker has, or had.

    Attributes:
        record: What will come of it.
        size: Bytes that it takes while it is worked on.
    """

    record: Future[StepRecord]
    size: int


class _Crew:
    """Workers, and the steps that they are at.

    Args:
        task: What is done with a step.
        steps: In the order in which their results will be asked for.
        workers: Steps that are worked on at a time.
        memory: Bytes that they may take together.
        pool: The threads.
    """

    def __init__(
        self,
        task: _Task,
        steps: Sequence[BoundStep],
        workers: int,
        memory: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._task = task
        self._waiting = deque(steps)
        self._workers = workers
        self._memory = memory
        self._pool = pool
        self._running: dict[str, _Running] = {}

    def result(self, step: BoundStep) -> StepRecord:
        """The record of the next step, once it is written."""
        self._start()
        # Steps start in order, and the first of all is never kept waiting: this one has started.
        record = self._running[step.name].record
        while not record.done():
            wait([one.record for one in self._busy()], return_when=FIRST_COMPLETED)
            self._start()
        return self._running.pop(step.name).record.result()

    def _busy(self) -> list[_Running]:
        return [one for one in self._running.values() if not one.record.done()]

    def _start(self) -> None:
        """Hand out steps while there are workers and memory, and none has failed."""
        while self._waiting and not any(_failed(one.record) for one in self._running.values()):
            busy = self._busy()
            size = self._task.bytes_of(self._waiting[0])
            full = sum(one.size for one in busy) + size > self._memory
            if busy and (full or len(busy) >= self._workers):
                return
            step = self._waiting.popleft()
            self._running[step.name] = _Running(self._pool.submit(self._task, step), size)


def _failed(record: Future[StepRecord]) -> bool:
    return record.done() and record.exception() is not None


@contextmanager
def _crew(task: _Task, steps: Sequence[BoundStep], workers: int, memory: int) -> Iterator[_Crew]:
    """Workers that stop when the block ends, however it ends."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers,
        thread_name_prefix="prismquant",
        initializer=torch.set_num_threads,
        initargs=(max(1, threads // workers),),
    )
    try:
        yield _Crew(task, steps, workers, memory, pool)
    finally:
        task.stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
        # What a worker sets is also what later threads begin with.
        torch.set_num_threads(threads)


def _magnitude(weight: Tensor) -> Tensor:
    """The largest magnitude of a weight as float32, without a copy of the weight."""
    check_finite(weight, "the weight")
    low, high = torch.aminmax(weight)
    return torch.maximum(-low, high).to(torch.float32)
