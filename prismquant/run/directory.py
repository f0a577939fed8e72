"""The run directory: what was done, and how well, written as the run goes.

    out/prismquant/plan.json      the plan, before any computing
    out/prismquant/recipe.yaml    the recipe as it was resolved
    out/prismquant/record.json    one entry per finished step; the last one says "finished"
    out/prismquant/choice/        what was found of a recipe's alternatives, where it has any
    out/prismquant/lock           while a run is at work: who it is

A step's shard is on the disk before its entry. A run that is killed therefore never claims a step
whose shard is not whole, and ``--resume`` goes on after the last entry. The entry holds the shard's
checksum: a shard that was damaged since is found, and done again with all that follow it.
``config.json`` comes last of all, so an unfinished folder cannot be mistaken for a model.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prismquant.diagnostics.step_record import StepRecord
from prismquant.engine.activation_store import ActivationStore, opened_store
from prismquant.engine.placement import Store
from prismquant.errors import PrismQuantError, StorageError
from prismquant.memory import readable_bytes
from prismquant.opening import read_json
from prismquant.outputs import require_empty, require_regular_files
from prismquant.plan.plan import Plan
from prismquant.recipe.schema import Recipe, load_recipe
from prismquant.run.differences import differences
from prismquant.run.environment import utc_now
from prismquant.run.lock import locked
from prismquant.run.record import RestartRecord, RunRecord
from prismquant.storage import (
    file_digest,
    is_temporary,
    json_text,
    remove_temporaries,
    storage_error,
    utf8,
    write_bytes,
    write_json,
)

NOTHING_TO_RESUME = "nothing was there that --resume could go on with: it begins anew"
"""Note where a run, or an analysis, was to be resumed that had not finished anything."""

_STATES = "states-of-rank-"
_PROVENANCE = ("record.json", "plan.json", "recipe.yaml")
# Facts of a machine that may change how sums are rounded, but that a user cannot always have again.
_ROUNDING = ("threads", "machine", "cpu", "gpu")


class RunDirectory:
    """The provenance files of one run.

    Args:
        folder: The output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._inside = folder / "prismquant"

    @property
    def record_path(self) -> Path:
        """Path of the record."""
        return self._inside / "record.json"

    @property
    def lock_path(self) -> Path:
        """Path of the lock, while a run is at work."""
        return self._inside / "lock"

    @property
    def choice_folder(self) -> Path:
        """Folder of what was found of a recipe's alternatives."""
        return self._inside / "choice"

    @contextlib.contextmanager
    def claimed(self, *, resume: bool) -> Iterator[bool]:
        """Keep other runs out of the folder for the length of a block.

        Args:
            resume: Whether an earlier run may be in it.

        Yields:
            Whether the file system knows locks.

        Raises:
            StorageError: Another run is at work in it, it holds other files, or it cannot be
            written.
        """
        try:
            # Nothing is put into a folder that is not ours, not even for a moment.
            if not self.lock_path.is_file():
                self.require_free(resume=resume)
        except OSError as error:
            raise storage_error(error, self.folder) from error
        with locked(self.lock_path) as held:
            # Without locks, a run may be at work that has not finished its first step.
            self.require_free(resume=resume, anew=held)
            with self._resumable():
                yield held

    def begin(self, record: RunRecord, plan: Plan, recipe: Recipe, *, resume: bool) -> RunRecord:
        """Make the folder ready and say what is already done.

        Args:
            record: The new run, with no step finished.
            plan: Written to plan.json.
            recipe: Written to recipe.yaml.
            resume: Go on with an earlier run of the same plan, model and data.

        Returns:
            The earlier run's record when it is resumed, with the steps that are still whole; else
            ``record``.

        Raises:
            StorageError: The folder is in use, or the earlier run differs; the message says in
            what.
        """
        self.require_free(resume=resume)
        content = json.loads(json.dumps(plan.to_dict()))
        if resume and self.record_path.exists():
            record = self._earlier(record, content)
        else:
            self.save(record)
        remove_temporaries(self.folder)
        for left in self._inside.glob(f"{_STATES}*"):
            shutil.rmtree(left)
        # Always this run's own, whatever lies there: nothing, half of it, or a stranger's.
        self._provide("plan.json", json_text(content))
        self._provide("recipe.yaml", recipe.to_yaml())
        return record

    def require_free(self, *, resume: bool, anew: bool = True) -> None:
        """Refuse a folder that holds files, unless they are of a run that is to be resumed.

        Args:
            resume: Whether it is.
            anew: Accept what a run has left that ended before its first step was finished.

        Raises:
            StorageError: The folder is in use, or what an earlier run has left is not what it
            wrote.
        """
        if resume and self.record_path.exists():
            require_regular_files(self.folder)
            return
        remedy = "choose another --out, or delete it"
        if self.record_path.is_file():
            remedy += ", or pass --resume to go on with the run that it holds"
        require_empty(self.folder, ours=self._leftovers(anew=anew), remedy=remedy)

    def _leftovers(self, *, anew: bool) -> Callable[[Path], bool]:
        """Files that an earlier run may have left without there being anything to go on with."""
        known = {self.lock_path}
        places = [f"{self.choice_folder}{os.sep}"]
        record = self._readable_record()
        if anew and record and not record.steps and not record.finished:
            known |= {self._inside / name for name in _PROVENANCE}
            places.append(str(self._inside / _STATES))

        def ours(path: Path) -> bool:
            return path in known or is_temporary(path) or str(path).startswith(tuple(places))

        return ours

    @contextlib.contextmanager
    def _resumable(self) -> Iterator[None]:
        """Within, say of a file that could not be read or written how to go on from there."""
        try:
            yield
        except StorageError as error:
            earlier = self._readable_record()
            if not isinstance(error.__cause__, OSError) or not (earlier and earlier.steps):
                raise
            again = "with --resume, a run in this folder goes on after the last finished step"
            remedy = f"{error.remedy}; {again}" if error.remedy else again
            raise StorageError(error.what, where=error.where, remedy=remedy) from error

    def require_space(self, needed: int) -> None:
        """Refuse a disk that is too full for the result.

        Args:
            needed: Bytes of the finished checkpoint; shards that are there already count.

        Raises:
            StorageError: Less is free.
        """
        try:
            there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise storage_error(error, self.folder) from error
        if needed - there > free:
            raise StorageError(
                f"the result takes another {readable_bytes(needed - there)}, but only "
                f"{readable_bytes(free)} are free",
                where=str(self.folder),
                remedy="free space or choose another --out",
            )

    def activation_store(
        self, rank: int, states: Store, of: str
    ) -> AbstractContextManager[ActivationStore]:
        """Give what keeps hidden states for the length of the block.

        Args:
            rank: The process that keeps them.
            states: Where they wait.
            of: A name for what they are of.
        """
        return opened_store(states, self._inside / f"{_STATES}{rank}-{of}")

    def save(self, record: RunRecord) -> None:
        """Write the record."""
        write_json(self.record_path, record.to_dict())

    def add(self, record: RunRecord, step: StepRecord, peak_memory_bytes: int) -> RunRecord:
        """Claim a step whose shard is on the disk.

        Args:
            record: The run so far.
            step: What was done.
            peak_memory_bytes: Largest resident set so far.

        Returns:
            The record with the step, as it was saved.
        """
        shard = self.folder / step.shard
        step = replace(step, size=shard.stat().st_size, sha256=file_digest(shard))
        record = replace(
            record,
            steps=(*record.steps, step),
            seconds=record.seconds + step.seconds,
            peak_memory_bytes=max(record.peak_memory_bytes, peak_memory_bytes),
        )
        self.save(record)
        return record

    def finish(self, record: RunRecord, last_files: Iterable[str]) -> RunRecord:
        """Claim that the checkpoint is complete.

        Args:
            record: The run, with all its steps.
            last_files: Names of the files that were written after the last step.

        Returns:
            The record, as it was saved.
        """
        digests = {name: file_digest(self.folder / name) for name in sorted(last_files)}
        record = replace(record, finished=True, files=digests)
        self.save(record)
        return record

    def foreign_files(self, record: RunRecord) -> list[str]:
        """Files of the folder that a finished run has not written, and leaves as they are."""
        ours = {*(step.shard for step in record.steps), *record.files}
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = [path.relative_to(self.folder).as_posix() for path in files]
        return [n for n in names if n not in ours and not n.startswith(f"{self._inside.name}/")]

    @contextlib.contextmanager
    def unpublished_on_error(self) -> Iterator[None]:
        """Leave no ``config.json`` behind a block that does not end: something is to be done."""
        try:
            yield
        except BaseException:
            self._unpublish()
            raise

    def _unpublish(self) -> None:
        """Make sure that no reader takes the folder for a model."""
        with contextlib.suppress(OSError):
            (self.folder / "config.json").unlink(missing_ok=True)

    def load(self) -> RunRecord:
        """Read the record.

        Raises:
            StorageError: It is missing or damaged.
        """
        try:
            return RunRecord.from_dict(read_json(self.record_path))
        except StorageError as error:
            raise StorageError(
                error.what,
                where=str(self.record_path),
                remedy="without it nothing tells which shards are whole: choose another --out, or "
                "delete the folder, and start again without --resume",
            ) from error

    def predicted(self) -> dict[str, float]:
        """Divergence by class of token that a search had predicted of the recipe; empty: none."""
        with contextlib.suppress(PrismQuantError):
            found = load_recipe(self._inside / "recipe.yaml").predicted or {}
            return {str(kind): loss for kind, loss in found.items()}
        return {}

    def _readable_record(self) -> RunRecord | None:
        with contextlib.suppress(StorageError):
            return self.load()
        return None

    def _earlier(self, record: RunRecord, plan: Mapping[str, Any]) -> RunRecord:
        """The record of the run that is resumed, with what is whole of it."""
        earlier = self.load()
        earlier_plan = self._earlier_plan(earlier.identity.plan)
        found = differences(earlier.identity, record.identity, earlier_plan, plan)
        if found:
            if earlier.calibration != record.calibration:
                found.append(f"calibration is {record.calibration}, was {earlier.calibration}")
            raise StorageError(
                "cannot resume: the earlier run differs\n"
                + "\n".join(f"  - {line}" for line in found),
                where=str(self.folder),
                remedy="repeat what the earlier run was given, choose another --out, or delete the "
                f"folder, of which {len(earlier.steps)} steps are finished",
            )
        steps, damage = self._whole(earlier)
        if earlier.finished and not damage:
            return earlier
        notes = (*damage, *_rounding_notes(earlier, record.environment))
        if damage:
            self._unpublish()
        resumed = replace(
            earlier,
            # Times of files may be new where their contents are not.
            identity=record.identity,
            steps=steps,
            finished=False,
            files={},
            seconds=sum(step.seconds for step in steps),
            restarts=(*earlier.restarts, RestartRecord(utc_now(), len(steps), notes)),
        )
        self.save(resumed)
        return resumed

    def _whole(self, record: RunRecord) -> tuple[tuple[StepRecord, ...], list[str]]:
        """The steps before the first one that is damaged, and what is damaged."""
        for number, step in enumerate(record.steps):
            if damage := self._damage(step.shard, step.sha256, step.size):
                again = len(record.steps) - number - 1
                also = f", with the {again} after it" if again else ""
                return record.steps[:number], [f"{damage}: {step.name} is done again{also}"]
        for name, checksum in record.files.items():
            if damage := self._damage(name, checksum):
                return record.steps, [f"{damage}: the last files are written again"]
        return record.steps, []

    def _damage(self, name: str, checksum: str, size: int | None = None) -> str:
        """Damage to a file since it was claimed; empty if it is whole."""
        path = self.folder / name
        if not path.is_file():
            return f"{name} is gone"
        now = path.stat().st_size
        if size is not None and now != size:
            return f"{name} has {now} bytes instead of {size}"
        return "" if file_digest(path) == checksum else f"{name} has changed"

    def _provide(self, name: str, text: str) -> None:
        """Write a file of the provenance, unless it is there."""
        path, data = self._inside / name, utf8(text)
        if not path.is_file() or path.stat().st_size != len(data) or path.read_bytes() != data:
            write_bytes(path, data)

    def _earlier_plan(self, fingerprint: str) -> Any:
        """The content of plan.json; None if it is missing, damaged or not this run's."""
        try:
            content = read_json(self._inside / "plan.json")
            ours = Plan.from_dict(content).fingerprint() == fingerprint
        except StorageError:
            return None
        return content if ours else None


def _rounding_notes(record: RunRecord, now: Mapping[str, str]) -> list[str]:
    earlier = dict(record.environment)
    if record.threads:
        earlier["threads"] = ", ".join(map(str, record.threads))
    changed = [key for key in _ROUNDING if earlier.get(key) != now.get(key)]
    return [
        f"{key} {earlier.get(key, 'unknown')} -> {now.get(key, 'unknown')}: sums may be rounded "
        "otherwise, so the last bits may differ from those of a run without a break"
        for key in changed
    ]
