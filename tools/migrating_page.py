"""Page about migrating, made of what the importers know.

python tools/migrating_page.py           write docs/migrating.md
python tools/migrating_page.py --check   exit with 1 where it is not what would be written
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

from prismquant.recipe.importers.known_dialects import DIALECTS, Dialect
from prismquant.recipe.importers.source_section import Setting, Table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migrating.md"

HEAD = """# Coming from another tool

<!-- Written by tools/migrating_page.py from the importers' own tables. -->

Recipes of these tools are taken as they are, wherever a recipe is: `--recipe FILE`,
`pq.quantize(recipe=...)`, `prismquant recipe convert`. What became of each setting stands on the
screen, in `--json` and in `record.json`: see [recipes](recipes.md#other-tools-recipes).

A setting of the first kind of table means here what it means there, unless the last column says
otherwise; one of the second kind has no effect here. Keys that the tool does not know either are
errors, and so is what has no counterpart at all.

Recipes are written out for these tools as well, `prismquant recipe convert RECIPE --to modelopt`:
see [in other tools' words](recipes.md#in-other-tools-words).
"""

PROOF = """## How it is checked

    python -m bench.dialects

carries recipes out on a small Llama of two blocks (14 layers, 1920 rows) and compares codes and
scales with what the tools made of it, which `tests/golden` keeps. Scales are equal for every
recipe, and inputs are rounded alike; of codes:

- Rounding to nearest of float32 (W4A16, W8A16, W8A8, W4A8): all are equal to those of
  llm-compressor 0.14.0.1 and ModelOpt 0.47, and to MI-optimize's definition but for 4 rows with
  ties at 8 bits.
- In bfloat16 llm-compressor divides a weight by its scale in bfloat16, and rounds that: scales are
  equal, codes are not (782 rows at 4 bits, none at 8), and at 8 bits the relative error of the
  first layer is 4.37e-05, here 3.581e-05.
- GPTQ of llm-compressor: 1916 to 1920 rows are equal, five recipes; where they are not, a sum in
  another order met a tie. At 2 bits it is 1740: three of the first block's rows are better rounded
  to nearest, which is done here, and the next block sees that.
- GPTQ of ModelOpt: 1854 and 1862 rows are equal with inputs in floating point, as code -8 is left
  out (relative error of the first layer .007204, there .0072), and 1451 with int8 inputs.
"""


def page() -> str:
    """Text of the page."""
    return "\n".join([HEAD, *(section(dialect) for dialect in DIALECTS), PROOF])


def section(dialect: Dialect) -> str:
    """What the page says of one tool."""
    parts = [f"## {dialect.name}\n", f"Recognized by {dialect.known_by}.\n"]
    if dialect.notes:
        parts.append("".join(item(note) for note in dialect.notes))
    for title, table in dialect.tables.items():
        parts += [f"### {title}\n", *tables(table)]
    return "\n".join(parts)


def item(note: str) -> str:
    """A note as an item of a list, in lines of a legible length."""
    lines = textwrap.wrap(note, 110, break_long_words=False, break_on_hyphens=False)
    return "- " + "\n  ".join(lines) + "\n"


def tables(table: Table) -> list[str]:
    """Settings with an effect here, and those without."""
    active = [setting for setting in table if not setting.idle]
    idle = [setting for setting in table if setting.idle]
    found = []
    if active:
        headers = ["theirs", "default", "ours", "difference"]
        found.append(left(headers, [row(setting) for setting in active]))
    if idle:
        rows = [[code(one.name), one.difference, code(one.ours)] for one in merged(idle)]
        found.append(left(["without effect here", "why", "nearest"], rows))
    return found


def row(setting: Setting) -> list[str]:
    """Cells of a setting that has an effect."""
    return [code(setting.name), code(setting.default), code(setting.ours), setting.difference]


def merged(settings: list[Setting]) -> list[Setting]:
    """Settings that are dropped for one reason, as one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for setting in settings:
        groups.setdefault((setting.difference, setting.ours), []).append(setting.name)
    return [Setting("`, `".join(names), "", ours, why) for (why, ours), names in groups.items()]


def code(words: str) -> str:
    """Words as code, where there are any."""
    return f"`{words}`" if words else ""


def left(headers: list[str], rows: list[list[str]]) -> str:
    """A table of text, whose columns are all aligned to the left."""
    rule = ["---"] * len(headers)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headers, rule, *rows))


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
