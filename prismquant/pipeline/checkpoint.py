"""The run directory: what was done, and how well, written as the run goes.

    out/prismquant/plan.json      the plan, before any computing
    out/prismquant/recipe.yaml    the recipe as it was resolved
    out/prismquant/record.json    one entry per finished step; the last one says "finished"
    out/prismquant/lock           while a run is at work: who it is

A step's shard is on the disk before its entry. A run that is killed therefore never claims a step
whose shard is not whole, and ``--resume`` goes on after the last entry. The entry holds the shard's
checksum: a shard that was damaged since is found, and done again with all that follow it.
``config.json`` comes last of all, so an unfinished folder cannot be mistaken for a model.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from prismquant.errors import PrismQuantError, StorageError
from prismquant.memory import readable_bytes
from prismquant.pipeline.identity import Identity, differences
from prismquant.pipeline.lock import locked
from prismquant.pipeline.plan import Plan
from prismquant.pipeline.states import InMemory, OnDisk, States
from prismquant.recipe.schema import Recipe, load_recipe
from prismquant.storage import (
    file_digest,
    is_temporary,
    read_json,
    remove_temporaries,
    write_json,
    write_text,
)

RECORD_VERSION = 3
_STATES = "states-of-rank-"
# Facts of a machine that may change how sums are rounded, but that a user cannot always have again.
_ROUNDING = ("threads", "machine", "cpu", "gpu")


@dataclass(frozen=True)
class LayerRecord:
    """What became of one layer.

    Attributes:
        name: Module path.
        solver: The method that chose the codes.
        loss: The method's objective: mean squared output error summed over outputs, or the squared
            weight error where no statistics were needed.
        baseline_loss: The same for rounding to nearest with the same scales.
        notes: Damping, fallbacks, input range and other facts worth keeping.
    """

    name: str
    solver: str
    loss: float
    baseline_loss: float
    notes: Mapping[str, float | int | str]


@dataclass(frozen=True)
class EdgeRecord:
    """What became of one edge.

    Attributes:
        source: Module path of its upper end.
        readers: Module paths of the layers that read it.
        equalizer: The method that chose the scale.
        notes: What it chose and gained, or why it left the edge alone.
    """

    source: str
    readers: tuple[str, ...]
    equalizer: str
    notes: Mapping[str, float | int | str]


@dataclass(frozen=True)
class StepRecord:
    """What became of one step.

    Attributes:
        name: Module path of the step.
        shard: File that holds its tensors.
        seconds: Wall time.
        layers: Its quantized layers.
        edges: Edges along which scale was moved, or was not worth moving.
        kv_cache: Ranges of the keys and values of its attention, where their cache is quantized.
        threads: Threads that torch computed with; 0 where they change nothing.
        size: Bytes of the shard, once it is claimed.
        sha256: Its checksum.
    """

    name: str
    shard: str
    seconds: float
    layers: tuple[LayerRecord, ...]
    edges: tuple[EdgeRecord, ...] = ()
    kv_cache: Mapping[str, float | int | str] = field(default_factory=dict)
    threads: int = 0
    size: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class RestartRecord:
    """One time that a run was taken up again.

    Attributes:
        started: When, in UTC.
        kept: Finished steps that were kept.
        notes: What was found damaged and is done again, and what differs that may change rounding.
    """

    started: str
    kept: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RunRecord:
    """What was done, and how well.

    Attributes:
        identity: What decides the bytes of the result; a run is only resumed when it agrees.
        model: Folder of the source.
        calibration: Name of the calibration source; empty when none was needed.
        samples: Number of calibration samples by kind.
        environment: Versions and thread count.
        memory: What was predicted of the peak, the budget if there was one, and how it was kept to.
        steps: Finished steps in order.
        finished: Whether the checkpoint is complete.
        seconds: Wall time of all finished steps.
        peak_memory_bytes: Largest resident set seen, 0 where the system does not tell.
        restarts: Each time that the run was taken up again.
        files: Checksums of the other files of the finished checkpoint, by their path in the folder.
    """

    identity: Identity
    model: str
    calibration: str = ""
    samples: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, int | str] = field(default_factory=dict)
    steps: tuple[StepRecord, ...] = ()
    finished: bool = False
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    restarts: tuple[RestartRecord, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def threads(self) -> tuple[int, ...]:
        """Numbers of threads that its steps had, each change a new entry; or what it began with."""
        had = [step.threads for step in self.steps if step.threads]
        began = self.environment.get("threads", "")
        if not had and began.isdecimal():
            had = [int(began)]
        return tuple(number for number, _ in itertools.groupby(had))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"version": RECORD_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunRecord:
        """Read back what :meth:`to_dict` gave.

        Raises:
            StorageError: The content was written by another version or is damaged.
        """
        version = content.get("version") if isinstance(content, Mapping) else None
        if version != RECORD_VERSION:
            raise StorageError(f"run record of version {version!r} cannot be read")
        try:
            plain = {key: value for key, value in content.items() if key != "version"}
            built: dict[str, Any] = {
                "identity": Identity.from_dict(content["identity"]),
                "steps": tuple(_step_record(step) for step in content["steps"]),
                "restarts": tuple(_restart_record(restart) for restart in content["restarts"]),
            }
            return cls(**plain | built)
        except (KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"the run record is damaged: {error}") from error


def _step_record(content: Mapping[str, Any]) -> StepRecord:
    layers = tuple(LayerRecord(**layer) for layer in content["layers"])
    edges = tuple(
        EdgeRecord(**{**edge, "readers": tuple(edge["readers"])}) for edge in content["edges"]
    )
    return StepRecord(**{**content, "layers": layers, "edges": edges})


def _restart_record(content: Mapping[str, Any]) -> RestartRecord:
    return RestartRecord(**{**content, "notes": tuple(content["notes"])})


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
        """Where the record is."""
        return self._inside / "record.json"

    @property
    def lock_path(self) -> Path:
        """Where the lock is, while a run is at work."""
        return self._inside / "lock"

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
        # Nothing is put into a folder that is not ours, not even for a moment.
        if not self.lock_path.exists():
            self.require_free(resume=resume)
        with locked(self.lock_path) as held:
            self.require_free(resume=resume)
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
        if self.record_path.exists():
            record = self._earlier(record, content)
        else:
            self.save(record)
        remove_temporaries(self.folder)
        for left in self._inside.glob(f"{_STATES}*"):
            shutil.rmtree(left)
        # A run that was killed at its very start has a record and may lack the other two.
        if _without_name(self._earlier_plan()) != _without_name(content):
            write_json(self._inside / "plan.json", content)
        if not self._has_recipe():
            write_text(self._inside / "recipe.yaml", recipe.to_yaml())
        return record

    def require_free(self, *, resume: bool) -> None:
        """Refuse a folder that holds files, unless they are of a run that is to be resumed.

        Raises:
            StorageError: The folder is in use.
        """
        if resume and self.record_path.exists():
            return
        if self.folder.is_dir():
            files = (path for path in self.folder.rglob("*") if not path.is_dir())
            used = any(not is_temporary(path) and path != self.lock_path for path in files)
        else:
            used = self.folder.exists()
        if used:
            raise StorageError(
                "the output folder exists and is not empty",
                where=str(self.folder),
                remedy="choose another --out, delete it, or pass --resume to go on "
                "with a run that was cut off",
            )

    def require_space(self, needed: int) -> None:
        """Refuse a disk that is too full for the result.

        Args:
            needed: Bytes of the finished checkpoint; shards that are there already count.

        Raises:
            StorageError: Less is free.
        """
        there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        if needed - there > free:
            raise StorageError(
                f"the result takes another {readable_bytes(needed - there)}, but only "
                f"{readable_bytes(free)} are free",
                where=str(self.folder),
                remedy="free space or choose another --out",
            )

    @contextlib.contextmanager
    def states(self, rank: int, *, on_disk: bool) -> Iterator[States]:
        """Where hidden states wait for the length of the block."""
        if not on_disk:
            yield InMemory()
            return
        states = OnDisk(self._inside / f"{_STATES}{rank}")
        try:
            yield states
        finally:
            states.close()

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

    def finish(self, record: RunRecord) -> RunRecord:
        """Claim that the checkpoint is complete.

        Returns:
            The record, as it was saved.
        """
        shards = {step.shard for step in record.steps}
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = [path.relative_to(self.folder).as_posix() for path in files]
        ours = f"{self._inside.name}/"
        last = [name for name in names if name not in shards and not name.startswith(ours)]
        digests = {name: file_digest(self.folder / name) for name in last}
        record = replace(record, finished=True, files=digests)
        self.save(record)
        return record

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

    def _earlier(self, record: RunRecord, plan: Mapping[str, Any]) -> RunRecord:
        """The record of the run that is resumed, with what is whole of it."""
        earlier = self.load()
        found = differences(earlier.identity, record.identity, self._earlier_plan(), plan)
        if found:
            if earlier.calibration != record.calibration:
                found.append(f"calibration is {record.calibration}, was {earlier.calibration}")
            raise StorageError(
                "cannot resume: the earlier run differs\n"
                + "\n".join(f"  - {line}" for line in found),
                where=str(self.folder),
                remedy="repeat what the earlier run was given, or choose another --out",
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
            restarts=(*earlier.restarts, RestartRecord(_now(), len(steps), notes)),
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
        """What has become of a file since it was claimed; empty if it is whole."""
        path = self.folder / name
        if not path.is_file():
            return f"{name} is gone"
        now = path.stat().st_size
        if size is not None and now != size:
            return f"{name} has {now} bytes instead of {size}"
        return "" if file_digest(path) == checksum else f"{name} has changed"

    def _earlier_plan(self) -> Any:
        """The content of plan.json; None if it is missing or damaged."""
        try:
            return read_json(self._inside / "plan.json")
        except StorageError:
            return None

    def _has_recipe(self) -> bool:
        path = self._inside / "recipe.yaml"
        try:
            return path.is_file() and load_recipe(path) is not None
        except PrismQuantError:
            return False


def _without_name(plan: Any) -> Any:
    """A plan without its recipe's name, which changes nothing."""
    return {**plan, "recipe": ""} if isinstance(plan, dict) else plan


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


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def environment(device: torch.device) -> dict[str, str]:
    """Versions, the thread count and the processors, for the record."""
    from prismquant import __version__

    facts = {
        "prismquant": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "started": _now(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts
