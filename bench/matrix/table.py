"""The matrix as Markdown: short cells, the same for all families where they agree, and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.matrix.cells import Cell

# Columns, by the key of a cell: export and reader.
COLUMNS: Mapping[str, str] = {
    "bytes": "bytes",
    "load": "`prismquant.load`",
    "transformers": "transformers",
    "decompress": "compressed-tensors 0.17",
    "vllm": "vLLM",
    "dense": "dense: transformers",
    "modelopt": "ModelOpt: formula",
    "modelopt-vllm": "ModelOpt: vLLM",
    "gptq": "GPTQ: GPTQModel",
    "gptq-vllm": "GPTQ: vLLM",
    "awq": "AWQ: GPTQModel",
    "awq-vllm": "AWQ: vLLM",
    "gguf": "GGUF: gguf",
}
TABLES: Sequence[tuple[str, Sequence[str]]] = (
    (
        "As it is written: compressed-tensors",
        ("bytes", "load", "transformers", "decompress", "vllm", "dense"),
    ),
    (
        "Exported again",
        ("modelopt", "modelopt-vllm", "gptq", "gptq-vllm", "awq", "awq-vllm", "gguf"),
    ),
)
TITLES: Mapping[str, str] = {
    "weights": "weights alone",
    "inputs": "weights + inputs",
    "cache": "weights + cache",
    "whole": "the whole model",
}
_MARKS = {"foretold": "!", "refused": "–", "stopped": "✗", "absent": "·", "differs": "≠"}

Matrix = Mapping[str, Mapping[str, Mapping[str, Cell]]]
"""Family -> case -> column -> cell."""


@dataclass
class Notes:
    """Footnotes, one for each text."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        """The number of a text, raised."""
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"


def totals(matrix: Matrix) -> dict[str, dict[str, int]]:
    """How many cells of each verdict a column has."""
    found: dict[str, Counter[str]] = {}
    for rows in matrix.values():
        for cells in rows.values():
            for column, cell in cells.items():
                found.setdefault(column, Counter())[cell.verdict] += 1
    return {column: dict(found[column]) for column in COLUMNS if column in found}


def rendered(matrix: Matrix, groups: Mapping[str, Sequence[str]]) -> str:
    """The tables and their notes.

    Args:
        matrix: All cells.
        groups: Names of cases, by the title under which they stand.
    """
    notes = Notes()
    lines = _outsiders(matrix, notes)
    strange = {column: set(_strangers(matrix, column)) for column in COLUMNS}
    matrix = {
        family: {
            name: {k: cell for k, cell in cells.items() if family not in strange[k]}
            for name, cells in rows.items()
        }
        for family, rows in matrix.items()
    }
    for title, columns in TABLES:
        for group, names in groups.items():
            rows = _rows(matrix, names, columns, notes)
            shown = [i for i, _ in enumerate(columns) if any(row[i + 1] for row in rows)]
            if shown:
                lines += ["", f"### {title}: {TITLES[group]}", ""]
                lines += _table([TITLES[group], *(COLUMNS[columns[i]] for i in shown)])
                lines += [_line([row[0], *(row[i + 1] for i in shown)]) for row in rows]
    lines += ["", "### Notes", ""]
    lines += [f"{number}. {text}" for number, text in enumerate(notes.texts, start=1)]
    return "\n".join(lines).strip() + "\n"


def totals_table(matrix: Matrix) -> str:
    """How often each verdict occurs, by column."""
    verdicts = ("ran", "foretold", "differs", "stopped", "refused", "absent")
    lines = _table(["", *verdicts])
    for column, counts in totals(matrix).items():
        lines.append(_line([COLUMNS[column], *(str(counts.get(v, "")) for v in verdicts)]))
    return "\n".join(lines) + "\n"


def kernels_table(chosen: Mapping[str, Mapping[str, str]]) -> str:
    """Kernels that vLLM takes: a row a case, a column a capability."""
    capabilities = list(dict.fromkeys(key for row in chosen.values() for key in row))
    lines = _table(["format", *capabilities])
    for name, row in chosen.items():
        # Those that no GPU takes, and those without a quantized layer, are in the other tables.
        if not set(row.values()) <= {"✗", "floating point"}:
            lines.append(_line([f"`{name}`", *(row.get(c, "") for c in capabilities)]))
    return "\n".join(lines) + "\n"


def _strangers(matrix: Matrix, column: str) -> dict[str, Cell]:
    """Families of which a reader reads nothing, though it does of others; with what it says."""
    ran: set[str] = set()
    said: dict[str, list[Cell]] = {}
    for family, rows in matrix.items():
        for cells in rows.values():
            cell = cells.get(column)
            if cell is not None and cell.verdict == "ran":
                ran.add(family)
            elif cell is not None and cell.verdict in ("stopped", "refused"):
                said.setdefault(family, []).append(cell)
    if not ran:
        return {}
    # What it says of most formats is about the family, what PrismQuant refuses about the format.
    return {
        family: Counter(cells).most_common(1)[0][0]
        for family, cells in ((f, _telling(c)) for f, c in said.items() if f not in ran)
    }


def _telling(cells: Sequence[Cell]) -> Sequence[Cell]:
    return [cell for cell in cells if cell.verdict == "stopped"] or cells


def _outsiders(matrix: Matrix, notes: Notes) -> list[str]:
    """A line for each column from which families are left out."""
    lines = []
    for column, title in COLUMNS.items():
        for family, cell in _strangers(matrix, column).items():
            lines.append(f"- No {_names([family])} in *{title}*: {_word(cell, notes)}.")
    return lines


def _rows(
    matrix: Matrix, names: Sequence[str], columns: Sequence[str], notes: Notes
) -> list[list[str]]:
    rows = []
    for name in names:
        found = {family: cases[name] for family, cases in matrix.items() if name in cases}
        if found:
            told = [_cell({f: c[k] for f, c in found.items() if k in c}, notes) for k in columns]
            rows.append([f"`{name}`", *told])
    return rows


def _cell(cells: Mapping[str, Cell], notes: Notes) -> str:
    """One word for all families, or one for each group of them that agrees."""
    if not cells:
        return ""
    kinds: dict[tuple[str, str], dict[str, Cell]] = {}
    for family, cell in cells.items():
        kinds.setdefault((cell.verdict, cell.what), {})[family] = cell
    alike: dict[str, list[str]] = {}
    for kind in kinds.values():
        # Of those that are told alike the largest difference.
        worst = max(kind.values(), key=lambda cell: cell.apart or 0.0)
        alike.setdefault(_word(worst, notes), []).extend(kind)
    if len(alike) == 1:
        return next(iter(alike))
    most = max(alike, key=lambda word: len(alike[word]))
    rest = [f"{word} {_names(families)}" for word, families in alike.items() if word != most]
    return f"{most}; {'; '.join(rest)}"


def _names(families: Iterable[str]) -> str:
    short = {
        "qwen2_vl": "Qwen2-VL",
        "qwen2_5_vl": "Qwen2.5-VL",
        "qwen3_vl": "Qwen3-VL",
        "video_llama_3": "VideoLLaMA3",
    }
    return ", ".join(short.get(family, family) for family in families)


def _word(cell: Cell, notes: Notes) -> str:
    if cell.verdict == "ran" and cell.apart is None:
        return cell.what
    if cell.verdict == "ran":
        tied = notes.mark(cell.what) if "ties" in cell.what else ""
        return _number(cell.apart or 0.0) + tied
    number = "" if cell.apart is None else f" {_number(cell.apart)}"
    return f"{_MARKS[cell.verdict]}{number}{notes.mark(cell.what)}"


def _number(apart: float) -> str:
    return "=" if apart == 0 else f"{apart:.0e}"


def _table(titles: Sequence[str]) -> list[str]:
    return [_line(titles), _line(["---"] * len(titles))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
