"""Tables of results, for the terminal and for Markdown.

A table is made in two steps: figures to rows of text, rows to :class:`rich.table.Table` or to
Markdown, so that both always say the same. Nothing is printed here. Results of evaluations come as
the plain dictionaries of ``Fidelity.to_dict()``, as they also stand in a run's record.

Names of files, layers and recipes are a stranger's text. rich takes brackets in a string for
markup, and a terminal obeys control characters: whatever may hold a name is shown as
:func:`as_text` makes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NOTHING = "-"
_KINDS = ("text", "audio", "image", "video")
# Control characters but for tab and line feed, what turns the direction of writing, and halves of
# characters that no encoding can write.
_UNPRINTABLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
_CLASSES = {"answer": "answers", "text": "other text", "vision": "vision"}


@dataclass(frozen=True)
class Variant:
    """One row of a comparison; None stands for what was not measured.

    Attributes:
        name: E.g. ``float``, ``RTN W4``.
        exact_match: Share of right answers, 0 to 1.
        by_kind: The same for each kind of sample.
        nll: Mean negative log-likelihood of an answer token, in nats.
        kl: Mean KL divergence from the reference on answer tokens, in nats.
        kl_error: Its standard error.
        top1: Share of answer tokens on which both agree, 0 to 1.
        size: Bytes of the checkpoint's tensors.
        generated_match: Share of answers whose decoded text is right.
        perplexity: Of running text.
    """

    name: str
    exact_match: float | None = None
    by_kind: Mapping[str, float | None] = field(default_factory=dict)
    nll: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    top1: float | None = None
    size: int | None = None
    generated_match: float | None = None
    perplexity: float | None = None


def as_text(text: str, style: str = "") -> Text:
    """A text for the terminal that is shown as it is: no markup, and control characters escaped."""
    plain = _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)
    return Text(plain, style=style)


def variant(name: str, result: Mapping[str, Any], *, size: int | None = None) -> Variant:
    """A row from the dictionary of an evaluation."""
    overall = result["overall"]
    answers = overall["divergence"].get("answer", {})
    return Variant(
        name=name,
        exact_match=overall["exact_match"],
        by_kind={kind: figures["exact_match"] for kind, figures in result["by_kind"].items()},
        nll=overall["nll_token"],
        kl=answers.get("kl"),
        kl_error=answers.get("kl_error"),
        top1=answers.get("top1"),
        size=size,
        generated_match=overall["generated_match"],
        perplexity=overall.get("perplexity"),
    )


def reference_variant(name: str, result: Mapping[str, Any], *, size: int | None = None) -> Variant:
    """A row for the reference that the dictionary of an evaluation also measured."""
    overall = result["overall"]
    return Variant(
        name=name,
        exact_match=overall["reference_exact_match"],
        by_kind={k: figures["reference_exact_match"] for k, figures in result["by_kind"].items()},
        nll=overall["reference_nll_token"],
        size=size,
        generated_match=overall["reference_generated_match"],
        perplexity=overall.get("reference_perplexity"),
    )


def comparison_table(variants: Sequence[Variant], *, title: str | None = None) -> Table:
    """One row for each variant: exact match by kind, likelihood, divergence, agreement, size."""
    return rich_table(*_comparison(variants), title=title)


def comparison_markdown(variants: Sequence[Variant]) -> str:
    """The same as :func:`comparison_table`, in Markdown."""
    return markdown_table(*_comparison(variants))


def detail_table(result: Mapping[str, Any], *, title: str | None = None) -> Table:
    """One evaluation by kind of sample, by type of task, and by class of tokens."""
    return rich_table(*_details(result), title=title)


def detail_markdown(result: Mapping[str, Any]) -> str:
    """The same as :func:`detail_table`, in Markdown."""
    return markdown_table(*_details(result))


def rich_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None
) -> Table:
    """A table whose first column is text and whose others are figures."""
    shown = None if title is None else as_text(title, "table.title")
    table = Table(title=shown, title_justify="left", header_style="bold")
    for number, header in enumerate(headers):
        # On a narrow terminal all columns fold a little; otherwise the first would vanish.
        table.add_column(as_text(header), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(as_text(cell) for cell in row))
    return table


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown, its columns aligned for reading as plain text."""
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (headers, *rows)]
    widths = [max(3, *(len(row[column]) for row in escaped)) for column in range(len(headers))]
    rule = ["-" * width for width in widths[:1]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    padded = [
        [row[0].ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        for row in escaped
    ]
    padded.insert(1, rule)
    return "".join(f"| {' | '.join(row)} |\n" for row in padded)


def format_share(value: float | None) -> str:
    """A share as percent with one decimal, e.g. ``91.3 %``."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def format_figure(value: float | None, error: float | None = None) -> str:
    """A figure with three significant digits and its error, e.g. ``0.0123 ± 0.0004``."""
    if value is None:
        return NOTHING
    text = _three_digits(value)
    if error is None:
        return text
    if "e" in text:
        return f"{text} ± {_three_digits(error)}"
    places = len(text.partition(".")[2])
    # An error below the figure's last digit is still not zero.
    rounded = f"{error:.{places}f}"
    return f"{text} ± {rounded if float(rounded) or not error else f'{error:.0e}'}"


def format_perplexity(value: float | None) -> str:
    """A perplexity with two decimals, as they are published, e.g. ``5.47``."""
    if value is None:
        return NOTHING
    return f"{value:.2f}" if value < 1e4 else _three_digits(value)


def format_bytes(size: int | None) -> str:
    """A size in binary units with three digits, e.g. ``1.95 GiB``."""
    if size is None:
        return NOTHING
    if size < 1024:
        return f"{size} B"
    units = ("KiB", "MiB", "GiB", "TiB")
    # Not 1024: what is rounded to three digits must not read 1000.
    power = next((n for n in range(1, len(units)) if size / 1024**n < 999.5), len(units))
    return f"{size / 1024**power:.3g} {units[power - 1]}"


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    if not 1e-5 <= abs(value) < 1e4:
        return f"{value:.2e}"
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:.{max(0, 2 - exponent)}f}"


def _comparison(variants: Sequence[Variant]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows. Columns that no variant fills are left out."""
    seen = {kind for row in variants for kind in row.by_kind}
    kinds = [kind for kind in _KINDS if kind in seen] + sorted(seen - set(_KINDS))
    columns: list[tuple[str, list[str]]] = [
        ("variant", [row.name for row in variants]),
        ("exact match", [format_share(row.exact_match) for row in variants]),
        *((kind, [format_share(row.by_kind.get(kind)) for row in variants]) for kind in kinds),
        ("decoded match", [format_share(row.generated_match) for row in variants]),
        ("perplexity", [format_perplexity(row.perplexity) for row in variants]),
        ("NLL / token", [format_figure(row.nll) for row in variants]),
        ("KL / token", [format_figure(row.kl, row.kl_error) for row in variants]),
        ("top-1", [format_share(row.top1) for row in variants]),
        ("size", [format_bytes(row.size) for row in variants]),
    ]
    used = [(header, cells) for header, cells in columns if any(cell != NOTHING for cell in cells)]
    rows = [list(cells) for cells in zip(*(cells for _, cells in used), strict=True)]
    return [header for header, _ in used], rows


def _details(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    groups = [("all", result["overall"])]
    groups += [(kind, result["by_kind"][kind]) for kind in _KINDS if kind in result["by_kind"]]
    groups += [(f"  {name}", figures) for name, figures in result["by_type"].items()]
    compared = [name for name in _CLASSES if name in result["overall"]["divergence"]]
    # Running text is never right or wrong, and all its tokens count as answers.
    running = all(outcome["running"] for outcome in result["outcomes"])
    headers = ["samples of", "number"]
    headers += [] if running else ["exact match", *(["reference"] if compared else [])]
    headers += ["NLL / token"]
    for name in compared:
        headers += ["KL, tokens" if running else f"KL, {_CLASSES[name]}", "top-1"]
    rows = []
    for name, figures in groups:
        matches = ["exact_match", *(["reference_exact_match"] if compared else [])]
        row = [name, str(figures["samples"])]
        row += [] if running else [format_share(figures[match]) for match in matches]
        row += [format_figure(figures["nll_token"])]
        for token_class in compared:
            part = figures["divergence"].get(token_class, {})
            row += [
                format_figure(part.get("kl"), part.get("kl_error")),
                format_share(part.get("top1")),
            ]
        rows.append(row)
    return headers, rows
