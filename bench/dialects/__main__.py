"""Table of how far codes here are those of the tools whose recipes they are.

    python -m bench.dialects

Takes seconds: what the tools made of the same model stands in ``tests/golden``.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from bench.dialects.compare import Comparison, compare, prepare, recipes
from prismquant.report.tables import markdown_table


def row(found: Comparison) -> list[str]:
    """Cells of a recipe."""
    same = found.rows - sum(found.differing.values())
    losses = "" if found.loss is None else f"{found.loss:.4g}, {found.their_loss:.4g}"
    codes = f"{same} of {found.rows}"
    return [found.dialect, found.name, codes, _shown(found), losses]


def _shown(found: Comparison) -> str:
    return "differ" if found.scales or found.inputs else "equal"


def main() -> None:
    """Print the table."""
    with TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        rows = [row(compare(Path(temporary), *one)) for one in recipes()]
    headers = ["recipe of", "recipe", "rows of equal codes", "scales, inputs", "loss here, there"]
    print(markdown_table(headers, rows))


if __name__ == "__main__":
    main()
