"""The run directory: what was done, and how well, written as the run goes.

    out/prismquant/plan.json      the plan, before any computing
    out/prismquant/recipe.yaml    the recipe as it was resolved
    out/prismquant/record.json    one entry per finished step; the last one says "finished"

A step's shard is written before its entry. A run that is killed therefore never claims a step whose
shard is not whole, and ``--resume`` goes on after the last entry. ``config.json`` comes last of
all, so an unfinished folder cannot be mistaken for a model.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from prismquant.errors import StorageError
from prismquant.pipeline.plan import Plan
from prismquant.recipe.schema import Recipe
from prismquant.storage import is_temporary, read_json, remove_temporaries, write_json, write_text

RECORD_VERSION = 2


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
    """

    name: str
    shard: str
    seconds: float
    layers: tuple[LayerRecord, ...]
    edges: tuple[EdgeRecord, ...] = ()
    kv_cache: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """What was done, and how well.

    Attributes:
        identity: Fingerprints of the plan, the model and the data, and the arithmetic; a run is
            only resumed when all agree.
        model: Folder of the source.
        calibration: Name of the calibration source; empty when none was needed.
        samples: Number of calibration samples by kind.
        environment: Versions and thread count.
        steps: Finished steps in order.
        finished: Whether the checkpoint is complete.
        seconds: Wall time of all finished steps.
        peak_memory_bytes: Largest resident set seen, 0 where the system does not tell.
    """

    identity: Mapping[str, str]
    model: str
    calibration: str = ""
    samples: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[StepRecord, ...] = ()
    finished: bool = False
    seconds: float = 0.0
    peak_memory_bytes: int = 0

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
            steps = tuple(_step_record(step) for step in content["steps"])
            fields = {k: v for k, v in content.items() if k not in ("version", "steps")}
            return cls(**fields, steps=steps)
        except (KeyError, TypeError) as error:
            raise StorageError(f"the run record is damaged: {error}") from error


def _step_record(content: Mapping[str, Any]) -> StepRecord:
    layers = tuple(LayerRecord(**layer) for layer in content["layers"])
    edges = tuple(
        EdgeRecord(**{**edge, "readers": tuple(edge["readers"])}) for edge in content["edges"]
    )
    return StepRecord(**{**content, "layers": layers, "edges": edges})


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

    def begin(self, record: RunRecord, plan: Plan, recipe: Recipe, *, resume: bool) -> RunRecord:
        """Make the folder ready and say what is already done.

        Args:
            record: The new run, with no step finished.
            plan: Written to plan.json.
            recipe: Written to recipe.yaml.
            resume: Go on with an earlier run of the same plan, model and data.

        Returns:
            The earlier run's record when it is resumed, else ``record``.

        Raises:
            StorageError: The folder is in use, or the earlier run differs; the message says in
            what.
        """
        self.require_free(resume=resume)
        if self.record_path.exists():
            record = self._earlier(record)
        else:
            self.save(record)
        remove_temporaries(self.folder)
        # A run that was killed at its very start has a record and may lack the other two.
        if not (self._inside / "plan.json").exists():
            write_json(self._inside / "plan.json", plan.to_dict())
        if not (self._inside / "recipe.yaml").exists():
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
            used = any(not is_temporary(path) for path in files)
        else:
            used = self.folder.exists()
        if used:
            raise StorageError(
                "the output folder exists and is not empty",
                where=str(self.folder),
                remedy="choose another --out, delete it, or pass --resume to go on "
                "with a run that was cut off",
            )

    def save(self, record: RunRecord) -> None:
        """Write the record."""
        write_json(self.record_path, record.to_dict())

    def load(self) -> RunRecord:
        """Read the record.

        Raises:
            StorageError: It is missing or damaged.
        """
        content = read_json(self.record_path)
        try:
            return RunRecord.from_dict(content)
        except StorageError as error:
            raise StorageError(
                error.what, where=str(self.record_path), remedy="choose another --out"
            ) from error

    def _earlier(self, record: RunRecord) -> RunRecord:
        earlier = self.load()
        differing = [
            key for key, value in record.identity.items() if earlier.identity.get(key) != value
        ]
        if differing:
            raise StorageError(
                f"cannot resume: {', '.join(differing)} of the earlier run differ",
                where=str(self.folder),
                remedy="repeat the earlier run's arguments, or choose another --out",
            )
        missing = [s.shard for s in earlier.steps if not (self.folder / s.shard).is_file()]
        if missing:
            raise StorageError(
                f"cannot resume: {missing[0]} of a finished step is gone", where=str(self.folder)
            )
        return earlier


def environment() -> dict[str, str]:
    """Versions and the thread count, for the record."""
    from prismquant import __version__

    return {
        "prismquant": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
