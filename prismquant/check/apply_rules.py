"""Rules applied to a checkpoint: all that concern its method and its reader."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prismquant.check import modelopt_rules as modelopt
from prismquant.check import packed_int_rules as packed_int
from prismquant.check.checkpoint import COMPRESSED_TENSORS, GGUF, Checkpoint
from prismquant.check.findings import (
    Finding,
    Problem,
    Report,
    Rule,
    by_severity,
    findings_of,
)
from prismquant.check.open_checkpoint import open_checkpoint
from prismquant.check.rule_table import METHODS, RULES
from prismquant.check.target_reader import TargetReader
from prismquant.errors import PrismQuantError


def check(folder: str | Path, target: TargetReader | str | None = None) -> Report:
    """Hold a checkpoint against the rules of those who are to read it.

    Reads ``config.json``, headers, and scales, norms and biases of some MB; no weight.

    Args:
        folder: The checkpoint.
        target: Who is to load it: ``vllm``, ``transformers``, ``sglang`` or ``prismquant``. Without
            one, what only some reader refuses is a warning, unless it is PrismQuant itself.

    Returns:
        All findings, the worst first.

    Raises:
        ModelError: There is no readable ``config.json``.
        ValueError: There is no such target.
    """
    reader = TargetReader(target) if target is not None else None
    checkpoint = open_checkpoint(Path(folder), reader)
    rules = [rule for rule in RULES if rule.concerns(reader) and _applies(rule, checkpoint)]
    return Report(
        folder=str(folder),
        target=reader,
        method=checkpoint.method,
        layers=_quantized(checkpoint),
        rules=len(rules),
        findings=by_severity(apply(rules, checkpoint)),
    )


def apply(rules: Iterable[Rule], checkpoint: Checkpoint) -> list[Finding]:
    """Findings of those rules that concern a checkpoint's method and reader."""
    reader = checkpoint.target
    return [
        finding
        for rule in rules
        if rule.concerns(reader) and _applies(rule, checkpoint)
        for finding in findings_of(rule, _found(rule, checkpoint), reader)
    ]


def _found(rule: Rule, checkpoint: Checkpoint) -> list[Problem]:
    """Problems that a rule finds; what keeps it from looking counts as one."""
    try:
        return list(rule.find(checkpoint))
    except PrismQuantError as error:
        return [Problem(error.what, (error.where or str(checkpoint.folder),), error.remedy or "")]


def _applies(rule: Rule, checkpoint: Checkpoint) -> bool:
    if rule.layered and checkpoint.model is None:
        return False
    if rule.name not in METHODS:
        return checkpoint.method != GGUF
    return checkpoint.method in METHODS[rule.name]


def _quantized(checkpoint: Checkpoint) -> int:
    """Layers that are stored in codes; those of compressed-tensors by their groups."""
    if checkpoint.method == COMPRESSED_TENSORS:
        return len(checkpoint.quantized)
    codes = (packed_int.is_packed, modelopt.is_stored_quantized)
    return sum(any(one(checkpoint, layer) for one in codes) for layer in checkpoint.layers)
