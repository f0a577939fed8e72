"""Findings of rules, and the report that gathers them.

A rule has one severity. Where it concerns only some readers (vLLM, say), it is an error for those:
a report that is not made for a certain reader shows it as a warning, because another one may well
load the checkpoint. What PrismQuant itself cannot read stays an error there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from prismquant.check.checkpoint import Checkpoint
from prismquant.check.target_reader import TargetReader


class Severity(StrEnum):
    """Severity of a finding."""

    # it will not load, or computes nonsense
    ERROR = "error"
    # it loads, but not as it is meant
    WARNING = "warning"
    # a fact worth knowing before it is served
    NOTE = "note"


@dataclass(frozen=True)
class Problem:
    """Problem that one rule found once.

    Attributes:
        what: One sentence that names the offending value.
        where: Layers, tensors, files or keys that it concerns, all of them.
        remedy: What to do about it.
    """

    what: str
    where: tuple[str, ...] = ()
    remedy: str = ""


_ORDER = tuple(Severity)


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: How reports call it, ``subject.rule``.
        severity: Of everything that it finds.
        says: What holds of a checkpoint that keeps it.
        find: Yields what is wrong with a checkpoint; pure.
        readers: For whom it matters; empty for everybody.
        layered: Whether it needs the model's layers, so that it is left out where the architecture
            is not known.
    """

    name: str
    severity: Severity
    says: str
    find: Callable[[Checkpoint], Iterable[Problem]]
    readers: tuple[TargetReader, ...] = ()
    layered: bool = False

    def concerns(self, target: TargetReader | None) -> bool:
        """Whether the rule matters for a reader."""
        return target is None or not self.readers or target in self.readers


@dataclass(frozen=True)
class Finding:
    """Finding: what is wrong, where, and what to do about it.

    Attributes:
        severity: How bad it is for the reader in question.
        rule: Name of the rule.
        what: One sentence.
        where: All places that it concerns.
        remedy: What to do.
        readers: Who is concerned; empty for everybody.
    """

    severity: Severity
    rule: str
    what: str
    where: tuple[str, ...]
    remedy: str
    readers: tuple[TargetReader, ...] = ()

    @property
    def place(self) -> str:
        """Places, on one line."""
        return folded(self.where)

    def to_dict(self) -> dict[str, Any]:
        """JSON types of all that is said."""
        return {
            "severity": str(self.severity),
            "rule": self.rule,
            "what": self.what,
            "where": list(self.where),
            "remedy": self.remedy,
            "readers": [str(reader) for reader in self.readers],
        }


@dataclass(frozen=True)
class Report:
    """All findings about one checkpoint.

    Attributes:
        folder: The checkpoint.
        target: The reader that it was checked for, or None.
        method: Its quantization method; empty where it is in floating point.
        layers: How many of its linear layers are quantized.
        rules: How many rules were looked at.
        findings: The worst first.
    """

    folder: str
    target: TargetReader | None
    method: str
    layers: int
    rules: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings for which it will not load, or computes nonsense."""
        return tuple(f for f in self.findings if f.severity is Severity.ERROR)

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def count(self, severity: Severity) -> int:
        """Number of findings that are so severe."""
        return sum(finding.severity is severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON types of all that is said."""
        return {
            "folder": self.folder,
            "for": str(self.target) if self.target else None,
            "ok": self.ok,
            "method": self.method,
            "quantized_layers": self.layers,
            "rules": self.rules,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def gathered(found: Iterable[tuple[str, str, str]]) -> list[Problem]:
    """Problems out of ``(what, where, remedy)``: one for all places of which the same is said."""
    places: dict[tuple[str, str], list[str]] = {}
    for what, where, remedy in found:
        places.setdefault((what, remedy), []).append(where)
    return [Problem(what, tuple(where), remedy) for (what, remedy), where in places.items()]


def faults_under(rule: str) -> Callable[[Checkpoint], list[Problem]]:
    """Function that finds the faults that are told under a rule's name."""

    def find(checkpoint: Checkpoint) -> list[Problem]:
        return gathered((f.what, f.where, f.remedy) for f in checkpoint.faults if f.rule == rule)

    return find


def findings_of(
    rule: Rule, problems: Iterable[Problem], target: TargetReader | None
) -> list[Finding]:
    """Problems of a rule as findings for a reader."""
    severity = rule.severity
    # What we ourselves refuse is never called fine.
    others = rule.readers and TargetReader.PRISMQUANT not in rule.readers
    if target is None and others and severity is Severity.ERROR:
        severity = Severity.WARNING
    return [Finding(severity, rule.name, p.what, p.where, p.remedy, rule.readers) for p in problems]


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, otherwise in the order of the rules."""
    return tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.severity)))


def folded(names: Sequence[str], limit: int = 1) -> str:
    """The first names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
