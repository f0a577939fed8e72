"""How a quantized model's calibration tokens were shared among the experts of each block.

    python -m bench.expert_shares OUT

``OUT`` is what ``prismquant quantize`` wrote. Each cell is the share of the block's choices that an
expert got, and in brackets its share of the choices that image and video tokens made.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismquant.report.tables import markdown_table

if TYPE_CHECKING:
    from collections.abc import Mapping

# By block and expert: tokens by modality.
Routed = dict[str, dict[str, "Mapping[str, int]"]]


def routed_tokens(record: Mapping[str, Any]) -> Routed:
    """Tokens that were sent to each expert, from the record of a run."""
    found: Routed = defaultdict(dict)
    for layer in (layer for step in record["steps"] for layer in step["layers"]):
        if layer.get("routed") is not None:
            holder, expert, _ = layer["name"].rsplit(".", 2)
            found[holder][expert] = layer["routed"]
    return found


def share_rows(routed: Routed) -> list[list[str]]:
    """A row for each block: its experts' shares in their order."""
    rows = []
    for holder, experts in routed.items():
        numbered = [experts[number] for number in sorted(experts, key=int)]
        total = [sum(one.values()) for one in numbered]
        seen = [sum(one.get(kind, 0) for kind in ("image", "video")) for one in numbered]
        rows.append(
            [
                holder,
                *(
                    f"{100 * every / sum(total):.1f} % ({100 * some / max(1, sum(seen)):.1f} %)"
                    for every, some in zip(total, seen, strict=True)
                ),
            ]
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="tokens of each expert")
    parser.add_argument("out", type=Path, help="folder of a quantized checkpoint")
    path = parser.parse_args().out / "prismquant" / "record.json"
    rows = share_rows(routed_tokens(json.loads(path.read_text(encoding="utf-8"))))
    widest = max((len(row) for row in rows), default=1)
    print(markdown_table(["block", *map(str, range(widest - 1))], rows))


if __name__ == "__main__":
    main()
