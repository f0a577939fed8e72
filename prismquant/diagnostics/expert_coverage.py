"""Tokens that a router sent to each expert while it was calibrated, as the record has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from statistics import median

from prismquant.diagnostics.step_record import LayerRecord, StepRecord
from prismquant.statistics.tokens import Tokens

_NAMES = 6


def expert_tokens(layers: Iterable[LayerRecord]) -> dict[str, Tokens]:
    """Tokens that were sent to each expert, by its module path."""
    return {_expert(layer): layer.routed for layer in layers if layer.routed is not None}


def widened_experts(layers: Iterable[LayerRecord]) -> dict[str, Tokens]:
    """Experts that were calibrated on all tokens of their block, and how many were their own."""
    return {
        _expert(layer): layer.routed
        for layer in layers
        if layer.routed is not None
        and any(seen.total > layer.routed.total for seen in layer.tokens.values())
    }


def coverage_lines(steps: Iterable[StepRecord]) -> list[str]:
    """Lines on the tokens of experts; none for a model without, or a run that looked at no data."""
    steps = list(steps)
    found = {name: n for step in steps for name, n in expert_tokens(step.layers).items()}
    if not found:
        return []
    counts, whole = [one.total for one in found.values()], sum(found.values(), Tokens())
    shares = ", ".join(
        f"{100 * count / whole.total:.0f} % of {kind}"
        for kind, count in asdict(whole).items()
        if count
    )
    lines = [
        f"{len(found)} experts were sent {min(counts)} to {max(counts)} tokens each, "
        f"{median(counts):g} in the median" + (f": {shares}" if shares else "")
    ]
    few = {name: n for step in steps for name, n in widened_experts(step.layers).items()}
    if few:
        named = [f"{name} ({tokens.total})" for name, tokens in list(few.items())[:_NAMES]]
        more = f" and {len(few) - _NAMES} more" if len(few) > _NAMES else ""
        lines.append(
            f"{len(few)} experts were sent fewer tokens than min_tokens, and took all of their "
            f"block: {', '.join(named)}{more}"
        )
    return lines


def _expert(layer: LayerRecord) -> str:
    return layer.name.rpartition(".")[0]
