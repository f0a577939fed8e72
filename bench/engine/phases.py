"""Where a run's seconds go, without a clock in the package: its functions are wrapped from outside.

Times are exclusive: while a function of another phase runs inside one, the clock runs for the inner
one alone, so the phases add up to the whole. The table names each function where it is defined; the
wrapper takes its place in every module that has imported it. A name that is gone stops the bench:
a phase must not vanish into the rest without a word.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from greenlet import getcurrent, greenlet, settrace
from torch import nn

OTHER = "other"
_FORWARD = "forward"
_REPLAY = "between steps"

PHASES: tuple[tuple[str, str, str], ...] = (
    ("plan", "prismquant.models.bind", "bind"),
    ("plan", "prismquant.plan.make_plan", "make_plan"),
    ("plan", "prismquant.run.fingerprint", "stamp_files"),
    ("plan", "prismquant.run.fingerprint", "fingerprint_batches"),
    ("data", "prismquant.data", "read_samples"),
    ("data", "prismquant.data.batches", "Batches._made"),
    ("load", "prismquant.models.load", "materialize"),
    ("load", "prismquant.models.load", "release"),
    ("load", "prismquant.models.load", "empty_model"),
    ("load", "prismquant.shards", "ShardReader.read"),
    (_REPLAY, "prismquant.engine.replay", "Replay._capture"),
    ("round inputs", "prismquant.runtime.linear", "ActivationQuantizer.forward"),
    ("Hessian", "prismquant.statistics.hessian", "Hessian.update"),
    ("Hessian", "prismquant.statistics.hessian", "Hessian.result"),
    ("scales", "prismquant.algorithms.layer_scales", "choose_scales"),
    ("factorization", "prismquant.algorithms.gptq.damped_factor", "Damping.factorize"),
    ("sweep", "prismquant.algorithms.gptq.column_loop", "round_with_feedback"),
    ("baseline", "prismquant.algorithms.gptq.column_loop", "round_to_nearest"),
    ("refine", "prismquant.algorithms.gptq.refine", "refine"),
    ("rest of solve", "prismquant.algorithms.gptq.solver", "GPTQ.solve"),
    ("pack", "prismquant.formats.packed", "pack"),
    ("write", "prismquant.storage", "write_tensors"),
    ("write", "prismquant.storage", "write_json"),
    ("write", "prismquant.storage", "copy_file"),
    ("write", "prismquant.storage", "file_digest"),
    ("write", "prismquant.export.compressed_tensors.writer", "CheckpointWriter.write_step"),
    ("write", "prismquant.export.compressed_tensors.writer", "CheckpointWriter.finish"),
)
"""Phase, module, function; modules' forward passes are a phase besides these."""


class Clock:
    """Exclusive seconds by phase.

    The engine's forward passes are greenlets, which halt within one phase and let another go on, so
    each greenlet is in phases of its own, and a switch between two is accounted for like a change
    of phase. One clock runs at a time.

    Attributes:
        seconds, cpu_seconds: So far, by phase; by the clock and of this process.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._stacks: WeakKeyDictionary[greenlet, list[str]] = WeakKeyDictionary()
        self._since = (time.perf_counter(), time.process_time())
        settrace(self._switched)

    @property
    def phase(self) -> str:
        """Whose time runs."""
        return self._stack(getcurrent())[-1]

    def enter(self, phase: str) -> None:
        """From now on the time is this phase's."""
        self._account(getcurrent())
        self._stack(getcurrent()).append(phase)

    def leave(self) -> None:
        """The time is again that of the phase before."""
        self._account(getcurrent())
        self._stack(getcurrent()).pop()

    def _stack(self, task: greenlet) -> list[str]:
        return self._stacks.setdefault(task, [OTHER])

    def _switched(self, _: str, tasks: tuple[greenlet, greenlet]) -> None:
        self._account(tasks[0])

    def _account(self, task: greenlet) -> None:
        """Give the time since the last account to the phase that a greenlet is in."""
        now = (time.perf_counter(), time.process_time())
        phase = self._stack(task)[-1]
        for total, at, since in zip(
            (self.seconds, self.cpu_seconds), now, self._since, strict=True
        ):
            total[phase] = total.get(phase, 0.0) + at - since
        self._since = now


def timed(clock: Clock, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its time told to the clock; of a generator, that of each of its turns."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def turns(*args: Any, **kwargs: Any) -> Iterator[Any]:
            inner = function(*args, **kwargs)
            while True:
                clock.enter(phase)
                try:
                    value = next(inner)
                except StopIteration:
                    return
                finally:
                    clock.leave()
                yield value

        return turns

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        clock.enter(phase)
        try:
            return function(*args, **kwargs)
        finally:
            clock.leave()

    return call


def located(phases: Sequence[tuple[str, str, str]] = PHASES) -> list[tuple[str, Any, str]]:
    """Of each line of a table: its phase, the module or class that holds the function, its name.

    Raises:
        LookupError: A module or a function is gone.
    """
    found = []
    for phase, module_name, path in phases:
        owner: Any = importlib.import_module(module_name)
        *classes, leaf = path.split(".")
        for name in classes:
            owner = getattr(owner, name, None)
        if getattr(owner, leaf, None) is None:
            raise LookupError(f"{module_name}.{path} is gone: mend the table in {__name__}")
        found.append((phase, owner, leaf))
    return found


def watch(clock: Clock, phases: Sequence[tuple[str, str, str]] = PHASES) -> None:
    """Wrap everything in the table, and the modules' forward passes, for the process's life.

    Raises:
        LookupError: A module or a function is gone.
    """
    for phase, owner, leaf in located(phases):
        function = getattr(owner, leaf)
        wrapped = timed(clock, phase, function)
        setattr(owner, leaf, wrapped)
        if inspect.ismodule(owner):
            _replace_everywhere(function, wrapped)
    _watch_forward(clock)


def _replace_everywhere(function: Any, wrapped: Any) -> None:
    """Modules that have imported a function by name hold it themselves."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "prismquant":
            for key, value in list(vars(module).items()):
                if value is function:
                    setattr(module, key, wrapped)


def _watch_forward(clock: Clock) -> None:
    """Time of modules' forward passes; what runs between the steps keeps its own."""
    plain = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if clock.phase in (_FORWARD, _REPLAY):
            return plain(self, *args, **kwargs)
        clock.enter(_FORWARD)
        try:
            return plain(self, *args, **kwargs)
        finally:
            clock.leave()

    setattr(nn.Module, "__call__", call)  # noqa: B010 - mypy takes it for a method
