"""What came of one export by one reader."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prismquant.errors import PrismQuantError

Verdict = Literal["ran", "foretold", "differs", "stopped", "refused", "absent"]

# Of logits, relative to the largest: float32 sums in another order.
TOLERANCE = 1e-4

_PATHS = re.compile(r"(?:/[\w.+-]+){2,}/?")
# Of what a message says, that which is in the case's name, or only for programs.
_SAID = (
    (re.compile(r"no algorithm has [\w-]+ weights with [\w-]+ inputs"), "no algorithm of ModelOpt"),
    (re.compile(r"(no block type that is written here holds) [\w ]+"), r"\1 it"),
    (re.compile(r"(the format holds integers[\w ,]*), not [\w ]+"), r"\1"),
    (re.compile(r" \[type=.*| for layer_name=.*|[.,] Reasons.*| and \d+ more$"), ""),
    (re.compile(r"\bmodel[.][\w.]+: "), ""),
    (re.compile(r"declares [\w ]+, input [\w ]+: only"), "declares such an input: only"),
    (re.compile(r"\(\d+\) must match the size of tensor b \(\d+\) at.*"), "must match"),
)
_LAYERS = re.compile(r":? (?:model|language_model|visual|lm_head)[.\w{},-]*(?:, [\w.{},-]+)*")


@dataclass(frozen=True)
class Cell:
    """One outcome.

    Attributes:
        verdict: ``ran``: read, and what was compared is equal; ``foretold``: not as it is meant,
            for a reason that is known; ``differs``: read, and not equal; ``stopped``: the reader
            gives up; ``refused``: PrismQuant does not write it; ``absent``: could not be tried.
        what: What was compared, or why not.
        apart: The largest difference, of what was compared.
    """

    verdict: Verdict
    what: str
    apart: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def compared(what: str, apart: float, tolerance: float = 0.0) -> Cell:
    """The cell of a comparison; NaN differs."""
    return Cell("ran" if apart <= tolerance else "differs", what, apart)


def foretold(cell: Cell, remarks: Sequence[str]) -> Cell:
    """The cell of a reader that is not PrismQuant, in the light of a plan's remarks."""
    told = [remark for remark in remarks if "only prismquant.load" in remark]
    if not told or cell.verdict in ("refused", "absent"):
        return cell
    same = cell.apart is not None and cell.apart <= TOLERANCE
    if cell.verdict == "ran" and same:  # the remark did not matter here
        return cell
    return Cell("foretold", "; ".join(dict.fromkeys(map(shortened, told))), cell.apart)


def stopped(error: BaseException | str) -> Cell:
    """The cell of a reader that gave up."""
    return Cell("stopped", shortened(error))


def refused(error: PrismQuantError) -> Cell:
    """The cell of an export that PrismQuant does not write."""
    reasons = [line[4:] for line in str(error).splitlines() if line.startswith("  - ")]
    told = "; ".join(dict.fromkeys(shortened(reason) for reason in reasons))
    return Cell("refused", told or shortened(error))


def shortened(error: BaseException | str) -> str:
    """The line of a message that says most, without paths, layers and its end."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Those of pydantic count the errors first, and name the field in a line of its own.
    line = " ".join(lines[1:3]) if "validation error" in lines[0] and lines[1:] else lines[0]
    for pattern, instead in _SAID:
        line = pattern.sub(instead, line)
    line = _LAYERS.sub("", _PATHS.sub("..", line)).strip().rstrip(":").replace("|", "/")
    return line if len(line) <= 180 else line[:179].rstrip() + "…"
