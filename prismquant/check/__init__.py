"""Whether readers will load a checkpoint, and as it is meant: from its configuration and headers.

:func:`check` reads ``config.json``, the headers of the shards and scalars of a few bytes, never a
weight, and holds them against a table of rules (:data:`RULES`), each a small pure function.
"""

from prismquant.check.apply_rules import check
from prismquant.check.findings import Finding, Report, Rule, Severity
from prismquant.check.rule_table import RULES
from prismquant.check.target_reader import TargetReader

__all__ = ["RULES", "Finding", "Report", "Rule", "Severity", "TargetReader", "check"]
