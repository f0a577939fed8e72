"""Trials of a choice that is not finished, in a file beside the run's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from prismquant.arguments import EXACT
from prismquant.errors import StorageError
from prismquant.opening import read_json
from prismquant.run.differences import differences
from prismquant.run.identity import Identity
from prismquant.run.method_choice import MethodTrial
from prismquant.storage import write_json


@dataclass(frozen=True)
class _TrialsKept:
    """Content of the file."""

    __pydantic_config__ = EXACT

    identity: Identity
    trials: tuple[MethodTrial, ...]


class TrialFile:
    """The finished trials of a choice; a choice that is cut off goes on after them.

    Args:
        folder: Of the choice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "trials.json"

    def begin(self, identity: Identity, *, resume: bool) -> list[MethodTrial]:
        """Say which trials are finished.

        Args:
            identity: Everything that decides the losses.
            resume: Go on with an earlier choice.

        Raises:
            StorageError: The earlier choice differs, or its file is damaged.
        """
        if not resume or not self._path.is_file():
            self.save(identity, ())
            return []
        try:
            read = json.dumps(read_json(self._path))
            earlier = TypeAdapter(_TrialsKept).validate_json(read, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise StorageError(
                f"the file is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}",
                where=str(self._path),
                remedy="delete it: the alternatives are then tried again",
            ) from error
        if found := differences(earlier.identity, identity, None, {}):
            raise StorageError(
                "cannot resume: the earlier choice of a method differs\n"
                + "\n".join(f"  - {line}" for line in found),
                where=str(self._folder),
                remedy="repeat what the earlier run was given, choose another --out, or delete it",
            )
        return list(earlier.trials)

    def save(self, identity: Identity, trials: Sequence[MethodTrial]) -> None:
        """Write the trials that are finished."""
        write_json(self._path, asdict(_TrialsKept(identity, tuple(trials))))
