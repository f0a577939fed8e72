"""Telling a person how far a run is: block, stage, loss, memory, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from prismquant.diagnostics.failed_layers import failed_layers
from prismquant.diagnostics.step_record import StepRecord
from prismquant.memory import peak_memory_bytes
from prismquant.report.tables import as_text
from prismquant.threads import Pace


class ProgressReporter:
    """A progress bar on a console; use it as a context manager around a run.

    Args:
        console: Where to draw. On anything but a terminal, each finished step is printed as one
        line.
        pace: Looks whether another number of threads is faster where a step took too long.
    """

    def __init__(self, console: Console, pace: Pace | None = None) -> None:
        self._console, self._pace = console, pace
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, memory="")

    def __enter__(self) -> ProgressReporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def remark(self, line: str) -> None:
        """Something that a user should know, on a line of its own."""
        self._console.print(as_text(f"note: {line}", "yellow"))

    def begin(self, steps: int) -> None:
        """The run has so many steps."""
        self._progress.update(self._task, total=steps)

    def stage(self, step: str, what: str) -> None:
        """A stage of a step begins."""
        memory = f"{peak_memory_bytes() / 2**20:.0f} MiB peak"
        self._progress.update(self._task, description=f"{step}: {what}", memory=memory)

    def finish(self, record: StepRecord) -> None:
        """A step is done: one line with its layers and their summed loss."""
        self._progress.advance(self._task)
        if record.layers:
            self._print(record)
        if self._pace is not None and record.threads:
            kind = tuple((x.name.removeprefix(record.name), x.solver) for x in record.layers)
            changed = self._pace.after(record.name, kind, record.seconds)
            if changed is not None:
                self.remark(changed)

    def _print(self, record: StepRecord) -> None:
        loss = sum(layer.loss for layer in record.layers)
        failed = len(failed_layers(record.layers))
        told = f" ({failed} failed: rounded to nearest)" if failed else ""
        line = (
            f"{record.name}: {len(record.layers)} layers{told}, loss {loss:.4g}, "
            f"{record.seconds:.1f} s, {peak_memory_bytes() / 2**20:.0f} MiB peak"
        )
        self._console.print(as_text(line))


class CountProgress:
    """A progress bar on a console that counts pieces; a context manager.

    Args:
        console: Where to draw. Nothing is drawn on anything but a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("checking", total=None)

    def __enter__(self) -> CountProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int, name: str) -> None:
        """So many of so many pieces are done; the next is called ``name``."""
        self._progress.update(self._task, completed=done, total=total, description=name)
