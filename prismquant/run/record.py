"""The record of a run: what was done to each layer, and how well.

A record is read back strictly: a file that was damaged or edited is an error that says where, never
a surprise later.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from prismquant.arguments import EXACT
from prismquant.diagnostics.predictions import Predictions
from prismquant.diagnostics.step_record import StepRecord
from prismquant.diagnostics.translation import Translation
from prismquant.errors import NumericsError, StorageError, grouped, listed
from prismquant.run.identity import Identity
from prismquant.run.method_choice import MethodChoice

RECORD_VERSION = 9


@dataclass(frozen=True)
class RestartRecord:
    """One time that a run was taken up again.

    Attributes:
        started: When, in UTC.
        kept: Finished steps that were kept.
        notes: What was found damaged and is done again, and what differs that may change rounding.
    """

    __pydantic_config__ = EXACT

    started: str
    kept: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RunRecord:
    """Record of what was done, and how well.

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
        nonfinite: As that of a step, of tensors that belong to none.
        choice: Of one among the recipe's alternatives; None where it left no choice.
        translation: What became of the settings of another tool's recipe; None where it was ours.
        predictions: Losses that an analysis predicted; None where no search found the recipe, or
            its sensitivity was not at hand.
    """

    __pydantic_config__ = EXACT

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
    nonfinite: Mapping[str, str] = field(default_factory=dict)
    choice: MethodChoice | None = None
    translation: Translation | None = None
    predictions: Predictions | None = None

    @property
    def threads(self) -> tuple[int, ...]:
        """Numbers of threads that its steps had, each change a new entry; or what it began with."""
        had = [step.threads for step in self.steps if step.threads]
        began = self.environment.get("threads", "")
        if not had and began.isdecimal():
            had = [int(began)]
        return tuple(number for number, _ in itertools.groupby(had))

    @property
    def damaged(self) -> dict[str, str]:
        """All tensors that stay in floating point and hold NaN or infinities, with how many."""
        parts = [step.nonfinite for step in self.steps]
        return {name: said for part in (*parts, self.nonfinite) for name, said in part.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"version": RECORD_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Any) -> RunRecord:
        """Read back what :meth:`to_dict` gave.

        Raises:
            StorageError: The content was written by another version or is damaged; says where.
        """
        version = content.get("version") if isinstance(content, Mapping) else None
        if version != RECORD_VERSION:
            raise StorageError(f"run record of version {version!r} cannot be read")
        plain = {key: value for key, value in content.items() if key != "version"}
        try:
            record: RunRecord = _reader().validate_json(json.dumps(plain), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise StorageError(f"the run record is damaged: {place}: {first['msg']}") from error
        for name in [*(step.shard for step in record.steps), *record.files]:
            _require_inside(name)
        return record


def told_of(nonfinite: Mapping[str, str]) -> list[str]:
    """Lines about tensors with NaN or infinities; many layers share one."""
    return grouped(f"{name} holds {said}" for name, said in nonfinite.items())


def refuse_nonfinite(nonfinite: Mapping[str, str], source: Path) -> None:
    """Refuse tensors that stay in floating point and hold NaN or infinities.

    Raises:
        NumericsError: There are such; names them all.
    """
    if nonfinite:
        found = told_of(nonfinite)
        raise NumericsError(
            f"tensors that stay in floating point are damaged:{listed(found)}",
            where=str(source),
            remedy="download or convert the model again, or leave out --strict",
            findings=found,
        )


@cache
def _reader() -> TypeAdapter[RunRecord]:
    return TypeAdapter(RunRecord)


def _require_inside(name: str) -> None:
    """Refuse the name of a file that a run cannot have written: it would lie elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or {"..", ""} & {*path.parts, name} or "\0" in name:
        raise StorageError(f"the run record is damaged: {name!r} is no file of the folder")
