"""The files of a run that a report is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismquant.errors import StorageError
from prismquant.opening import MAX_JSON_BYTES, parse_json, read_bounded, unreadable
from prismquant.report.plan_summary import PlanSummary
from prismquant.run.record import RunRecord


@dataclass(frozen=True)
class RunFiles:
    """Plan and record of a run, as its directory holds them.

    Attributes:
        plan: What was to be done.
        record: What was done, and how well.
    """

    plan: PlanSummary
    record: RunRecord

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read plan.json and record.json of a run directory.

        Raises:
            StorageError: One is missing, damaged, or of another version.
        """
        inside = folder / "prismquant"
        plan = PlanSummary.from_dict(_json(inside / "plan.json"))
        return cls(plan, RunRecord.from_dict(_json(inside / "record.json")))


def _json(path: Path) -> Any:
    try:
        return parse_json(read_bounded(path, MAX_JSON_BYTES))
    except OSError as error:
        raise unreadable(error, path) from error
    except ValueError as error:
        raise StorageError(f"{path.name} is not valid JSON: {error}", where=str(path)) from error
