"""Runs without data: units are rounded as they lie in the shards, by a pool of threads.

Where nothing must be seen of any input, no unit waits for another. Units start in the model's
order, as many at a time as memory allows, and each is its tensors: read, rounded, written.

The invariant: shards, losses and diagnostics are the same whatever the number of workers, and
records are yielded in the model's order. A unit that is ready before its turn lies on the disk
already, but it is not claimed until its turn comes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from prismquant.diagnostics.step_record import StepRecord
from prismquant.engine.quantize import quantize_unit
from prismquant.engine.setup import RunSetup
from prismquant.engine.unit_plan import QuantizedUnit, Quantizing, UnitPlan
from prismquant.engine.walk import ModelWalk, Unit
from prismquant.errors import PlanError
from prismquant.memory import keep_heap_compact
from prismquant.plan.plan import PlanRow, problem_groups

DEFAULT_MEMORY = 2 << 30
"""Bytes of weights, codes and packed tensors that are in flight at a time."""


class _Stopped(Exception):  # noqa: N818 - the run has ended, nothing is wrong with the unit
    """Ends a worker's unit between two blocks of rows."""


def run_without_data(
    setup: RunSetup,
    walk: ModelWalk,
    planned: Mapping[str, UnitPlan],
    *,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Iterator[StepRecord]:
    """Quantize the units of a walk without batches, several at a time.

    Args:
        setup: A run whose plan needs no data.
        walk: Its walk.
        planned: What to do, by the unit's name.
        workers: Units worked on at a time; by default as many as torch has threads. The threads are
            shared out among them.
        memory: Bytes that the units in flight may take; a larger unit is worked on alone.

    Yields:
        The record of each unit when its shard is durable, in the model's order; units already in
        ``setup.done`` are left out. Closing the iterator stops all workers.

    Raises:
        PlanError: There are no workers.
        NumericsError: A weight is not finite.
        StorageError: A shard cannot be read or written.
    """
    if workers is not None and workers < 1:
        raise PlanError(f"{workers} workers do nothing", remedy="use 1 or more")
    keep_heap_compact()
    units = list(walk.units())
    left = [unit for unit in units if unit.name not in setup.done]
    task = _Task(setup, planned)
    with _crew(task, left, workers or torch.get_num_threads(), memory) as crew:
        for unit in units:
            done = setup.done.get(unit.name)
            if done is None:
                setup.reporter.stage(unit.name, "round")
                done = crew.result(unit)
                yield done
            setup.reporter.finish(done)


class _Task:
    """The work on one unit. Called from many threads, it changes nothing of its own."""

    def __init__(self, setup: RunSetup, planned: Mapping[str, UnitPlan]) -> None:
        self.setup, self.planned = setup, planned
        self.stopped = threading.Event()
        self._how = Quantizing(setup.plan, setup.vision_weights, pulse=self.pulse)

    @torch.no_grad()
    def __call__(self, unit: Unit) -> StepRecord:
        """Read, round and write a unit."""
        started, found = time.monotonic(), QuantizedUnit()
        quantize_unit(unit, self.planned[unit.name], self._how, found)
        self.pulse()
        shard = self.setup.sink.write_step(unit.step, found.layers, {})
        return found.record(unit.name, shard, started)

    def pulse(self) -> None:
        """Called now and then; ends the work if the run has ended."""
        if self.stopped.is_set():
            raise _Stopped

    def bytes_of(self, unit: Unit) -> int:
        """Most bytes that a unit takes: plain tensors, codes, packed codes, a group's weights."""
        rows, names = self.planned[unit.name].rows, self.setup.bound.names
        reader = unit.walk.reader
        owned = (name for name in reader.names if names.lies_in(name, unit.name))
        size = sum(reader.info(name).nbytes for name in owned)

        def source_bytes(row: PlanRow) -> int:
            return reader.info(names.to_disk(f"{row.site.name}.weight")).nbytes

        codes = sum(row.site.out_features * row.site.in_features + row.stored_bytes for row in rows)
        groups = (sum(source_bytes(row) for row in group) for group in problem_groups(rows))
        return size - sum(source_bytes(row) for row in rows) + codes + max(groups, default=0)


@dataclass
class _Running:
    """A unit that a worker has, or had.

    Attributes:
        record: What will come of it.
        size: Bytes that it takes while it is worked on.
    """

    record: Future[StepRecord]
    size: int


class _Crew:
    """Workers, and the units that they are at.

    Args:
        task: What is done with a unit.
        units: In the order in which their results will be asked for.
        workers: Units that are worked on at a time.
        memory: Bytes that they may take together.
        pool: The threads.
    """

    def __init__(
        self,
        task: _Task,
        units: Sequence[Unit],
        workers: int,
        memory: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._task = task
        self._waiting = deque(units)
        self._workers = workers
        self._memory = memory
        self._pool = pool
        self._running: dict[str, _Running] = {}

    def result(self, unit: Unit) -> StepRecord:
        """The record of the next unit, once it is written."""
        self._start()
        # Units start in order, and the first of all is never kept waiting: this one has started.
        record = self._running[unit.name].record
        while not record.done():
            wait([one.record for one in self._busy()], return_when=FIRST_COMPLETED)
            self._start()
        return self._running.pop(unit.name).record.result()

    def _busy(self) -> list[_Running]:
        return [one for one in self._running.values() if not one.record.done()]

    def _start(self) -> None:
        """Hand out units while there are workers and memory, and none has failed."""
        while self._waiting and not any(_failed(one.record) for one in self._running.values()):
            busy = self._busy()
            size = self._task.bytes_of(self._waiting[0])
            full = sum(one.size for one in busy) + size > self._memory
            if busy and (full or len(busy) >= self._workers):
                return
            unit = self._waiting.popleft()
            self._running[unit.name] = _Running(self._pool.submit(self._task, unit), size)


def _failed(record: Future[StepRecord]) -> bool:
    return record.done() and record.exception() is not None


@contextmanager
def _crew(task: _Task, units: Sequence[Unit], workers: int, memory: int) -> Iterator[_Crew]:
    """Workers that stop when the block ends, however it ends."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers,
        thread_name_prefix="prismquant",
        initializer=torch.set_num_threads,
        initargs=(max(1, threads // workers),),
    )
    try:
        yield _Crew(task, units, workers, memory, pool)
    finally:
        task.stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
        # What a worker sets is also what later threads begin with.
        torch.set_num_threads(threads)
