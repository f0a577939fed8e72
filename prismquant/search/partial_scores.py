"""Scores of an analysis that is not finished, in a folder beside its result.

    sensitivity.json.partial/identity.json    what decides the scores
    sensitivity.json.partial/unit-0003.json   the scores of the fourth unit
    sensitivity.json.partial/lock             while an analysis is at work: who it is

A unit's file is written when all its scores are known, whole or not at all, so that an analysis
that is killed goes on after the units that it has finished. When the result is written, the folder
is deleted.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from prismquant.arguments import EXACT
from prismquant.engine.activation_store import ActivationStore, opened_store
from prismquant.engine.placement import Store
from prismquant.errors import StorageError
from prismquant.opening import read_json
from prismquant.outputs import require_empty
from prismquant.run.differences import differences, plan_differences
from prismquant.run.identity import Identity
from prismquant.run.lock import locked
from prismquant.search.analysis import SampleLosses, UnitScores
from prismquant.search.sensitivity import Score, TokenClass
from prismquant.storage import is_temporary, remove_temporaries, write_json

T = TypeVar("T")

_IDENTITY = "identity.json"
_UNIT = re.compile(r"unit-(\d{4,})\.json")
_STATES = "states-"


@dataclass(frozen=True)
class AnalysisIdentity:
    """Everything that decides the scores of an analysis.

    Attributes:
        settings: Method, its options, solver, formats, units of choice: as JSON types.
        run: Files of the model, samples, arithmetic, versions; its plan is a fingerprint of the
            settings.
    """

    __pydantic_config__ = EXACT

    settings: Mapping[str, Any]
    run: Identity


@dataclass(frozen=True)
class _UnitFile:
    """Content of a unit's file."""

    __pydantic_config__ = EXACT

    unit: str
    scores: Mapping[str, Mapping[TokenClass, Score]]
    layer_losses: Mapping[str, Mapping[str, float]]
    samples: Mapping[str, Mapping[TokenClass, SampleLosses]]


class PartialScores:
    """The folder of an analysis that is at work.

    Args:
        out: The file that the result will be.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")

    @contextlib.contextmanager
    def claimed(self, *, resume: bool) -> Iterator[None]:
        """Keep other analyses out of the folder for the length of the block.

        Raises:
            StorageError: Another one is at work in it, or it holds what is not to be gone on with.
        """
        if not (self.folder / "lock").is_file():
            self._require_free(resume=resume)
        try:
            with locked(self.folder / "lock"):
                self._require_free(resume=resume)
                yield
        finally:
            # Only where nothing is left in it to go on with.
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def begin(self, identity: AnalysisIdentity, units: Sequence[str]) -> list[UnitScores]:
        """Make the folder ready and say which units are done.

        Args:
            identity: What decides the scores now.
            units: Names of all units, in their order.

        Returns:
            Scores of the units that an earlier analysis has finished.

        Raises:
            StorageError: The earlier analysis differs; says in what.
        """
        remove_temporaries(self.folder)
        for left in self.folder.glob(f"{_STATES}*"):
            shutil.rmtree(left, ignore_errors=True)
        path = self.folder / _IDENTITY
        if not path.is_file():
            write_json(path, asdict(identity))
            return []
        earlier = _read(AnalysisIdentity, path)
        if found := _differences(earlier, identity):
            raise StorageError(
                "cannot resume: the earlier analysis differs\n"
                + "\n".join(f"  - {line}" for line in found),
                where=str(self.folder),
                remedy="repeat what it was given, choose another --out, or delete the folder",
            )
        done = []
        for number, name in enumerate(units):
            if (file := self._file(number)).is_file():
                own = _read(_UnitFile, file)
                if own.unit != name:
                    raise _damaged(file, f"it is of {own.unit!r}, not of {name!r}")
                done.append(UnitScores(own.unit, own.scores, own.layer_losses, own.samples))
        return done

    def add(self, number: int, scores: UnitScores) -> None:
        """Keep the scores of a unit.

        Args:
            number: Its place among all units.
            scores: Its scores.
        """
        content = _UnitFile(scores.unit, scores.scores, scores.layer_losses, scores.samples)
        write_json(self._file(number), asdict(content))

    def activation_store(self, states: Store, of: str) -> AbstractContextManager[ActivationStore]:
        """Give what keeps hidden states for the length of the block.

        Args:
            states: Where they wait.
            of: A name for what they are of.
        """
        return opened_store(states, self.folder / f"{_STATES}{of}")

    def close(self) -> None:
        """Delete what is no longer needed; the result must be written."""
        for path in (*self.folder.glob("unit-*.json"), self.folder / _IDENTITY):
            path.unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"unit-{number:04d}.json"

    def _require_free(self, *, resume: bool) -> None:
        def ours(path: Path) -> bool:
            inside = path.relative_to(self.folder).parts
            known = path.name in ("lock", _IDENTITY) or _UNIT.fullmatch(path.name) is not None
            return is_temporary(path) or inside[0].startswith(_STATES) or known

        require_empty(
            self.folder, ours=ours, remedy="delete it or move it away, or choose another --out"
        )
        begun = next(self.folder.glob("unit-*.json"), None) is not None
        if begun and not resume:
            raise StorageError(
                "an earlier analysis that was cut off lies there",
                where=str(self.folder),
                remedy="pass --resume to go on with it, delete the folder, or choose another --out",
            )
        if not begun:
            (self.folder / _IDENTITY).unlink(missing_ok=True)


def _read(kind: type[T], path: Path) -> T:
    content = read_json(path)
    try:
        found: T = TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return found


def _damaged(path: Path, what: str) -> StorageError:
    return StorageError(
        f"the file is damaged: {what}",
        where=str(path),
        remedy="delete the folder and start again without --resume",
    )


def _differences(earlier: AnalysisIdentity, now: AnalysisIdentity) -> list[str]:
    found = []
    if earlier.settings != now.settings:
        found = [f"analysis: {line}" for line in plan_differences(earlier.settings, now.settings)]
    same_plan = replace(earlier.run, plan=now.run.plan)
    return found + differences(same_plan, now.run, None, {})
