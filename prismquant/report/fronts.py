"""Tables of found mixes and of fronts, from what a search has written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from prismquant.report.tables import format_bytes, format_figure, rich_table

_KNEE = "knee"
_PLACEHOLDERS = ("image", "video")


def front_table(front: Mapping[str, Any]) -> Table:
    """One row for each mix of a front: size, bits, predicted loss, formats; the knee marked."""
    points = front["points"]
    kinds = list(dict.fromkeys(kind for point in points for kind in point["losses"]))
    timed = any(point["latency_ms"] is not None for point in points)
    headers = ["bits", "size", "loss", *kinds, *(["ms"] if timed else []), "units", ""]
    rows = [
        [
            f"{point['bits']:.3f}",
            format_bytes(point["stored_bytes"]),
            f"{point['loss']:.4g}",
            *(f"{point['losses'].get(kind, 0.0):.4g}" for kind in kinds),
            *([f"{point['latency_ms']:.4g}"] if timed else []),
            units_in_words(point["units"]),
            _KNEE if number == front["knee"] else "",
        ]
        for number, point in enumerate(points)
    ]
    return rich_table(headers, rows, title=f"{front['model']}: the best mix at each size")


def mix_table(found: Mapping[str, Any]) -> Table:
    """One mix: what it takes, what is predicted of it, and how many units have each format."""
    rows = [
        ["stored", f"{format_bytes(found['stored_bytes'])} ({found['stored_bytes']:,} bytes)"],
        ["bits per weight", f"{found['bits']:.4f}"],
        ["predicted loss", f"{found['loss']:.6g}"],
        *([f"  {kind} tokens", f"{loss:.6g}"] for kind, loss in found["losses"].items()),
        ["proved within", gap_in_words(found)],
    ]
    if found["cache_bytes"]:
        rows.append(["keys and values of a token", format_bytes(found["cache_bytes"])])
    if found["latency_ms"] is not None:
        rows.append(["milliseconds", f"{found['latency_ms']:.4g}"])
    rows.append(["units", units_in_words(found["units"])])
    return rich_table(["mix", found["name"]], rows)


def prediction_table(result: Mapping[str, Any]) -> Table | None:
    """Divergence that a search predicted, beside what was measured; None where there is none.

    Args:
        result: An evaluation, as JSON types.
    """
    rows = []
    for kind, predicted in result["predicted"].items():
        # Placeholders of pictures and of clips are told apart by the samples that they are in.
        of_samples, name = (kind, "vision") if kind in _PLACEHOLDERS else (None, kind)
        metrics = result["by_kind"].get(of_samples) if of_samples else result["overall"]
        part = (metrics or {}).get("divergence", {}).get(name)
        if part is not None:
            measured = format_figure(part["kl"], part["kl_error"])
            rows.append([f"{kind} tokens", format_figure(predicted), measured])
    headers = ["KL from the reference", "predicted by the search", "measured"]
    return rich_table(headers, rows) if rows else None


def swap_table(verified: Mapping[str, Any]) -> Table:
    """Measure of a found mix, and the swaps that were tried."""
    rows = [["the mix as found", _measured(verified["first"]), "", "", ""]]
    for swap in verified["swaps"]:
        units = "; ".join(f"{u}: {was} to {swap['after'][u]}" for u, was in swap["before"].items())
        rows.append(
            [
                units,
                f"{swap['measured']:+.4g} ± {swap['error']:.2g}",
                f"{swap['predicted']:+.4g}",
                f"{swap['bytes']:+,}",
                "kept" if swap["kept"] else "",
            ]
        )
    rows.append(["the mix as written", _measured(verified["last"]), "", "", ""])
    return rich_table(["verified", "measured loss", "predicted", "bytes", ""], rows)


def _measured(measure: Mapping[str, Any]) -> str:
    return f"{measure['loss']:.4g} ± {measure['error']:.2g}"


def gap_in_words(found: Mapping[str, Any]) -> str:
    """By how much another mix can be better at most."""
    if found["minimised"] == "bytes":
        return f"{found['gap']:,.0f} bytes"
    return f"{found['gap']:.3g} of loss"


def units_in_words(units: Mapping[str, int]) -> str:
    """Number of units in each format, in words."""
    return ", ".join(f"{count} {name}" for name, count in units.items())
